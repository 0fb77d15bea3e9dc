"""What distillation objectives share: networks as denoisers, and steps of DDIM.

    DDIM_{t->s}(x, z_t) = r z_t + kappa x,   r = sigma_s / sigma_t                  (1)

with kappa = alpha_s - alpha_t r. A step to s = 0 ends at clean data: r = 0, kappa = 1.

Every `t` and `s` here is `[B]`. Roles of all objectives: `student` is what samples,
`aux` what learns the student's samples; the teacher's parameters are an entry of
`inputs.params`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusionlab.guidance.classifier_free import ClassifierFree
from diffusionlab.objectives.denoising import denoise, loss_by_logsnr
from diffusionlab.samplers import base as samplers
from diffusionlab.samplers.consistency import Consistency
from diffusionlab.types import (
    Array,
    Batch,
    Cond,
    Params,
    Phase,
    Prediction,
    Process,
    Role,
    lift,
)

NETWORK = "denoiser"
"""Entry of `config.networks` that student and aux share; see `inherit.NETWORK`."""
START = "start_logsnr"
"""What a network can be told besides: the logsnr at which a sample was made."""


def require_teacher(teacher: Any) -> None:
    """Raises ValueError where there is no teacher."""
    if teacher is None:
        raise ValueError(
            "config.teacher: missing; give the directory of a trained run, "
            "--config.teacher=runs/teacher."
        )


def check_guidance(objective: Any) -> None:
    """Raises ValueError unless its teacher can be guided as `guidance_scale` says."""
    scale, teacher = objective.guidance_scale, objective.teacher
    if scale != 1.0 and not (teacher and teacher.has_null_label):
        raise ValueError(
            f"guidance_scale: {scale} needs a teacher that was trained with labels and "
            "without (objective.label_dropout above 0); use 1."
        )


def check_at_least(objective: Any, minimum: float, *names: str) -> None:
    """Raises ValueError where a number of an objective is below `minimum`."""
    for name in names:
        if getattr(objective, name) < minimum:
            raise ValueError(
                f"{name}: must be at least {minimum}, got {getattr(objective, name)}."
            )


def check_word(objective: Any, name: str, accepted: Iterable[str]) -> None:
    """Raises ValueError where a field is none of the accepted words."""
    word = getattr(objective, name)
    if word not in accepted:
        raise ValueError(f"{name}: expected {' or '.join(accepted)}, got '{word}'.")


def check_num_steps(objective: Any, sampler: Any) -> None:
    """Raises ValueError unless the sampler makes the steps that are trained."""
    if sampler.num_steps != objective.num_steps:
        raise ValueError(
            f"num_steps: is {sampler.num_steps}, but config.objective.num_steps trains "
            f"{objective.num_steps}; give both the same number."
        )


def check_consistency(sampler: Any) -> None:
    """Raises ValueError for a sampler that takes every x_hat for an expectation."""
    if sampler.num_steps > 1 and not isinstance(sampler, Consistency):
        raise ValueError(
            f"name: {type(sampler).__name__} with {sampler.num_steps} steps needs "
            "E[x | z_t], and this student answers with samples; use 'consistency', or "
            "one step."
        )


def labels(objective: Any, batch: Batch) -> Cond:
    """Returns the part of cond that comes with the data."""
    return {"label": batch["label"]} if objective.spec.num_classes else {}


def conditions(objective: Any, t: Array, cond: Cond) -> Cond:
    """Returns what the network of student or aux is told besides z_t `[B, ...]`.

    Args:
      t: `[B]`.
      cond: what it lacks of the teacher's own `cond` is taken from there, and the
        level a sample was made from, cond[START], is t itself.
    """
    told = getattr(getattr(objective, "teacher", None), "cond", {})
    told = {name: jnp.full(t.shape, value) for name, value in told.items()}
    logsnr = objective.process.schedule.logsnr(t)
    return {**told, START: logsnr, **cond, "t": t, "logsnr": logsnr}


def apply(
    objective: Any,
    params: Params,
    z_t: Array,
    t: Array,
    cond: Cond,
    key: Array | None = None,
    network: str = NETWORK,
) -> Prediction:
    """Returns the prediction of student or aux, `params` being those of the role.

    Args:
      objective: has `networks` and `process`.
      cond: see `conditions`.
      key: of dropout; None is without.
    """
    net, train = objective.networks[network], key is not None
    cond = conditions(objective, jnp.broadcast_to(t, z_t.shape[:1]), cond)
    return denoise(net, objective.process, params, z_t, t, cond, train=train, key=key)


def teach(
    objective: Any,
    params: Mapping[str, Params],
    z_t: Array,
    t: Array,
    cond: Cond,
    guidance_scale: float | None = None,
) -> Prediction:
    """Returns the teacher's prediction, guided by `objective.guidance_scale`.

    Args:
      objective: has `teacher`, `process`, `spec` and `guidance_scale`.
      params: of the teacher, by role: `inputs.params["teacher"]`. Gradients flow into
        them, and into z_t, where the caller lets them.
      guidance_scale: another one than the objective's; 1 is without guidance and one
        evaluation, anything else takes two.
    """
    predict = functools.partial(objective.teacher.predict, params)
    scale = objective.guidance_scale if guidance_scale is None else guidance_scale
    transform = ClassifierFree(guidance_scale=scale)
    guided = transform(predict, objective.process, objective.spec)
    return guided(z_t, t, cond)


def teacher_evaluations(objective: Any) -> float:
    """Returns the network evaluations of one answer of the teacher, guided or not."""
    return 1.0 if objective.guidance_scale == 1.0 else 2.0


ROLES = {"student": Role(NETWORK, "teacher")}
"""Of an objective that trains the student alone; it has one phase, 'train'."""


@property
def phases(objective: Any) -> Mapping[str, Phase]:
    """Returns the phase in which `objective.loss` trains the student."""
    return {"train": Phase(("student",), objective.loss)}


def phase(objective: Any, step: int) -> str:
    """Returns 'train' for every step."""
    return "train"


def predict_student(
    objective: Any, params: Mapping[str, Params], z_t: Array, t: Array, cond: Cond
) -> Prediction:
    """Returns what the student answers; `predict` of most objectives."""
    return apply(objective, params["student"], z_t, t, cond)


def coefficients(process: Process, t: Array, s: Array) -> tuple[Array, Array]:
    """Returns r and kappa of equation 1, `[B]` each, without cancellation."""
    _, sigma_t = process.schedule.alpha_sigma(t)
    _, sigma_s = process.schedule.alpha_sigma(s)
    clean = samplers.is_last(s)
    kappa = samplers.ddim_weight(process, t, s)
    return jnp.where(clean, 0.0, sigma_s / sigma_t), jnp.where(clean, 1.0, kappa)


def ddim(process: Process, x: Array, z_t: Array, t: Array, s: Array) -> Array:
    """Returns z_s of equation 1, `[B, ...]`; z_t itself where s = t."""
    ratio, kappa = (lift(q, z_t.ndim) for q in coefficients(process, t, s))
    return ratio * z_t + kappa * x


def mean(x: Array) -> Array:
    """Returns the mean over all axes but the first, `[B]`."""
    return x.reshape(x.shape[0], -1).mean(axis=1)


def total(x: Array) -> Array:
    """Returns the sum over all axes but the first, `[B]`."""
    return x.reshape(x.shape[0], -1).sum(axis=1)


def metric(value: Array) -> tuple[Array, Array]:
    """Returns (sum, count) of values `[B]`."""
    return value.sum(), jnp.float32(value.shape[0])


def by_logsnr(value: Array, process: Process, t: Array) -> tuple[Array, Array]:
    """Returns (sum, count) of values `[B]` in bins of logsnr; see `loss_by_logsnr`."""
    return loss_by_logsnr(value, process.schedule.logsnr(t))


def split(key: Array, number: int) -> list[Array]:
    """Returns keys, one for each use of a step's key."""
    return [jax.random.fold_in(key, use) for use in range(number)]


def turns(step: int, aux_steps: int) -> str:
    """Returns the phase of a step: `aux_steps` of 'aux', then one of 'student'."""
    return "student" if step % (aux_steps + 1) == aux_steps else "aux"
