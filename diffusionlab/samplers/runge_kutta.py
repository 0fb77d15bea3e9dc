"""Runge and Kutta's method of order 4 on the probability-flow ODE.

With rho = sigma / alpha, each step solves

    d(z / alpha) / d rho = eps_hat                                                  (1)

with slopes at rho_t, twice at the middle of rho, and at rho_s:

    z_s = alpha_s (z_t / alpha_t + (rho_s - rho_t) (k_1 + 2 k_2 + 2 k_3 + k_4) / 6) (2)

Source: Kutta 1901; Karras et al. 2022 (arXiv 2206.00364), equation 4, for (1).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffusionlab.samplers import base, grids, stability
from diffusionlab.types import Array, DataSpec, Predict, Prediction, Process


@dataclasses.dataclass(frozen=True, kw_only=True)
class RungeKutta4:
    """Equation 2; the result is the x_hat of the last step.

    `check` refuses steps that blow up gaussian data, see `stability`: few of them where
    rho falls by a large factor in one, as near t = 1 on a uniform grid.

    Attributes:
      num_steps: steps; four network evaluations each, the last one has one.
      grid: the times; None is uniform.

    Raises:
      ValueError: num_steps is below 1.
    """

    num_steps: int
    grid: grids.Grid | None = None

    times, init, final = base.times, base.init, base.final

    def __post_init__(self):
        base.check_num_steps(self.num_steps)

    @property
    def num_evaluations(self) -> int:
        """Network evaluations of one sample."""
        return 4 * self.num_steps - 3

    def check(self, process: Process, spec: DataSpec) -> None:
        """Raises ValueError where the steps blow up gaussian data."""
        exact, one = stability.denoiser(process), jnp.float32(1.0)

        def factor(t, s):
            state = self.init(one, t)
            return self.step(process, exact, state, t, s, None).z, jnp.zeros_like(t)

        times = self.times(process.schedule)
        ratios = stability.variance_ratios(process, times, jax.vmap(factor))
        stability.refuse(ratios)

    def step(
        self,
        process: Process,
        predict: Predict,
        state: base.State,
        t: Array,
        s: Array,
        keys: Array,
    ) -> base.State:
        """Returns the state at s, both scalars; `keys` `[B]` is not used."""
        prediction = predict(state.z, t)
        middle = _middle(process, t, s)

        def fourth(prediction: Prediction) -> Array:
            first = prediction.eps
            second = predict(_move(process, prediction, first, t, middle), middle).eps
            third = predict(_move(process, prediction, second, t, middle), middle).eps
            last = predict(_move(process, prediction, third, t, s), s).eps
            slope = (first + 2.0 * second + 2.0 * third + last) / 6.0
            return _move(process, prediction, slope, t, s)

        def euler(prediction: Prediction) -> Array:
            return process.mix(*prediction, s)

        z = jax.lax.cond(base.is_last(s), euler, fourth, prediction)
        return base.State(z, prediction.x)


def _middle(process: Process, t: Array, s: Array) -> Array:
    """Returns the time at which rho is the mean of rho_t and rho_s."""
    change = jnp.expm1(-base.half_logsnr_step(process, t, s))
    logsnr = process.schedule.logsnr(t) - 2.0 * jnp.log1p(0.5 * change)
    return process.schedule.inverse(logsnr)


def _move(process, prediction: Prediction, slope: Array, t: Array, s: Array) -> Array:
    """Returns z_s of (2) for one slope."""
    # alpha_s (rho_s - rho_t) = -sigma_s (e^h - 1). The terms of (2) are huge near t = 1
    # and cancel; x_hat and eps_hat, and the difference of two slopes, are not.
    _, sigma_s = process.schedule.alpha_sigma(s)
    weight = -sigma_s * jnp.expm1(base.half_logsnr_step(process, t, s))
    return process.mix(*prediction, s) + weight * (slope - prediction.eps)
