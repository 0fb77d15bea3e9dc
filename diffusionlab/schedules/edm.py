"""The noise levels of EDM as a logsnr law, in two forms.

    sigma_edm(t) = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho
    logsnr(t) = -2 log sigma_edm(t)                                                 (1)

EDM adds noise without shrinking the data, z_edm = x + sigma_edm eps: that is the form
with `preserving` False. The other is z = z_edm / sqrt(1 + sigma_edm²), which has the
same logsnr; a sampler whose steps depend on logsnr alone is the same up to that scale.
The grid of EDM's sampler is `rho` of `samplers/grids.py`: levels down to sigma_min, and
then 0.

Source: Karras, Aittala, Aila and Laine 2022 (arXiv 2206.00364), equation 5.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from diffusionlab.schedules import base
from diffusionlab.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edm:
    """Equation 1.

    Attributes:
      sigma_min, sigma_max: noise level of EDM at t = 0 and at t = 1.
      rho: larger spends more of t on little noise.
      preserving: alpha² + sigma² = 1; False is the published alpha = 1, for which the
        process wants `scale_input=True`.

    Raises:
      ValueError: not 0 < sigma_min < sigma_max, or rho is not positive.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    preserving: bool = True

    def __post_init__(self):
        base.check_levels(self.sigma_min, self.sigma_max)
        if self.rho <= 0:
            raise ValueError(f"rho: must be positive, got {self.rho}.")

    @property
    def _roots(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def _root(self, t: Array) -> Array:
        low, high = self._roots
        return low + base.float32(t) * (high - low)

    def logsnr(self, t: Array) -> Array:
        """Returns float32 logsnr, shaped as t."""
        return -2.0 * self.rho * jnp.log(self._root(t))

    def derivative(self, t: Array) -> Array:
        """Returns d logsnr / d t, negative, shaped as t."""
        low, high = self._roots
        return -2.0 * self.rho * (high - low) / self._root(t)

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        """Returns (alpha, sigma), each shaped as t."""
        if self.preserving:
            return base.alpha_sigma(self.logsnr(t))
        sigma = self._root(t) ** self.rho
        return jnp.ones_like(sigma), sigma

    def inverse(self, logsnr: Array) -> Array:
        """Returns t in [0, 1]; beyond an end of the range it is that end."""
        low, high = self._roots
        root = jnp.exp(base.float32(logsnr) / (-2.0 * self.rho))
        return jnp.clip((root - low) / (high - low), 0.0, 1.0)
