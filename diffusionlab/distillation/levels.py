"""Pairs of neighbouring noise levels, for consistency models in discrete time.

With S = sigma / alpha, a pair is (t, s) with S_t > S_s. There are N pairs on a grid:
its stops, the last one t = 0, are taken two by two, pair n with probability 1 / N or,
with Phi the normal distribution function,

    p(n) ~ Phi((log S_t - mean) / std) - Phi((log S_s - mean) / std)                (1)

Or t is any time, with log S_t ~ N(mean, std²), and s follows from a ratio:

    S_s = (1 - 1 / N) S_t                                                           (2)

N grows over training, from `first` by the factor `growth` up to `last`:

    N(k) = min(first growth^floor(k / K'), last),
    K' = floor(K / (log_growth(last / first) + 1))                                  (3)

(2) with first = 1 starts at s = 0, which is denoising.

Source: Song and Dhariwal 2023 (arXiv 2310.14189), section 3.4 and 3.5, for (1) and (3),
where N + 1 levels are counted; Geng et al. 2024, ECT (arXiv 2406.14548), for (2).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.samplers import grids
from diffusionlab.schedules import times
from diffusionlab.types import Array, Schedule


class Curriculum(NamedTuple):
    """Equation 3.

    Attributes:
      first, last: numbers of pairs.
      growth: from one stage to the next; above 1.
      num_steps: K, the optimiser steps it is stretched over.
    """

    first: int
    last: int
    growth: float = 2.0
    num_steps: int = 1

    def check(self) -> None:
        """Raises ValueError unless 1 <= first <= last, growth > 1 and num_steps > 0."""
        if not 1 <= self.first <= self.last:
            raise ValueError(
                "first_levels: expected 1 <= first_levels <= last_levels, got "
                f"{self.first} and {self.last}."
            )
        if self.growth <= 1:
            raise ValueError(f"growth: must be above 1, got {self.growth}.")
        if self.num_steps < 1:
            raise ValueError(
                f"curriculum_steps: must be at least 1, got {self.num_steps}."
            )

    @property
    def counts(self) -> tuple[int, ...]:
        """N of every stage."""
        found = [self.first]
        while found[-1] < self.last:
            grown = round(self.first * self.growth ** len(found))
            found.append(min(max(grown, found[-1] + 1), self.last))
        return tuple(found)

    @property
    def stage_steps(self) -> int:
        """K' of equation 3, at least 1."""
        stages = math.log(self.last / self.first) / math.log(self.growth) + 1
        return max(math.floor(self.num_steps / stages + 1e-9), 1)

    def stage(self, step: Array) -> Array:
        """Returns the index into `counts` at an optimiser step, int32."""
        return jnp.minimum(step // self.stage_steps, len(self.counts) - 1)


class Table(NamedTuple):
    """The grid of every stage; rows are padded with t = 0.

    Attributes:
      stops: `[stages, N_max + 1]` times, falling to 0.
      upper: `[stages, N_max]` probability of a pair or of one before it; from the
        last pair on above 1.
    """

    stops: Array
    upper: Array


def level(schedule: Schedule, t: Array) -> Array:
    """Returns S = sigma / alpha, shaped as t, and 0 at t = 0, which is clean data."""
    return jnp.where(t > 0, jnp.exp(-0.5 * schedule.logsnr(t)), 0.0)


def table(
    schedule: Schedule,
    grid: grids.Grid | None,
    counts: tuple[int, ...],
    mean: float | None,
    std: float,
) -> Table:
    """Returns the grids of stages with `counts` pairs.

    Args:
      schedule: of the process.
      grid: None is `grids.Rho()`.
      counts: pairs of each stage.
      mean, std: of equation 1; mean None is every pair alike.

    Raises:
      ValueError: stops of the grid fall together; names `grid`.
    """
    stops = np.zeros((len(counts), max(counts) + 1), np.float32)
    upper = np.full((len(counts), max(counts)), 2.0, np.float32)
    with jax.ensure_compile_time_eval():
        for row, number in enumerate(counts):
            found = np.asarray((grid or grids.Rho())(schedule, number), np.float32)
            if not np.all(np.diff(found) < 0):
                raise ValueError(
                    f"grid: {number} levels are too many, stops fall together in "
                    "float32; use fewer levels or another grid."
                )
            stops[row, : number + 1] = found
            share = np.full(number, 1.0 / number)
            if mean is not None:
                logs = jnp.log(level(schedule, jnp.asarray(found)))
                share = -np.diff(jax.scipy.special.ndtr((logs - mean) / std))
            upper[row, : number - 1] = (np.cumsum(share) / np.sum(share))[:-1]
    return Table(jnp.asarray(stops), jnp.asarray(upper))


def draw(key: Array, size: int, found: Table, stage: Array) -> tuple[Array, Array]:
    """Returns pairs (t, s), `[B]` each, stratified over the batch."""
    quantile = times.quantiles(key, size, True)
    pair = jnp.sum(quantile[:, None] >= found.upper[stage], axis=1)
    stops = found.stops[stage]
    return stops[pair], stops[pair + 1]


def draw_ratio(
    key: Array, size: int, schedule: Schedule, number: Array, mean: float, std: float
) -> tuple[Array, Array]:
    """Returns pairs (t, s) of equation 2 with N = `number`, `[B]` each."""
    t, _ = times.LogNormal(mean=mean, std=std).sample(key, size, schedule)
    # Where N = 1 the logarithm would be infinite.
    change = jnp.log1p(-1.0 / jnp.maximum(number, 2.0))
    s = schedule.inverse(schedule.logsnr(t) - 2.0 * change)
    return t, jnp.where(number > 1, jnp.minimum(s, t), 0.0)


def gap(schedule: Schedule, t: Array, s: Array) -> Array:
    """Returns S_t - S_s, `[B]`, without cancellation; positive."""
    clean = s <= 0
    half = 0.5 * (schedule.logsnr(t) - schedule.logsnr(jnp.where(clean, t, s)))
    share = jnp.where(clean, 1.0, -jnp.expm1(half))
    return share * jnp.exp(-0.5 * schedule.logsnr(t))


def check_start(objective: Any, sampler: Any, first: float) -> None:
    """Raises ValueError for a sampler that starts noisier than `first` was trained."""
    schedule = objective.process.schedule
    start = float(sampler.times(schedule)[0])
    if start > first + 1e-6:
        with jax.ensure_compile_time_eval():
            logsnr = float(schedule.logsnr(jnp.float32(first)))
        raise ValueError(
            f"grid: starts at t = {start:.6g}, and training at {first:.6g}; use the "
            f"grid {{'name': 'from', 'first_logsnr': {logsnr:.4f}}}."
        )
