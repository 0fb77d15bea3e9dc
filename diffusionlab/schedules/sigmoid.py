"""The sigmoid schedule: alpha² falls along a piece of the logistic curve.

With s = start / temperature, e = end / temperature and y = tau (e - s),

    alpha² = (sigmoid(e) - sigmoid(s + y)) / (sigmoid(e) - sigmoid(s))              (1)
    logsnr = log [ sinh((e - s - y)/2) cosh(s/2) / (sinh(y/2) cosh(e/2)) ]          (2)
    d logsnr / dy = -(coth((e - s - y)/2) + coth(y/2)) / 2
    tanh(y/2) = sinh((e - s)/2) / (R + cosh((e - s)/2)),
        R = exp(logsnr) cosh(e/2) / cosh(s/2)                                       (3)

(2) is (1) without differences of sigmoids. tau = 0 and 1 have infinite logsnr: it is
tau = tau_0 + t (tau_1 - tau_0), from logsnr_max to logsnr_min.

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
            raise ValueError(f"start: must be below end = {self.end}, got {self.start}.")
        if self.temperature <= 0:
            raise ValueError(f"temperature: must be positive, got {self.temperature}.")
        base.check_range(self.logsnr_min, self.logsnr_max)

    @property
    def _length(self) -> float:
        """e - s."""
        return (self.end - self.start) / self.temperature

    @property
    def _log_ratio(self) -> float:
        """log of cosh(e/2) / cosh(s/2)."""
        s, e = (q / self.temperature / 2 for q in (self.start, self.end))
        return math.log(math.cosh(e)) - math.log(math.cosh(s))

    def _from_noise(self, logsnr: float) -> float:
        """e - s - y for a logsnr; of the negative, mirrored, it is y."""
        half = self._length / 2
        ratio = math.exp(-logsnr - self._log_ratio)
        return 2.0 * math.atanh(math.sinh(half) / (ratio + math.cosh(half)))

    @property
    def _ends(self) -> tuple[float, float]:
        """y at t = 0, and e - s - y at t = 1."""
        return self._length - self._far(self.logsnr_max), self._from_noise(
            self.logsnr_min
        )
