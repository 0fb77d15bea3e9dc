"""logsnr linear in t: logsnr(t) = (1 - t) logsnr_max + t logsnr_min."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from diffusionlab.schedules import base
from diffusionlab.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearLogsnr:
    """The schedule under which uniform t is uniform logsnr.

    Attributes:
      logsnr_min, logsnr_max: logsnr at t = 1 and at t = 0.

    Raises:
      ValueError: logsnr_min is not below logsnr_max.

    Source: Kingma, Salimans, Poole and Ho 2021, Variational diffusion models
    (arXiv 2107.00630), the linear initialisation of the learned schedule.
    """

    logsnr_min: float = -15.0
    logsnr_max: float = 15.0

    def __post_init__(self):
        base.check_range(self.logsnr_min, self.logsnr_max)

    def logsnr(self, t: Array) -> Array:
        """Returns float32 logsnr, shaped as t."""
        t = base.float32(t)
        return (1.0 - t) * self.logsnr_max + t * self.logsnr_min

    def derivative(self, t: Array) -> Array:
        """Returns d logsnr / d t, a negative constant shaped as t."""
        return jnp.full_like(base.float32(t), self.logsnr_min - self.logsnr_max)

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        """Returns (alpha, sigma), alpha² + sigma² = 1, each shaped as t."""
        return base.alpha_sigma(self.logsnr(t))

    def inverse(self, logsnr: Array) -> Array:
        """Returns t in [0, 1]; beyond an end of the range it is that end."""
        t = (self.logsnr_max - base.float32(logsnr)) / (
            self.logsnr_max - self.logsnr_min
        )
        return jnp.clip(t, 0.0, 1.0)
