"""Restart: Heun's steps towards data, and intervals that are walked again with noise.

Heun's steps go down a grid of times. Where they come to the low end of an interval
[sigma_min, sigma_max] of noise levels S = sigma / alpha, the sampler goes up to its
high end by the forward process, which draws anew what the steps got wrong there,

    z_s = (alpha_s / alpha_t) z_t + sigma_s sqrt(1 - exp(logsnr_s - logsnr_t)) noise,
    s > t                                                                           (1)

and down again in `num_steps` Heun steps, `repeats` times. The levels on the way down
are those of EDM between the two ends, (high^(1/7) + j/n (low^(1/7) - high^(1/7)))^7.

All of it is one flat list of times: where it ascends, the step is (1).

Source: Xu, Deng, Cheng, Tian, Liu and Jaakkola 2023 (arXiv 2306.14878), algorithm 1.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.samplers import base, grids, stability
from diffusionlab.samplers.edm import heun_factor, heun_step
from diffusionlab.types import Array, DataSpec, Predict, Process, Schedule

_RHO = 7.0


class Interval(NamedTuple):
    """One entry of `restarts`: noise levels, steps down, and how often."""

    sigma_min: float
    sigma_max: float
    num_steps: int
    repeats: int


def forward(process: Process, t: Array, s: Array) -> tuple[Array, Array]:
    """Returns the factors of z_t and of the noise in equation 1, for s >= t."""
    alpha_t, _ = process.schedule.alpha_sigma(t)
    alpha_s, sigma_s = process.schedule.alpha_sigma(s)
    # 2 h of the step from s back to t is logsnr_t - logsnr_s, positive for s > t.
    replaced = -jnp.expm1(-2.0 * base.half_logsnr_step(process, s, t))
    return alpha_s / alpha_t, sigma_s * jnp.sqrt(jnp.maximum(replaced, 0.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restart:
    """Heun with restarts; the result is the x_hat of the last step.

    Attributes:
      num_steps: steps of the main grid, to which the low end of every interval is
        added as one more stop; the steps of the intervals come on top.
      grid: the main grid; None is uniform.
      restarts: (sigma_min, sigma_max, num_steps, repeats) of each interval, in levels
        sigma / alpha. Intervals with no repeats change nothing.

    Raises:
      ValueError: num_steps is below 1, or an entry of `restarts` is none.
    """

    num_steps: int
    grid: grids.Grid | None = None
    restarts: tuple = ((0.06, 0.3, 4, 2),)

    init, final = base.init, base.final

    def __post_init__(self):
        base.check_num_steps(self.num_steps)
        for entry in self.restarts:
            if not isinstance(entry, list | tuple) or len(entry) != 4:
                raise ValueError(
                    "restarts: expected (sigma_min, sigma_max, num_steps, repeats), "
                    f"got {entry!r}."
                )
            low, high, num_steps, repeats = entry
            if not 0 < low < high:
                raise ValueError(
                    f"restarts: expected 0 < sigma_min < sigma_max, got {entry}."
                )
            if num_steps < 1 or repeats < 0:
                raise ValueError(
                    "restarts: expected at least 1 step and 0 repeats, got "
                    f"{tuple(entry)}."
                )

    @property
    def _intervals(self) -> tuple[Interval, ...]:
        return tuple(q for q in (Interval(*r) for r in self.restarts) if q.repeats)

    @property
    def num_evaluations(self) -> int:
        """Two for each step down, but one for the last; none for a step up."""
        stops = self.num_steps + len({q.sigma_min for q in self._intervals})
        walked = sum(q.num_steps * q.repeats for q in self._intervals)
        return 2 * (stops + walked) - 1

    def times(self, schedule: Schedule) -> np.ndarray:
        """Returns the flat list of times, float32, ascending where noise is added.

        Raises:
          ValueError: the grid does not fit num_steps, or the schedule does not have
            the levels of an interval strictly inside its range.
        """
        main = base.times(self, schedule)
        loops: dict[np.float32, list] = {}
        for interval in self._intervals:
            down = _descent(interval, schedule)
            loops.setdefault(down[-1], []).extend([*down] * interval.repeats)
        stops = np.sort(np.append(main, np.float32([*loops])))[::-1]
        found = []
        for t in stops:
            found.append(t)
            # A low end that is a stop of the main grid too is there twice, but walked
            # once; the step in between has no length.
            found.extend(loops.pop(t, ()))
        return np.asarray(found, np.float32)

    def check(self, process: Process, spec: DataSpec) -> None:
        """Raises ValueError where the steps blow up gaussian data."""

        def factor(t, s):
            ratio, scale = forward(process, t, s)
            up = s > t
            down = heun_factor(process, t, s)
            return jnp.where(up, ratio, down), jnp.where(up, scale, 0.0)

        times = self.times(process.schedule)
        stability.refuse(stability.variance_ratios(process, times, factor))

    def step(
        self,
        process: Process,
        predict: Predict,
        state: base.State,
        t: Array,
        s: Array,
        keys: Array,
    ) -> base.State:
        """Returns the state at s; `keys` `[B]` is used for s > t, equation 1."""

        def up(z):
            factor, scale = forward(process, t, s)
            noise = base.normal(keys, z.shape[1:])
            return base.State(factor * z + scale * noise, state.x)

        def down(z):
            return heun_step(process, predict, z, t, s)

        return jax.lax.cond(s > t, up, down, state.z)


def _descent(interval: Interval, schedule: Schedule) -> np.ndarray:
    """Returns the times of an interval from high to low, `[num_steps + 1]`."""
    with jax.ensure_compile_time_eval():
        ends = np.float64(schedule.logsnr(jnp.float32([0.0, 1.0])))
        cleanest, noisiest = (math.exp(-0.5 * logsnr) for logsnr in ends)
        # The ends are rounded to float32, so the noisiest level itself is accepted.
        if not cleanest < interval.sigma_min < interval.sigma_max <= noisiest * 1.0001:
            raise ValueError(
                f"restarts: the levels {interval.sigma_min} to {interval.sigma_max} "
                f"must lie inside those of the schedule, {cleanest:.4g} to "
                f"{noisiest:.4g}."
            )
        ends = np.array([interval.sigma_max, interval.sigma_min]) ** (1 / _RHO)
        roots = np.linspace(*ends, interval.num_steps + 1)
        down = np.asarray(schedule.inverse(jnp.float32(-2 * _RHO * np.log(roots))))
    if not (np.all(np.diff(down) < 0) and down[-1] > 0):
        raise ValueError(
            f"restarts: {interval.num_steps} steps between the levels "
            f"{interval.sigma_min} and {interval.sigma_max} are too close for float32 "
            "times of this schedule."
        )
    return down
