"""The chain of DDPM as a schedule: exact at its steps, straight lines between them.

    beta_k, k = 0 ... K-1, from beta_start to beta_end with equal steps in
        linear:         beta_k
        scaled_linear:  sqrt(beta_k)
    alpha_k² = prod_{j <= k} (1 - beta_j),   logsnr_k = log(alpha_k² / (1 - alpha_k²))
    logsnr(t) = logsnr_k at t = k / (K - 1), linear in t in between                 (1)

Training on this chain and nothing else is the law of times `discrete` with the same K.
The table is computed on the host in float64.

Source: Ho, Jain and Abbeel 2020 (arXiv 2006.11239), section 4, for the linear form;
Rombach et al. 2022 (arXiv 2112.10752) for the scaled one, whose constants are
beta_start=0.00085, beta_end=0.012.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from diffusionlab.schedules import base
from diffusionlab.types import Array

_POWERS = {"linear": 1.0, "scaled_linear": 2.0}


@functools.cache
def _table(num_timesteps: int, beta_start: float, beta_end: float, power: float):
    """Returns logsnr_k `[K]` and its differences `[K - 1]`, both float32."""
    roots = np.linspace(
        beta_start ** (1 / power), beta_end ** (1 / power), num_timesteps
    )
    log_square = np.cumsum(np.log1p(-(roots**power)))
    logsnr = log_square - np.log(-np.expm1(log_square))
    return np.float32(logsnr), np.float32(np.diff(logsnr))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscreteBeta:
    """Equation 1; variance preserving.

    Attributes:
      num_timesteps: K, steps of the chain.
      beta_start, beta_end: variance that the first and the last step add.
      spacing: 'linear' or 'scaled_linear'.

    Raises:
      ValueError: fewer than 2 steps, not 0 < beta_start <= beta_end < 1, or `spacing`
        is another word.
    """

    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    spacing: str = "linear"

    def __post_init__(self):
        if self.num_timesteps < 2:
            raise ValueError(
                f"num_timesteps: must be at least 2, got {self.num_timesteps}."
            )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                "beta_start: expected 0 < beta_start <= beta_end < 1, got "
                f"{self.beta_start} and {self.beta_end}."
            )
        if self.spacing not in _POWERS:
            raise ValueError(
                f"spacing: expected one of {', '.join(_POWERS)}, got {self.spacing!r}."
            )

    @property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        power = _POWERS[self.spacing]
        return _table(self.num_timesteps, self.beta_start, self.beta_end, power)

    def _place(self, t: Array) -> tuple[Array, Array]:
        """The interval of t, and how far into it t is, up to rounding in [0, 1]."""
        position = base.float32(t) * (self.num_timesteps - 1)
        # A step of the chain belongs to the interval after it, however t was rounded.
        index = jnp.floor(position + 2.0**-22 * self.num_timesteps)
        index = jnp.clip(index, 0, self.num_timesteps - 2)
        return index.astype(jnp.int32), position - index

    def logsnr(self, t: Array) -> Array:
        """Returns float32 logsnr, shaped as t."""
        index, fraction = self._place(t)
        logsnr, step = (jnp.asarray(table)[index] for table in self._tables)
        return logsnr + fraction * step

    def derivative(self, t: Array) -> Array:
        """Returns d logsnr / d t, negative, shaped as t; on a step, that after it."""
        index, _ = self._place(t)
        return (self.num_timesteps - 1) * jnp.asarray(self._tables[1])[index]

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        """Returns (alpha, sigma), alpha² + sigma² = 1, each shaped as t."""
        return base.alpha_sigma(self.logsnr(t))

    def inverse(self, logsnr: Array) -> Array:
        """Returns t in [0, 1]; beyond an end of the range it is that end."""
        value, (table, step) = base.float32(logsnr), self._tables
        index = jnp.searchsorted(-jnp.asarray(table), -value, side="right") - 1
        index = jnp.clip(index, 0, self.num_timesteps - 2)
        fraction = (value - jnp.asarray(table)[index]) / jnp.asarray(step)[index]
        return jnp.clip((index + fraction) / (self.num_timesteps - 1), 0.0, 1.0)
