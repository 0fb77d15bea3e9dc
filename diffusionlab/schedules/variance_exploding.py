"""The variance-exploding diffusion: noise is added, data are not shrunk.

    alpha = 1,   sigma = sigma_min (sigma_max / sigma_min)^t                        (1)
    logsnr = -2 log sigma,   d logsnr / dt = -2 log(sigma_max / sigma_min)

The noisy data have a standard deviation up to sigma_max: give the process
`scale_input=True`, so that the network sees inputs of unit variance.

Source: Song et al. 2021 (arXiv 2011.13456), section 3.4 and appendix C; the constants
are those for 32 x 32 images in [0, 1]. Our t = 0 is their first noise level.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from diffusionlab.schedules import base
from diffusionlab.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class VarianceExploding:
    """Equation 1.

    Attributes:
      sigma_min, sigma_max: noise level at t = 0 and at t = 1.

    Raises:
      ValueError: not 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self):
        base.check_levels(self.sigma_min, self.sigma_max)

    @property
    def _span(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def logsnr(self, t: Array) -> Array:
        """Returns float32 logsnr, shaped as t."""
        return -2.0 * (math.log(self.sigma_min) + base.float32(t) * self._span)

    def derivative(self, t: Array) -> Array:
        """Returns d logsnr / d t, negative, shaped as t."""
        return jnp.full_like(base.float32(t), -2.0 * self._span)

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        """Returns (1, sigma), each shaped as t."""
        sigma = jnp.exp(-0.5 * self.logsnr(t))
        return jnp.ones_like(sigma), sigma

    def inverse(self, logsnr: Array) -> Array:
        """Returns t in [0, 1]; beyond an end of the range it is that end."""
        above = -0.5 * base.float32(logsnr) - math.log(self.sigma_min)
        return jnp.clip(above / self._span, 0.0, 1.0)
