"""The straight path of rectified flow; not variance preserving.

    alpha = 1 - tau,   sigma = tau,   logsnr = 2 log((1 - tau) / tau)               (1)
    d logsnr / d tau = -2 / (tau (1 - tau))
    tau = tau_0 + t (tau_1 - tau_0),   tau_0 = sigmoid(-logsnr_max/2),
                                       tau_1 = sigmoid(-logsnr_min/2)               (2)

Source: Liu, Gong and Liu 2022 (arXiv 2209.03003); Lipman et al. 2022
(arXiv 2210.02747). Our t runs from data to noise. The affine map (2) keeps both ends
finite; at the default ends it moves tau by less than 5e-5.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from diffusionlab.schedules import base
from diffusionlab.types import Array


def _sigmoid(q: float) -> float:
    return 1.0 / (1.0 + math.exp(-q))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flow:
    """Equation 1 at the times of equation 2.

    Attributes:
      logsnr_min, logsnr_max: logsnr at t = 1 and at t = 0.

    Raises:
      ValueError: logsnr_min is not below logsnr_max.
    """

    logsnr_min: float = -20.0
    logsnr_max: float = 20.0

    def __post_init__(self):
        base.check_range(self.logsnr_min, self.logsnr_max)

    @property
    def _ends(self) -> tuple[float, float, float]:
        first, last = _sigmoid(-self.logsnr_max / 2), _sigmoid(self.logsnr_min / 2)
        return first, last, 1.0 - first - last

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        """Returns (alpha, sigma), alpha + sigma = 1, each shaped as t."""
        t = base.float32(t)
        sigma_0, alpha_1, span = self._ends
        # Each scale is measured from the end where it is small, so it keeps its digits.
        first = t < 0.5
        sigma = sigma_0 + t * span
        alpha = alpha_1 + (1.0 - t) * span
        return (
            jnp.where(first, 1.0 - sigma, alpha),
            jnp.where(first, sigma, 1.0 - alpha),
        )

    def logsnr(self, t: Array) -> Array:
        """Returns float32 logsnr, shaped as t."""
        alpha, sigma = self.alpha_sigma(t)
        return 2.0 * (jnp.log(alpha) - jnp.log(sigma))

    def derivative(self, t: Array) -> Array:
        """Returns d logsnr / d t, negative, shaped as t."""
        alpha, sigma = self.alpha_sigma(t)
        return -2.0 * self._ends[2] / (alpha * sigma)

    def inverse(self, logsnr: Array) -> Array:
        """Returns t in [0, 1]; beyond an end of the range it is that end."""
        logsnr = base.float32(logsnr)
        sigma_0, alpha_1, span = self._ends
        small = jax.nn.sigmoid(-0.5 * jnp.abs(logsnr))
        t = jnp.where(
            logsnr > 0, (small - sigma_0) / span, 1.0 - (small - alpha_1) / span
        )
        return jnp.clip(t, 0.0, 1.0)
