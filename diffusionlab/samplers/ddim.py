"""DDIM, deterministic: z_s = alpha_s x_hat + sigma_s eps_hat.

Source: Song, Meng and Ermon 2021 (arXiv 2010.02502), equation 12 with eta = 0.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from diffusionlab.samplers import base
from diffusionlab.types import Array, Predict, Process


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ddim:
    """`num_steps` steps without noise; the result is the x_hat of the last one.

    Attributes:
      num_steps: network evaluations.

    Raises:
      ValueError: num_steps is below 1.
    """

    num_steps: int

    def __post_init__(self):
        base.check_num_steps(self.num_steps)

    def init(self, z: Array, t: Array) -> base.State:
        """Returns the state at z_1 `[B, ...]`."""
        return base.State(z, jnp.zeros_like(z))

    def step(
        self,
        process: Process,
        predict: Predict,
        state: base.State,
        t: Array,
        s: Array,
        keys: Array,
    ) -> base.State:
        """Returns the state at s < t, both scalars; `keys` is not used."""
        prediction = predict(state.z, t)
        return base.State(process.mix(*prediction, s), prediction.x)

    def final(self, state: base.State) -> Array:
        """Returns the last predicted clean data."""
        return state.x
