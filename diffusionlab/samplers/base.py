"""The one loop over sampling steps, and what samplers share.

A sampler walks the uniform grid t_i = (N - i) / N from t_0 = 1, noise, to t_N = 0.
Sample i depends on `keys[i]` alone, not on the batch it is in.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.types import Array, Predict, Process, Sampler


class State(NamedTuple):
    """The latent, and the clean data that the last step predicted; `[B, ...]` both."""

    z: Array
    x: Array


def grid(num_steps: int) -> np.ndarray:
    """Returns the times from 1 to 0, float32 `[num_steps + 1]`."""
    return np.arange(num_steps, -1, -1, dtype=np.float32) / np.float32(num_steps)


def normal(keys: Array, shape: tuple[int, ...]) -> Array:
    """Returns float32 noise `[B, *shape]`, example i from `keys[i]`."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def fold(keys: Array, use: Array | int) -> Array:
    """Returns keys `[B]` for one use of each of `keys` `[B]`."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, use)


def check_num_steps(num_steps: int) -> None:
    """Raises ValueError unless num_steps is at least 1."""
    if num_steps < 1:
        raise ValueError(f"num_steps: must be at least 1, got {num_steps}.")


def sample(
    sampler: Sampler,
    process: Process,
    predict: Predict,
    keys: Array,
    shape: tuple[int, ...],
) -> Array:
    """Returns samples `[B, *shape]`, float32.

    One scan over the steps: the network is traced once and no trajectory is kept.

    Args:
      sampler: its `num_steps` sets the grid.
      process: draws z_1 and knows the schedule.
      predict: `(z_t, t) -> Prediction`, with t a float32 scalar.
      keys: `[B]` typed keys, one per sample.
      shape: of one sample.
    """
    times = grid(sampler.num_steps)
    # Use 0 of a sample's key is its z_1; use i + 1 is the noise of step i.
    z = process.prior_from(fold(keys, 0), shape)

    def body(state, step):
        index, t, s = step
        step_keys = fold(keys, index + 1)
        return sampler.step(process, predict, state, t, s, step_keys), None

    steps = (jnp.arange(sampler.num_steps), jnp.array(times[:-1]), jnp.array(times[1:]))
    state = sampler.init(z, jnp.float32(1.0))
    state, _ = jax.lax.scan(body, state, steps)
    return sampler.final(state)
