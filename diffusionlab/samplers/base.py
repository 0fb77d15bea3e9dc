"""The one loop over sampling steps, and what samplers share.

A sampler walks its times from noise, t_0 = 1 or near it, to data, t_N = 0. Whatever it
does in between, its last step goes straight to clean data: with rho = sigma / alpha,
every deterministic step is a discretisation of

    d(z / alpha) / d rho = eps_hat,   z_s ~ alpha_s x_hat + sigma_s eps_hat         (1)

and sigma -> 0 leaves the x_hat predicted at t_{N-1}, which is what `final` returns.
Sample i depends on `keys[i]` alone, not on the batch it is in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.samplers import grids
from diffusionlab.types import Array, Predict, Process, Sampler, Schedule


class State(NamedTuple):
    """The latent, and the clean data that the last step predicted; `[B, ...]` both."""

    z: Array
    x: Array


def times(sampler: Sampler, schedule: Schedule) -> np.ndarray:
    """Returns the times of a sampler with `num_steps` and `grid`, float32 `[N + 1]`.

    Raises:
      ValueError: the grid does not fit num_steps, or two stops fall together.
    """
    grid = sampler.grid or grids.Uniform()
    with jax.ensure_compile_time_eval():
        found = np.asarray(grid(schedule, sampler.num_steps), np.float32)
    if not np.all(np.diff(found) < 0):
        raise ValueError(
            f"grid: {sampler.num_steps} steps are too many, stops fall together in "
            "float32; use fewer steps or another grid."
        )
    return found


def init(sampler: Sampler, z: Array, t: Array) -> State:
    """Returns the state at z_t `[B, ...]` of a sampler without a memory."""
    return State(z, jnp.zeros_like(z))


def final(sampler: Sampler, state: Any) -> Array:
    """Returns the clean data that the last step predicted."""
    return state.x


# What a sampler that evaluates the network once per step says of itself.
one_per_step = property(lambda sampler: sampler.num_steps)


def is_last(s: Array) -> Array:
    """Whether a step to `s` ends at clean data: its result is `x` alone."""
    return s <= 0.0


def half_logsnr_step(process: Process, t: Array, s: Array) -> Array:
    """Returns h = (logsnr_s - logsnr_t) / 2, positive for s < t."""
    return 0.5 * (process.schedule.logsnr(s) - process.schedule.logsnr(t))


def ddim_weight(process: Process, t: Array, s: Array) -> Array:
    """Returns kappa = alpha_s - alpha_t sigma_s / sigma_t without cancellation.

    It is the weight of x_hat in z_s = (sigma_s / sigma_t) z_t + kappa x_hat.
    """
    alpha_s, _ = process.schedule.alpha_sigma(s)
    return -alpha_s * jnp.expm1(-half_logsnr_step(process, t, s))


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


def solve(
    sampler: Sampler,
    process: Process,
    predict: Predict,
    z: Array,
    times: np.ndarray,
    keys: Array,
) -> Any:
    """Returns the sampler's state after it went through `times` from z.

    One scan over the steps: the network is traced once per evaluation of a step, and no
    trajectory is kept.

    Args:
      sampler: its `num_steps` and grid are not looked at.
      process: knows the schedule.
      predict: `(z_t, t) -> Prediction`, with t a float32 scalar, or `[B]` from a
        sampler whose examples have times of their own.
      z: `[B, ...]`, the latent at times[0].
      times: `[N + 1]`; ascending ones run a deterministic sampler towards noise.
      keys: `[B]` typed keys, one per sample.
    """
    times = jnp.asarray(times, jnp.float32)

    def body(state, step):
        index, t, s = step
        # Use 0 of a sample's key is its z_1; use i + 1 is the noise of step i.
        step_keys = fold(keys, index + 1)
        return sampler.step(process, predict, state, t, s, step_keys), None

    steps = (jnp.arange(len(times) - 1), times[:-1], times[1:])
    state, _ = jax.lax.scan(body, sampler.init(z, times[0]), steps)
    return state


def sample(
    sampler: Sampler,
    process: Process,
    predict: Predict,
    keys: Array,
    shape: tuple[int, ...],
    noise: Array | None = None,
) -> Array:
    """Returns samples `[B, *shape]`, float32.

    Args:
      sampler: says its times, steps through them and reads the result.
      process: draws the first latent and knows the schedule.
      predict: `(z_t, t) -> Prediction`, with t a float32 scalar.
      keys: `[B]` typed keys, one per sample.
      shape: of one sample.
      noise: `[B, *shape]`, standard normal, that the first latent is made of; None
        draws it from the keys.
    """
    sampler_times = sampler.times(process.schedule)
    if noise is None:
        z = process.prior_from(fold(keys, 0), shape, sampler_times[0])
    else:
        z = process.prior_std(sampler_times[0]) * noise
    return sampler.final(solve(sampler, process, predict, z, sampler_times, keys))
