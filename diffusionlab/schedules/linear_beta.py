"""The linear-beta diffusion of DDPM in continuous time, variance preserving.

    tau = time_min + t (1 - time_min)
    B(tau) = beta_min tau + (beta_max - beta_min) tau² / 2                          (1)
    alpha² = exp(-B),   logsnr = -log(expm1(B))                                     (2)
    d logsnr / d tau = -B'(tau) / (1 - exp(-B))

Source: Ho, Jain and Abbeel 2020 (arXiv 2006.11239); the continuous form and its
constants are those of Song et al. 2021 (arXiv 2011.13456), appendix C.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffusionlab.schedules import base
from diffusionlab.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearBeta:
    """Equation 2.

    Attributes:
      beta_min, beta_max: the noise rate at the clean and at the noisy end.
      time_min: tau at t = 0. At tau = 0 the logsnr is infinite.

    Raises:
      ValueError: not 0 <= beta_min <= beta_max, beta_max > 0, 0 < time_min < 1.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    time_min: float = 1e-3

    def __post_init__(self):
        if not 0 <= self.beta_min <= self.beta_max or self.beta_max <= 0:
            raise ValueError(
                "beta_min: expected 0 <= beta_min <= beta_max and beta_max > 0, got "
                f"{self.beta_min} and {self.beta_max}."
            )
        if not 0 < self.time_min < 1:
            raise ValueError(f"time_min: must be in (0, 1), got {self.time_min}.")

    def _rate_and_integral(self, t: Array) -> tuple[Array, Array]:
        tau = self.time_min + base.float32(t) * (1.0 - self.time_min)
        slope = self.beta_max - self.beta_min
        return self.beta_min + slope * tau, tau * (self.beta_min + 0.5 * slope * tau)

    def logsnr(self, t: Array) -> Array:
        """Returns float32 logsnr, shaped as t."""
        _, integral = self._rate_and_integral(t)
        return -jnp.log(jnp.expm1(integral))

    def derivative(self, t: Array) -> Array:
        """Returns d logsnr / d t, negative, shaped as t."""
        rate, integral = self._rate_and_integral(t)
        return (1.0 - self.time_min) * rate / jnp.expm1(-integral)

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        """Returns (alpha, sigma), alpha² + sigma² = 1, each shaped as t."""
        return base.alpha_sigma(self.logsnr(t))

    def inverse(self, logsnr: Array) -> Array:
        """Returns t in [0, 1]; beyond an end of the range it is that end."""
        # B = log(1 + e^-logsnr), then the root of (1) without cancellation.
        integral = jax.nn.softplus(-base.float32(logsnr))
        slope = self.beta_max - self.beta_min
        root = jnp.sqrt(self.beta_min**2 + 2.0 * slope * integral)
        tau = 2.0 * integral / (self.beta_min + root)
        return jnp.clip((tau - self.time_min) / (1.0 - self.time_min), 0.0, 1.0)
