"""Schedules of tokens: alpha(t), the probability that a token is still the clean one.

alpha falls from 1 at t = 0 to 0 at t = 1, or, with `end` = e, from 1 - e to e:

    alpha = (1 - 2 e) alpha~ + e                                                    (1)

    alpha_linear         alpha~ = 1 - t
    alpha_log_linear     1 - (1 - eps) t; -log alpha is the total noise of SEDD
    alpha_cosine         1 - cos(pi/2 (1 - t))
    alpha_polynomial     1 - t^power
    alpha_nichol_cosine  cos(pi/2 (t + s) / (1 + s)), over its value at 0, s = 0.008

logsnr is log(alpha / (1 - alpha)), which networks and diagnostics see as they see that
of gaussian noise. `alpha` and `noise`, its complement, are both exact where they are
small: the weights of losses divide by them.

Source: Shi et al. 2024, MD4 (arXiv 2406.04329), for (1), linear, cosine and polynomial;
Sahoo et al. 2024, MDLM (arXiv 2406.07524), and Lou et al. 2023, SEDD
(arXiv 2310.16834), for log-linear; Austin et al. 2021, D3PM (arXiv 2107.03006), for the
last, of uniform noise there.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from diffusionlab.types import Array

_TINY = 1e-7  # logsnr stays finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Alpha:
    """What all have in common, given `_alpha`, `_noise` and `_inverse` without end."""

    end: float = 0.0

    def __post_init__(self):
        if not 0 <= self.end < 0.5:
            raise ValueError(f"end: must be in [0, 0.5), got {self.end}.")

    def alpha(self, t: Array) -> Array:
        """Returns the probability that a token is the clean one, shaped as t."""
        t = jnp.asarray(t, jnp.float32)
        return (1 - 2 * self.end) * self._alpha(t) + self.end

    def noise(self, t: Array) -> Array:
        """Returns 1 - alpha, shaped as t."""
        t = jnp.asarray(t, jnp.float32)
        return (1 - 2 * self.end) * self._noise(t) + self.end

    def alpha_derivative(self, t: Array) -> Array:
        """Returns d alpha / dt, negative, shaped as t."""
        t = jnp.asarray(t, jnp.float32)
        return jax.jvp(self.alpha, (t,), (jnp.ones_like(t),))[1]

    def logsnr(self, t: Array) -> Array:
        """Returns log(alpha / (1 - alpha)), within about 16 of 0, shaped as t."""
        alpha, noise = (jnp.maximum(q(t), _TINY) for q in (self.alpha, self.noise))
        return jnp.log(alpha) - jnp.log(noise)

    def derivative(self, t: Array) -> Array:
        """Returns d logsnr / dt, shaped as t."""
        t = jnp.asarray(t, jnp.float32)
        return jax.jvp(self.logsnr, (t,), (jnp.ones_like(t),))[1]

    def inverse(self, logsnr: Array) -> Array:
        """Returns the t in [0, 1] of a logsnr."""
        alpha = (jax.nn.sigmoid(logsnr) - self.end) / (1 - 2 * self.end)
        noise = (jax.nn.sigmoid(-logsnr) - self.end) / (1 - 2 * self.end)
        return jnp.clip(
            self._inverse(jnp.clip(alpha, 0, 1), jnp.clip(noise, 0, 1)), 0, 1
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(_Alpha):
    """alpha~ = 1 - t.

    Attributes:
      end: e of equation 1.

    Raises:
      ValueError: end outside [0, 0.5).
    """

    end: float = 0.0

    def _alpha(self, t):
        return 1 - t

    def _noise(self, t):
        return t

    def _inverse(self, alpha, noise):
        return noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogLinear(_Alpha):
    """alpha~ = 1 - (1 - eps) t: it ends at eps.

    Attributes:
      end: e of equation 1.
      eps: alpha~ at t = 1.

    Raises:
      ValueError: end outside [0, 0.5), or eps outside [0, 1).
    """

    end: float = 0.0
    eps: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.eps < 1:
            raise ValueError(f"eps: must be in [0, 1), got {self.eps}.")

    def _alpha(self, t):
        return (1 - t) + self.eps * t

    def _noise(self, t):
        return (1 - self.eps) * t

    def _inverse(self, alpha, noise):
        return noise / (1 - self.eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(_Alpha):
    """alpha~ = 1 - cos(pi/2 (1 - t)).

    Attributes:
      end: e of equation 1.

    Raises:
      ValueError: end outside [0, 0.5).
    """

    end: float = 0.0

    def _alpha(self, t):
        return 2 * jnp.sin(math.pi / 4 * (1 - t)) ** 2

    def _noise(self, t):
        return jnp.sin(math.pi / 2 * t)

    def _inverse(self, alpha, noise):
        # By whichever is small: the arcsin of a noise near 1 has half its digits.
        much = 1 - jnp.arcsin(jnp.sqrt(alpha / 2)) * 4 / math.pi
        return jnp.where(noise < 0.5, jnp.arcsin(noise) * 2 / math.pi, much)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Polynomial(_Alpha):
    """alpha~ = 1 - t^power.

    Attributes:
      end: e of equation 1.
      power: above 0.

    Raises:
      ValueError: end outside [0, 0.5), or a power that is not positive.
    """

    end: float = 0.0
    power: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        if self.power <= 0:
            raise ValueError(f"power: must be positive, got {self.power}.")

    def _alpha(self, t):
        # Near t = 1 the logarithm keeps the digits of alpha; it would lose those of
        # its derivative near t = 0.
        noise = t**self.power
        is_small = noise < 0.5
        log_t = jnp.log(jnp.where(is_small, 1.0, t))
        return jnp.where(is_small, 1 - noise, -jnp.expm1(self.power * log_t))

    def _noise(self, t):
        return t**self.power

    def _inverse(self, alpha, noise):
        return noise ** (1 / self.power)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NicholCosine(_Alpha):
    """alpha~ = cos(pi/2 (t + s) / (1 + s)) over its value at t = 0, s = 0.008.

    Attributes:
      end: e of equation 1.

    Raises:
      ValueError: end outside [0, 0.5).
    """

    end: float = 0.0

    S = 0.008

    def _angle(self, t):
        return math.pi / 2 * (t + self.S) / (1 + self.S)

    def _first(self):
        return math.cos(math.pi / 2 * self.S / (1 + self.S))

    def _alpha(self, t):
        return jnp.sin(math.pi / 2 * (1 - t) / (1 + self.S)) / self._first()

    def _noise(self, t):
        # cos a - cos b = 2 sin((a + b) / 2) sin((b - a) / 2)
        low, high = self._angle(jnp.float32(0)), self._angle(t)
        half = math.pi / 4 * t / (1 + self.S)
        return 2 * jnp.sin((low + high) / 2) * jnp.sin(half) / self._first()

    def _inverse(self, alpha, noise):
        angle = jnp.arcsin(jnp.clip(alpha * self._first(), 0, 1))
        return 1 - angle * 2 / math.pi * (1 + self.S)
