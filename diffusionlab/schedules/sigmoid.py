"""The sigmoid schedule: alpha² falls along a piece of the logistic curve.

With s = start / temperature, e = end / temperature and y = tau (e - s),

    alpha² = (sigmoid(e) - sigmoid(s + y)) / (sigmoid(e) - sigmoid(s))              (1)
    logsnr = log [ sinh((e - s - y)/2) cosh(s/2) / (sinh(y/2) cosh(e/2)) ]          (2)
    d logsnr / dy = -(coth((e - s - y)/2) + coth(y/2)) / 2
    tanh(y/2) = sinh((e - s)/2) / (R + cosh((e - s)/2)),
        R = exp(logsnr) cosh(e/2) / cosh(s/2)                                       (3)

(2) is (1) without differences of sigmoids. At tau = 0 and 1 logsnr is infinite, so
tau = tau_0 + t (tau_1 - tau_0) goes from logsnr_max to logsnr_min.

Source: Jabri, Fleet and Chen 2022 (arXiv 2212.11972); Chen 2023 (arXiv 2301.10972),
section 2.1.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from diffusionlab.schedules import base
from diffusionlab.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sigmoid:
    """Equation 1; variance preserving.

    Attributes:
      start, end: the piece of the logistic curve.
      temperature: it is stretched by; smaller is steeper in the middle.
      logsnr_min, logsnr_max: logsnr at t = 1 and at t = 0.

    Raises:
      ValueError: start is not below end, temperature is not positive, or logsnr_min is
        not below logsnr_max.
    """

    start: float = -3.0
    end: float = 3.0
    temperature: float = 1.0
    logsnr_min: float = -15.0
    logsnr_max: float = 15.0

    def __post_init__(self):
        if not self.start < self.end:
            raise ValueError(
                f"start: must be below end = {self.end}, got {self.start}."
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature: must be positive, got {self.temperature}.")
        base.check_range(self.logsnr_min, self.logsnr_max)

    @property
    def _length(self) -> float:
        """e - s."""
        return (self.end - self.start) / self.temperature

    @property
    def _log_ratio(self) -> float:
        """log R - logsnr."""
        s, e = (abs(q) / self.temperature for q in (self.start, self.end))
        # log cosh(q/2) up to a constant, of any q.
        return (e - s) / 2 + math.log1p(math.exp(-e)) - math.log1p(math.exp(-s))

    @property
    def _ends(self) -> tuple[float, float, float]:
        """y at t = 0, e - s - y at t = 1, and how far y goes in between."""
        first = self._near(self.logsnr_max + self._log_ratio)
        last = self._near(-self.logsnr_min - self._log_ratio)
        return first, last, self._length - first - last

    def _near(self, log_r, xp=math):
        """y of equation 3; of -log R, by symmetry, e - s - y."""
        half = self._length / 2
        log_cosh = half + math.log1p(math.exp(-2 * half)) - math.log(2)
        # 2 artanh(q) = log1p(2 q / (1 - q)), with 1 - q as a sum of positive terms.
        rest = xp.exp(log_r - log_cosh) + math.exp(-half - log_cosh)
        return xp.log1p(2 * math.tanh(half) / rest)

    def _sides(self, t: Array) -> tuple[Array, Array]:
        """y and e - s - y, each from its own end, so that it keeps its digits."""
        t = base.float32(t)
        first, last, span = self._ends
        return first + t * span, last + (1.0 - t) * span

    def logsnr(self, t: Array) -> Array:
        """Returns float32 logsnr, shaped as t."""
        from_data, from_noise = self._sides(t)
        log_r = _log_sinh(0.5 * from_noise) - _log_sinh(0.5 * from_data)
        return log_r - self._log_ratio

    def derivative(self, t: Array) -> Array:
        """Returns d logsnr / d t, negative, shaped as t."""
        slope = sum(1.0 / jnp.tanh(0.5 * side) for side in self._sides(t))
        return -0.5 * self._ends[2] * slope

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        """Returns (alpha, sigma), alpha² + sigma² = 1, each shaped as t."""
        return base.alpha_sigma(self.logsnr(t))

    def inverse(self, logsnr: Array) -> Array:
        """Returns t in [0, 1]; beyond an end of the range it is that end."""
        log_r = base.float32(logsnr) + self._log_ratio
        first, last, span = self._ends
        near = self._near(jnp.abs(log_r), jnp)
        t = jnp.where(log_r > 0, (near - first) / span, 1.0 - (near - last) / span)
        return jnp.clip(t, 0.0, 1.0)


def _log_sinh(q: Array) -> Array:
    """log sinh(q) for q > 0, up to the constant log 2."""
    return q + jnp.log(-jnp.expm1(-2.0 * q))
