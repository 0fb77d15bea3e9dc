"""DDIM with an extrapolated noise prediction.

With rho = sigma / alpha and the prediction of the step before, at t_+:

    eps_bar = gamma eps_hat(t) + (1 - gamma) eps_hat(t_+)                           (1)
    z_s = alpha_s (z_t / alpha_t + (rho_s - rho_t) eps_bar)                         (2)

gamma = 1 is DDIM. On equal steps of rho, gamma = 3/2 is the Adams-Bashforth method of
order 2; every other gamma is of order 1. The source recommends 2, reading eps_hat as an
inexact direction to the data.

Source: Permenter and Yuan 2023 (arXiv 2306.04848), section 5, in the variables
z / alpha and rho.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from diffusionlab.samplers import base, grids, multistep
from diffusionlab.types import Array, Predict, Process


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientEstimation:
    """Equations 1 and 2; the first step is DDIM, the result the last x_hat.

    Attributes:
      num_steps: network evaluations.
      grid: the times; None is uniform.
      gamma: weight of the new prediction; the old one has 1 - gamma.

    Raises:
      ValueError: num_steps is below 1.
    """

    num_steps: int
    grid: grids.Grid | None = None
    gamma: float = 2.0

    times, final = base.times, base.final
    num_evaluations = base.one_per_step

    def __post_init__(self):
        base.check_num_steps(self.num_steps)

    def init(self, z: Array, t: Array) -> multistep.Memory:
        """Returns the state at z_t `[B, ...]`."""
        return multistep.remember(z, t, 1)

    def step(
        self,
        process: Process,
        predict: Predict,
        state: multistep.Memory,
        t: Array,
        s: Array,
        keys: Array,
    ) -> multistep.Memory:
        """Returns the state at s, both scalars; `keys` `[B]` is not used."""
        prediction = predict(state.z, t)
        _, sigma_s = process.schedule.alpha_sigma(s)
        # alpha_s (rho_s - rho_t); near t = 1 this form does not cancel.
        weight = -sigma_s * jnp.expm1(base.half_logsnr_step(process, t, s))
        (use,) = multistep.usable(state, s)
        z = multistep.combine(
            process.mix(*prediction, s),
            [jnp.where(use, weight * (1.0 - self.gamma), 0.0)],
            prediction.eps,
            state.past,
        )
        return multistep.after(state, z, prediction.x, prediction.eps, t)
