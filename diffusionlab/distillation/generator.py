"""Generators: students whose every x_hat is a sample, and what they start from.

A generator of k steps predicts x at its times t_1 > ... > t_k, from noise at t_1 and
from its own sample with fresh noise added at the others:

    z_{t_1} = std(t_1) eps_1,   z_{t_j} = alpha x_hat_{j-1} + sigma eps_j           (1)

t_1 has the logsnr `first_logsnr` and t_j = t_1 (k - j + 1) / k. It is trained at one of
these times per example, its own earlier steps being run first, without a gradient
("backward simulation"); with k = 1 there are none. Of the data, the labels are used.

Of k steps the samples are those of k generators. One score for all of them, as in the
literature, is content when their mixture is the data: early samples may be too wide
where the last are too narrow. A network with `conditions=('start_logsnr',)`, as in the
configs, is told which step a sample is of, and every step has a score of its own.

What may teach it is the difference of two scores at its noisy samples z_t, the
teacher's and its own, which a network `aux` has learned, see `fake_score`:

    sigma D = sigma (score_teacher - score_aux) = eps_hat_aux - eps_hat_teacher
            = (alpha / sigma) (x_hat_teacher - x_hat_aux)                           (2)

Source: Yin et al. 2024, DMD2 (arXiv 2405.14867), section 4.5, for (1); Xie et al. 2024,
EM Distillation (arXiv 2405.16852), for the fixed first noise level; Luo et al. 2023,
Diff-Instruct (arXiv 2305.18455), for (2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusionlab.distillation import base
from diffusionlab.samplers import grids
from diffusionlab.types import (
    Array,
    Cond,
    Params,
    Prediction,
    Process,
    lift,
)


class Start(NamedTuple):
    """Where a generator's step starts: z_t = center + scale noise.

    Attributes:
      center: `[B, ...]`, without a gradient; zero in the first step.
      scale: `[B]`.
      noise: `[B, ...]`, standard normal.
      t: `[B]`.
    """

    center: Array
    scale: Array
    noise: Array
    t: Array

    @property
    def z_t(self) -> Array:
        return self.center + lift(self.scale, self.noise.ndim) * self.noise


def check(objective: Any) -> None:
    """Raises ValueError unless `first_logsnr` is a noise level of the schedule."""
    base.check_at_least(objective, 1, "num_steps")
    try:
        times(objective)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("grid.")) from None


def check_sampler(objective: Any, sampler: Any) -> None:
    """Raises ValueError unless the sampler makes equation 1 at the times trained."""
    base.check_num_steps(objective, sampler)
    base.check_consistency(sampler)
    with jax.ensure_compile_time_eval():
        found = jnp.asarray(sampler.times(objective.process.schedule))
        same = jnp.allclose(found, times(objective), atol=1e-6)
    if not same:
        raise ValueError(
            "grid: config.objective trains the times "
            f"{[round(float(t), 4) for t in times(objective)]}, and the sampler makes "
            f"{[round(float(t), 4) for t in found]}; use the grid "
            f"{{'name': 'from', 'first_logsnr': {objective.first_logsnr}}}."
        )


def times(objective: Any) -> Array:
    """Returns t_1 ... t_k and 0, `[k + 1]`."""
    with jax.ensure_compile_time_eval():
        grid = grids.From(first_logsnr=objective.first_logsnr)
        return jnp.asarray(grid(objective.process.schedule, objective.num_steps))


def start(
    objective: Any, params: Params, key: Array, shape: tuple, cond: Cond
) -> Start:
    """Returns a step of the generator for each example, uniform over its steps.

    Args:
      objective: has `num_steps`, `first_logsnr`, `process` and `networks`.
      params: of the student; no gradient flows.
      key: of this use.
      shape: `[B, ...]`.
      cond: what the student conditions on.
    """
    process: Process = objective.process
    stops, number = times(objective), objective.num_steps
    which_key, noise_key = jax.random.split(key)
    which = jax.random.randint(which_key, shape[:1], 0, number)

    def begin(j: int, center: Array, scale: Array) -> Start:
        noise = jax.random.normal(jax.random.fold_in(noise_key, j), shape)
        size = shape[:1]
        return Start(center, jnp.full(size, scale), noise, jnp.full(size, stops[j]))

    found = now = begin(0, jnp.zeros(shape), process.prior_std(stops[0]))
    for j in range(1, number):
        x = generate(objective, jax.lax.stop_gradient(params), now, cond)
        alpha, sigma = process.schedule.alpha_sigma(stops[j])
        now = begin(j, alpha * x, sigma)
        found = jax.tree.map(
            lambda old, new, here=which == j: jnp.where(lift(here, new.ndim), new, old),
            found,
            now,
        )
    return jax.lax.stop_gradient(found)


def generate(
    objective: Any, params: Params, start: Start, cond: Cond, key: Array | None = None
) -> Array:
    """Returns the samples `[B, ...]` of a step; gradients flow into `params`."""
    cond = told(objective, start, cond)
    return base.apply(objective, params, start.z_t, start.t, cond, key).x


def told(objective: Any, start: Start, cond: Cond) -> Cond:
    """Returns cond with the logsnr that a step starts from, `[B]`."""
    return {**cond, base.START: objective.process.schedule.logsnr(start.t)}


def score_gap(
    process: Process, teacher: Prediction, own: Prediction, t: Array
) -> Array:
    """Returns sigma D of equation 2, `[B, ...]`, without cancellation at either end.

    Args:
      teacher, own: predictions at the same z_t.
      t: `[B]`.
    """
    half = lift(0.5 * process.schedule.logsnr(t), own.x.ndim)
    # exp(half) is large where eps is known to more digits than x, and the other form
    # is taken there.
    from_x = jnp.exp(jnp.minimum(half, 0.0)) * (teacher.x - own.x)
    return jnp.where(half < 0.0, from_x, own.eps - teacher.eps)
