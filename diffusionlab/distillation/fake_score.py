"""The score network of a student's samples: what its phase of every objective shares.

The role `aux` learns to denoise what the student makes, x = G(noise), without a
gradient into the student:

    L = E_{t, eps} [ (SNR + 1 / d²) mean (x - x_aux(z_t, t))² ]                     (1)

with the standard deviation d that the process gives the data. The score of the
student's samples minus the teacher's is then, at every z_t,

    s_aux - s_teacher = alpha (x_aux - x_teacher) / sigma²                          (2)

It is x_aux - x_teacher that the objectives work with: the scores themselves are
infinite at t = 0.

Source: Luo et al. 2023, Diff-Instruct (arXiv 2305.18455), algorithm 1; the weight of
(1) is EDM's, Karras et al. 2022 (arXiv 2206.00364), table 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusionlab.distillation import base, generator
from diffusionlab.objectives.denoising import denoising_error
from diffusionlab.objectives.weightings import Edm
from diffusionlab.schedules.times import quantiles
from diffusionlab.types import Array, Cond, Inputs, Metrics, Params, Phase, Role

ROLES = {
    "student": Role(base.NETWORK, "teacher"),
    "aux": Role(base.NETWORK, "teacher", ema=()),
}
"""Both start as the teacher; nothing is sampled from the second."""


def check(objective: Any) -> None:
    """Checks what all objectives with a score network of the student have.

    Raises:
      ValueError: no teacher; guidance that it was not trained for; num_steps or
        aux_steps below 1, or a first_logsnr outside the schedule.
    """
    base.require_teacher(objective.teacher)
    base.check_guidance(objective)
    base.check_at_least(objective, 1, "num_steps", "aux_steps")
    generator.check(objective)


def check_interval(objective: Any) -> None:
    """Raises ValueError unless 0 <= min_t < max_t <= 1."""
    if not 0 <= objective.min_t < objective.max_t <= 1:
        raise ValueError(
            "min_t: expected 0 <= min_t < max_t <= 1, got "
            f"{objective.min_t} and {objective.max_t}."
        )


def phases(objective: Any) -> Mapping[str, Phase]:
    """Returns the two phases of an objective without a discriminator."""
    return {
        "aux": Phase(("aux",), lambda params, inputs: loss(objective, params, inputs)),
        "student": Phase(("student",), objective.loss),
    }


def samples(
    objective: Any,
    params: Params,
    key: Array,
    inputs: Inputs,
    dropout: Array | None = None,
) -> tuple[Array, Cond]:
    """Returns x = G(noise) `[B, ...]` with a gradient into `params`, and its cond.

    Args:
      params: of the student.
      key: of the noise.
      inputs: the labels of its batch are what is generated; nothing else of it is used.
      dropout: key of dropout; None is without.
    """
    cond = base.labels(objective, inputs.batch)
    shape = inputs.batch["x"].shape
    start = generator.start(objective, params, key, shape, cond)
    cond = generator.told(objective, start, cond)
    return generator.generate(objective, params, start, cond, dropout), cond


def between(key: Array, size: int, min_t: float, max_t: float) -> Array:
    """Returns t ~ U(min_t, max_t) `[B]`, spread evenly over the batch."""
    return min_t + (max_t - min_t) * quantiles(key, size, stratified=True)


def error(objective: Any, x: Array, eps: Array, raw: Array, t: Array) -> Array:
    """Returns equation 1 of each example, `[B]`, without the average over t and eps.

    Args:
      x, eps: `[B, ...]`, what z_t was mixed of.
      raw: `[B, ...]`, what the network answers at z_t, not yet read as a prediction.
      t: `[B]`.
    """
    process = objective.process
    weight = Edm(sigma_data=process.sigma_data)(process.schedule, t)
    return weight * denoising_error(process, x, eps, raw, t)


def loss(
    objective: Any, params: Mapping[str, Params], inputs: Inputs
) -> tuple[Array, Metrics]:
    """Returns equation 1 for the role `aux`, and its metrics.

    Args:
      objective: its `times` are the law of t, with their own weights.
      params: by role; of the student those in `inputs` are used.
      inputs: see `samples`.
    """
    keys = base.split(inputs.key, 4)
    made, cond = samples(objective, inputs.params["student"], keys[0], inputs)
    x = jax.lax.stop_gradient(made)
    process = objective.process
    t, weight = objective.times.sample(keys[1], x.shape[0], process.schedule)
    z_t, eps = process.corrupt(keys[2], x, t)
    raw = objective.networks[base.NETWORK].apply(
        params["aux"],
        process.network_input(z_t, t),
        base.conditions(objective, t, cond),
        train=True,
        key=keys[3],
    )
    each = weight * error(objective, x, eps, raw, t)
    metrics = {
        "aux_loss": base.metric(each),
        "aux_loss_by_logsnr": base.by_logsnr(each, process, t),
    }
    return each.mean(), metrics


def report(
    objective: Any, x: Array, taught: Array, learned: Array, t: Array
) -> Metrics:
    """Returns what tells how far student and teacher are apart.

    score_difference, and its `_by_logsnr`: mean square of x_aux - x_teacher, which goes
    to zero. student_variance: of an element of x over the batch; it falls to zero where
    the student collapses.

    Args:
      x: `[B, ...]` samples of the student.
      taught, learned: `[B, ...]` x of the teacher and of aux at z_t.
      t: `[B]`.
    """
    gap = base.mean((learned - taught) ** 2)
    found = {
        "score_difference": base.metric(gap),
        "score_difference_by_logsnr": base.by_logsnr(gap, objective.process, t),
        "student_variance": (x.var(axis=0).mean(), jnp.float32(1)),
    }
    return jax.lax.stop_gradient(found)


def student_evaluations(objective: Any) -> float:
    """Returns the network evaluations of a student's sample with its gradient."""
    return 3.0 + (objective.num_steps - 1)
