"""The cosine schedule, shifted by resolution, and interpolated between two shifts.

    a = arctan(exp(-logsnr_max/2)),   b = arctan(exp(-logsnr_min/2))
    theta(t) = a + t (b - a)
    logsnr(t) = -2 log tan theta(t),   logsnr'(t) = -4 (b - a) / sin(2 theta(t))    (1)
    shifted:      logsnr(t) + 2 log(reference / resolution)                         (2)
    interpolated: w(t) shifted_noisy(t) + (1 - w(t)) shifted_clean(t),  w(t) = t    (3)

Source: Nichol and Dhariwal 2021 (arXiv 2102.09672) for the cosine; Hoogeboom, Heek and
Salimans 2023, simple diffusion (arXiv 2301.11093), section 3.1 for (2) and (3).
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from diffusionlab.schedules import base
from diffusionlab.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Equation 1: from `logsnr_max` at t = 0 to `logsnr_min` at t = 1.

    Attributes:
      logsnr_min, logsnr_max: the ends; without truncation they would be infinite.

    Raises:
      ValueError: logsnr_min is not below logsnr_max.
    """

    logsnr_min: float = -15.0
    logsnr_max: float = 15.0

    def __post_init__(self):
        base.check_range(self.logsnr_min, self.logsnr_max)

    @property
    def span(self) -> float:
        """b - a of equation 1, at most pi/2."""
        return (
            math.pi / 2
            - math.atan(math.exp(-self.logsnr_max / 2))
            - math.atan(math.exp(self.logsnr_min / 2))
        )

    def _angle(self, t: Array) -> tuple[Array, Array]:
        # Near t = 1, tan(theta) loses all digits of pi/2 - theta in float32. That angle
        # is computed directly from 1 - t, which is exact for t >= 1/2.
        t = base.float32(t)
        first = t < 0.5
        from_data = math.atan(math.exp(-self.logsnr_max / 2)) + t * self.span
        from_noise = math.atan(math.exp(self.logsnr_min / 2)) + (1.0 - t) * self.span
        return jnp.where(first, from_data, from_noise), jnp.where(first, -2.0, 2.0)

    def logsnr(self, t: Array) -> Array:
        """Returns float32 logsnr, shaped as t."""
        angle, factor = self._angle(t)
        return factor * jnp.log(jnp.tan(angle))

    def derivative(self, t: Array) -> Array:
        """Returns d logsnr / d t, negative, shaped as t."""
        angle, _ = self._angle(t)
        return -4.0 * self.span / jnp.sin(2.0 * angle)

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        """Returns (alpha, sigma), alpha² + sigma² = 1, each shaped as t."""
        return base.alpha_sigma(self.logsnr(t))

    def inverse(self, logsnr: Array) -> Array:
        """Returns t in [0, 1]; beyond an end of the range it is that end."""
        logsnr = base.float32(logsnr)
        angle = jnp.arctan(jnp.exp(-0.5 * jnp.abs(logsnr)))
        from_data = angle - math.atan(math.exp(-self.logsnr_max / 2))
        from_noise = angle - math.atan(math.exp(self.logsnr_min / 2))
        t = jnp.where(logsnr > 0, from_data / self.span, 1.0 - from_noise / self.span)
        return jnp.clip(t, 0.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShiftedCosine:
    """Equation 2: the noise that a cosine has at `reference`, seen at `resolution`.

    Average pooling by a factor f multiplies the signal-to-noise ratio by f², so images
    that are pooled to `reference` pixels are as noisy as under the plain cosine.

    Attributes:
      resolution: pixels along a side of the data.
      reference: side at which the cosine holds; smaller is noisier.
      logsnr_min, logsnr_max: ends of the cosine before the shift.
      keep_range: the ends hold after the shift instead. The published form is False.

    Raises:
      ValueError: a side is not positive, or logsnr_min is not below logsnr_max.
    """

    resolution: int
    reference: int
    logsnr_min: float = -15.0
    logsnr_max: float = 15.0
    keep_range: bool = False

    def __post_init__(self):
        _check_sides(resolution=self.resolution, reference=self.reference)
        base.check_range(self.logsnr_min, self.logsnr_max)

    @property
    def shift(self) -> float:
        """What is added to the logsnr of the cosine."""
        return 2.0 * math.log(self.reference / self.resolution)

    @property
    def _cosine(self) -> Cosine:
        moved = self.shift if self.keep_range else 0.0
        return Cosine(
            logsnr_min=self.logsnr_min - moved, logsnr_max=self.logsnr_max - moved
        )

    def logsnr(self, t: Array) -> Array:
        """Returns float32 logsnr, shaped as t."""
        return self._cosine.logsnr(t) + self.shift

    def derivative(self, t: Array) -> Array:
        """Returns d logsnr / d t, negative, shaped as t."""
        return self._cosine.derivative(t)

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        """Returns (alpha, sigma), alpha² + sigma² = 1, each shaped as t."""
        return base.alpha_sigma(self.logsnr(t))

    def inverse(self, logsnr: Array) -> Array:
        """Returns t in [0, 1]; beyond an end of the range it is that end."""
        return self._cosine.inverse(base.float32(logsnr) - self.shift)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterpolatedCosine:
    """Equation 3: from the shift of one reference side at t = 0 to another at t = 1.

    The noisier shift (`low`) at the noisy end settles global structure early and leaves
    more time at high logsnr for fine detail. Sources differ in the orientation, hence
    the choice.

    Attributes:
      resolution: pixels along a side of the data.
      low, high: the two reference sides.
      noisy_end: 'low' or 'high', the reference that holds at t = 1.
      logsnr_min, logsnr_max: ends of the cosine before the shifts.

    Raises:
      ValueError: a side is not positive, `noisy_end` is another word, logsnr_min is not
        below logsnr_max, or the schedule would not be strictly decreasing.
    """

    resolution: int
    low: int
    high: int
    noisy_end: str = "low"
    logsnr_min: float = -15.0
    logsnr_max: float = 15.0

    def __post_init__(self):
        _check_sides(resolution=self.resolution, low=self.low, high=self.high)
        base.check_range(self.logsnr_min, self.logsnr_max)
        if self.noisy_end not in ("low", "high"):
            raise ValueError(
                f"noisy_end: expected 'low' or 'high', got {self.noisy_end!r}."
            )
        if self.max_slope >= 0:
            raise ValueError(
                f"noisy_end: with '{self.noisy_end}' the schedule from reference "
                f"{self._clean} to {self._noisy} is not decreasing (largest slope "
                f"{self.max_slope:.4f}); use the other end or a smaller ratio."
            )

    @property
    def _noisy(self) -> int:
        return self.low if self.noisy_end == "low" else self.high

    @property
    def _clean(self) -> int:
        return self.high if self.noisy_end == "low" else self.low

    @property
    def _cosine(self) -> Cosine:
        return Cosine(logsnr_min=self.logsnr_min, logsnr_max=self.logsnr_max)

    @property
    def _tilt(self) -> float:
        return 2.0 * math.log(self._noisy / self._clean)

    @property
    def max_slope(self) -> float:
        """The largest d logsnr / d t in [0, 1]; negative for an accepted schedule."""
        # The slope of (1) is flattest where sin(2 theta) is largest: at theta = pi/4,
        # or at the end of the range that is nearer to it.
        a = math.atan(math.exp(-self.logsnr_max / 2))
        theta = min(max(math.pi / 4, a), a + self._cosine.span)
        return -4.0 * self._cosine.span / math.sin(2.0 * theta) + self._tilt

    def logsnr(self, t: Array) -> Array:
        """Returns float32 logsnr, shaped as t."""
        t = base.float32(t)
        shift = 2.0 * math.log(self._clean / self.resolution)
        return self._cosine.logsnr(t) + (shift + t * self._tilt)

    def derivative(self, t: Array) -> Array:
        """Returns d logsnr / d t, negative, shaped as t."""
        return self._cosine.derivative(t) + self._tilt

    def alpha_sigma(self, t: Array) -> tuple[Array, Array]:
        """Returns (alpha, sigma), alpha² + sigma² = 1, each shaped as t."""
        return base.alpha_sigma(self.logsnr(t))

    def inverse(self, logsnr: Array) -> Array:
        """Returns t in [0, 1] by bisection; beyond an end it is that end."""
        return base.bisect(self.logsnr, logsnr)


def _check_sides(**sides: int) -> None:
    for name, side in sides.items():
        if side <= 0:
            raise ValueError(f"{name}: must be positive, got {side}.")
