"""What the schedules share: logsnr to scales, and a numerical inverse.

Variance preserving, alpha² + sigma² = 1:

    alpha² = sigmoid(logsnr),   sigma² = sigmoid(-logsnr)                          (1)
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusionlab.types import Array

_HALVINGS = 40  # t reaches float32 precision down to t = 1e-5, far below any step


def float32(q: Array) -> Array:
    """Returns `q` as float32: a schedule computes in float32 whatever comes in."""
    return jnp.asarray(q, jnp.float32)


def alpha_sigma(logsnr: Array) -> tuple[Array, Array]:
    """Returns (alpha, sigma) of equation 1, exact far into both tails."""
    return (
        jnp.exp(0.5 * jax.nn.log_sigmoid(logsnr)),
        jnp.exp(0.5 * jax.nn.log_sigmoid(-logsnr)),
    )


def bisect(logsnr: Callable[[Array], Array], value: Array) -> Array:
    """Returns t with logsnr(t) = value, for a strictly decreasing `logsnr`.

    Args:
      logsnr: function of t in [0, 1].
      value: any shape; outside the range of `logsnr` the nearer end is returned.
    """
    value = float32(value)

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        later = logsnr(middle) > value
        return jnp.where(later, middle, low), jnp.where(later, high, middle)

    bounds = jnp.zeros_like(value), jnp.ones_like(value)
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, bounds)
    return 0.5 * (low + high)


def check_range(logsnr_min: float, logsnr_max: float) -> None:
    """Raises ValueError unless logsnr_min < logsnr_max."""
    if not logsnr_min < logsnr_max:
        raise ValueError(
            f"logsnr_min: must be below logsnr_max = {logsnr_max}, got {logsnr_min}."
        )


def check_levels(sigma_min: float, sigma_max: float) -> None:
    """Raises ValueError unless 0 < sigma_min < sigma_max."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            "sigma_min: expected 0 < sigma_min < sigma_max, got "
            f"{sigma_min} and {sigma_max}."
        )
