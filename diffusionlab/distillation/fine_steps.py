"""Two steps of a fine grid as one: what is learned from a teacher's trajectory.

Time is cut into N segments, and each of them into n fine steps. From z_t, a first step
to s, made by a teacher, and a second one from there to the segment's start b, made by
whoever knows the way, end where a single step from t to b would with

    x~ = w x_1 + (1 - w) x_2,   w = (sigma_b / sigma_s) kappa_ts / kappa_tb         (1)
    1 - w = kappa_sb / kappa_tb

with kappa of `base`. It is inverse DDIM of the two steps, without its cancellation: all
three kappas are known to all digits, and no z is divided by a small number. Where b = 0
it is x_2.

aDDIM as the first step is DDIM with another x,

    x_1 = x_hat + (sqrt(sigma_s² + kappa² q) - sigma_s) / kappa eps_hat             (2)
        = x_hat + kappa q / (sqrt(sigma_s² + kappa² q) + sigma_s) eps_hat
    q = xvar / mean(eps_hat²)

Source: Heek, Hoogeboom and Salimans 2024 (arXiv 2403.06807), section 3, for the steps;
Salimans and Ho 2022 (arXiv 2202.00512), algorithm 2, for x~ of two steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusionlab.distillation import base
from diffusionlab.guidance import base as guidance
from diffusionlab.samplers import base as samplers
from diffusionlab.samplers import grids
from diffusionlab.samplers.ddim import Ddim
from diffusionlab.types import (
    Array,
    Cond,
    Metrics,
    Params,
    Prediction,
    Process,
    Schedule,
    lift,
)

# Keeps a prediction without any noise from dividing by zero.
_TINY = 1e-30

WEIGHTS = {
    "snr+1": lambda logsnr: 1.0 + jnp.exp(logsnr),
    "sqrt(snr+1)": lambda logsnr: jnp.sqrt(1.0 + jnp.exp(logsnr)),
    "truncated_snr": lambda logsnr: jnp.maximum(1.0, jnp.exp(logsnr)),
}
"""Factors on an error of x, by name. The squared error of v is 'snr+1' times that of x;
the larger of the squared errors of x and eps is 'truncated_snr' times it."""


class Fine(NamedTuple):
    """Fine steps from t to s in segments that start at b <= s; `[B]` all.

    Attributes:
      t, s, b: times in [0, 1].
      last: whether s is b. It is not to be read off the times, which are rounded.
    """

    t: Array
    s: Array
    b: Array
    last: Array

    @property
    def other(self) -> Array:
        """s, or t where the step is the last: a time above 0 at which to ask."""
        return jnp.where(self.last, self.t, self.s)


def fine_steps(segment: Array, step: Array, segments: Array, each: Array) -> Fine:
    """Returns fine step 1 ... `each` of segments 0 ... `segments` - 1.

    Args:
      segment, step: `[B]` int32.
      segments, each: number of segments, and of fine steps in each; may be traced.
    """
    number = segments * each
    end = segment * each + step
    return Fine(end / number, (end - 1) / number, segment / segments, step == 1)


def draw(keys: list[Array], size: int, segments: Array, each: Array) -> Fine:
    """Returns `size` fine steps, uniform over segments and over the steps of each."""
    segment = jax.random.randint(keys[0], (size,), 0, segments)
    step = jax.random.randint(keys[1], (size,), 1, each + 1)
    return fine_steps(segment, step, segments, each)


def addim_x(
    process: Process, prediction: Prediction, xvar: Array, t: Array, s: Array
) -> Array:
    """Returns x_1 of equation 2, `[B, ...]`: DDIM with it makes the step of aDDIM.

    Args:
      prediction: at z_t.
      xvar: `[B]`, an estimate of tr Var[x | z_t] / d; 0 is DDIM.
      t, s: `[B]`, s < t.
    """
    _, kappa = base.coefficients(process, t, s)
    _, sigma = process.schedule.alpha_sigma(s)
    sigma = jnp.where(samplers.is_last(s), 0.0, sigma)
    q = xvar / jnp.maximum(base.mean(prediction.eps**2), _TINY)
    total = jnp.sqrt(sigma**2 + kappa**2 * q) + sigma
    factor = kappa * q / jnp.maximum(total, _TINY)
    return prediction.x + lift(factor, prediction.x.ndim) * prediction.eps


def joined(process: Process, first: Array, second: Array, fine: Fine) -> Array:
    """Returns x~ of equation 1, `[B, ...]`; the first x where the step is the last.

    Args:
      first, second: `[B, ...]`, x of the steps from t to s and from s to b.
    """
    ratio, second_kappa = base.coefficients(process, fine.other, fine.b)
    _, first_kappa = base.coefficients(process, fine.t, fine.s)
    _, kappa = base.coefficients(process, fine.t, fine.b)
    last = lift(fine.last, first.ndim)
    one, two = (
        lift(q / kappa, first.ndim) for q in (ratio * first_kappa, second_kappa)
    )
    return jnp.where(last, first, one * first + two * second)


def followed(
    process: Process,
    first: Array,
    z_t: Array,
    fine: Fine,
    answer: Callable[[Array, Array], Array],
) -> Array:
    """Returns x~ of equation 1, `[B, ...]`, with x_2 = answer(z_s, s).

    Where the step is the last, x_2 does not matter, and the question is (z_t, t): s may
    be 0 there, where a network says nothing.
    """
    z_s = base.ddim(process, first, z_t, fine.t, fine.s)
    asked = jnp.where(lift(fine.last, z_t.ndim), z_t, z_s)
    return joined(process, first, answer(asked, fine.other), fine)


def squared_loss(
    objective: Any,
    params: Params,
    target: Array,
    z_t: Array,
    t: Array,
    cond: Cond,
    key: Array,
) -> tuple[Array, Metrics]:
    """Returns mean(weight(t) mean((x_student(z_t, t) - target)²)), and its metrics.

    Args:
      objective: has `weight`, `process` and `networks`.
      params: of the student.
      target: `[B, ...]`; no gradient flows into it.
      z_t, t, cond: of the student, `[B, ...]`.
      key: of dropout.
    """
    found = base.apply(objective, params, z_t, t, cond, key).x
    error = base.mean((found - jax.lax.stop_gradient(target)) ** 2)
    loss = weight(objective.weight, objective.process.schedule, t) * error
    metrics = {
        "loss": base.metric(loss),
        "loss_by_logsnr": base.by_logsnr(loss, objective.process, t),
        "mse": base.metric(error),
    }
    return loss.mean(), metrics


def count(number: Array) -> tuple[Array, Array]:
    """Returns (sum, count) of one number of a step, such as how many steps."""
    return jnp.asarray(number, jnp.float32), jnp.float32(1)


def weight(name: str, schedule: Schedule, t: Array) -> Array:
    """Returns a factor of `WEIGHTS` on an error of x, shaped as t."""
    return WEIGHTS[name](schedule.logsnr(t))


def check_sampler(objective: Any, sampler: Any) -> None:
    """Raises ValueError unless the sampler is DDIM, in the steps that are trained."""
    base.check_num_steps(objective, sampler)
    equal = isinstance(sampler, Ddim) and isinstance(
        sampler.grid or grids.Uniform(), grids.Uniform
    )
    if not equal or sampler.eta:
        raise ValueError(
            "name: this student makes equal steps of DDIM; use 'ddim' with eta 0 and "
            f"no grid, got {sampler}."
        )


def check_prediction(objective: Any) -> None:
    """Raises ValueError for a network that predicts eps: at t = 1 it says no x."""
    if getattr(objective.process, "prediction", "") == "eps":
        raise ValueError(
            "process.prediction: 'eps' says nothing about x from pure noise, where "
            "the first of a few steps is made; use 'v', 'x', 'edm' or 'velocity'."
        )


def teach_both(
    objective: Any, params: Mapping[str, Params], z_t: Array, t: Array, cond: Cond
) -> tuple[Prediction, Prediction]:
    """Returns the teacher's guided prediction, as `base.teach` does, and the plain one.

    One evaluation without guidance, two with it.
    """
    predict = functools.partial(objective.teacher.predict, params, z_t, t)
    plain = predict(cond)
    if objective.guidance_scale == 1.0:
        return plain, plain
    null = predict(guidance.with_null_label(cond, objective.spec))
    return guidance.extrapolate(null, plain, objective.guidance_scale), plain
