"""Ancestral sampling: z_s is drawn from q(z_s | z_t, x_hat), its variance interpolated.

With c = 1 - exp(logsnr_t - logsnr_s):

    mean = alpha_s (z_t (1 - c) / alpha_t + c x_hat)
    var = c sigma_s^(2 (1 - gamma)) (sigma_t² q_s / q_t)^gamma

with q = alpha² d² + sigma² and d = sigma_data, which is 1 where variance is preserved
and d = 1: the published form. See `processes/gaussian.py`.

Source: Ho, Jain and Abbeel 2020 (arXiv 2006.11239), algorithm 2, for gamma = 0 and 1;
Hoogeboom, Heek and Salimans 2023 (arXiv 2301.11093) for gamma in between.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from diffusionlab.samplers import base, grids
from diffusionlab.types import Array, Predict, Process


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral:
    """`num_steps` steps with fresh noise; the result is the x_hat of the last one.

    Attributes:
      num_steps: network evaluations.
      grid: the times; None is uniform.
      noise_exponent: gamma. 0 is the posterior given x, which ends with too little
        variance; 1 is exact for N(0, sigma_data² I) data,
        and the variance of the forward step where q is 1.

    Raises:
      ValueError: num_steps is below 1, or noise_exponent outside [0, 1].
    """

    num_steps: int
    grid: grids.Grid | None = None
    noise_exponent: float = 0.3

    times, init, final = base.times, base.init, base.final
    num_evaluations = base.one_per_step

    def __post_init__(self):
        base.check_num_steps(self.num_steps)
        if not 0 <= self.noise_exponent <= 1:
            raise ValueError(
                f"noise_exponent: must be in [0, 1], got {self.noise_exponent}."
            )

    def step(
        self,
        process: Process,
        predict: Predict,
        state: base.State,
        t: Array,
        s: Array,
        keys: Array,
    ) -> base.State:
        """Returns the state at s < t, both scalars; `keys` is `[B]`."""
        prediction = predict(state.z, t)
        mean, variance = process.posterior(
            prediction, state.z, t, s, self.noise_exponent
        )
        noise = base.normal(keys, state.z.shape[1:])
        return base.State(mean + jnp.sqrt(variance) * noise, prediction.x)
