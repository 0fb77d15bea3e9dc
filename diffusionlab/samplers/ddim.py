"""DDIM: a step keeps the predicted noise, or exchanges a part of it for fresh noise.

With c = 1 - exp(logsnr_t - logsnr_s), the variance of q(z_s | z_t, x) is sigma_s² c:

    z_s = alpha_s x_hat + sigma_s (sqrt(1 - eta² c) eps_hat + eta sqrt(c) noise)    (1)

eta = 0 is deterministic; eta = 1 is ancestral sampling with noise exponent 0.

Source: Song, Meng and Ermon 2021 (arXiv 2010.02502), equations 12 and 16.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from diffusionlab.samplers import base, grids
from diffusionlab.types import Array, Predict, Prediction, Process


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ddim:
    """Equation 1; the result is the x_hat of the last step.

    Attributes:
      num_steps: network evaluations.
      grid: the times; None is uniform.
      eta: share of fresh noise, in [0, 1].

    Raises:
      ValueError: num_steps is below 1, or eta outside [0, 1].
    """

    num_steps: int
    grid: grids.Grid | None = None
    eta: float = 0.0

    times, init, final = base.times, base.init, base.final
    num_evaluations = base.one_per_step

    def __post_init__(self):
        base.check_num_steps(self.num_steps)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta: must be in [0, 1], got {self.eta}.")

    def step(
        self,
        process: Process,
        predict: Predict,
        state: base.State,
        t: Array,
        s: Array,
        keys: Array,
    ) -> base.State:
        """Returns the state at s, both scalars; `keys` `[B]` is used for eta > 0."""
        x, eps = predict(state.z, t)
        if self.eta:
            twice = 2.0 * base.half_logsnr_step(process, t, s)
            # 1 - eta² c, where c rounds to 1 on a long step.
            keep = (1.0 - self.eta**2) + self.eta**2 * jnp.exp(-twice)
            fresh = -(self.eta**2) * jnp.expm1(-twice)
            noise = base.normal(keys, state.z.shape[1:])
            eps = jnp.sqrt(keep) * eps + jnp.sqrt(fresh) * noise
        return base.State(process.mix(*Prediction(x, eps), s), x)
