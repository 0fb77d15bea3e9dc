"""Averages of parameters over training, several at once.

Exponential: ema <- b ema + (1 - b) params with b = min(decay, (1 + k) / (10 + k)) at
step k, so that the random start is soon forgotten.

Power function: the average with weight proportional to k^gamma at step k, by
ema <- b ema + (1 - b) params, b = (1 - 1/k)^(gamma + 1). Its relative width is
sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)). From a few stored averages
of this kind any other length is reconstructed after training as the combination whose
weight profile is nearest in the L2 sense.
Source: Karras et al. (2024), arXiv 2312.02696, section 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.types import Array, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exponential:
    """Exponential average; `warmup` shortens it over the first steps."""

    decay: float
    warmup: bool = True

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: must be in [0, 1), got {self.decay}.")

    def rate(self, step: Array) -> Array:
        """Weight of the old average at update `step` of the role, from 1 on."""
        step = jnp.asarray(step, jnp.float32)
        if not self.warmup:
            return jnp.full_like(step, self.decay)
        return jnp.minimum(self.decay, (1 + step) / (10 + step))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Power:
    """Power-function average of relative width `sigma_rel`, in (0, 0.288]."""

    sigma_rel: float

    def __post_init__(self):
        gamma_of(self.sigma_rel)

    def rate(self, step: Array) -> Array:
        """Weight of the old average at update `step` of the role, from 1 on."""
        step = jnp.asarray(step, jnp.float32)
        return (1 - 1 / step) ** (gamma_of(self.sigma_rel) + 1)


def update(average: Params, params: Params, rate: Array) -> Params:
    """Returns rate * average + (1 - rate) * params, exact for a constant."""
    return jax.tree.map(lambda a, p: a + (1 - rate) * (p - a), average, params)


def gamma_of(sigma_rel: float) -> float:
    """Returns gamma of a power profile, the largest root of its cubic.

    Raises:
      ValueError: no gamma >= 0 has this width.
    """
    limit = (1 / 12) ** 0.5
    if not 0 < sigma_rel <= limit + 1e-6:
        raise ValueError(f"sigma_rel: must be in (0, {limit:.4f}], got {sigma_rel}.")
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def _inner(step_a, gamma_a, step_b, gamma_b) -> np.ndarray:
    """Inner product of two profiles k^gamma on [0, step], each with integral 1.

    With the shorter one (a) inside the longer (b):
    (a+1)(b+1) / (a+b+1) * (s_a / s_b)^b / s_b ... for s_a <= s_b.
    """
    swap = step_a > step_b
    s, g = np.where(swap, step_b, step_a), np.where(swap, gamma_b, gamma_a)
    big_s, big_g = np.where(swap, step_a, step_b), np.where(swap, gamma_a, gamma_b)
    return (g + 1) * (big_g + 1) / (g + big_g + 1) * (s / big_s) ** big_g / big_s


def reconstruction(
    stored: Sequence[tuple[int, float]], step: int, sigma_rel: float
) -> np.ndarray:
    """Returns the coefficients of stored averages that give another length.

    Args:
      stored: (step, sigma_rel) of each stored average.
      step: the step at which the wanted average would have ended.
      sigma_rel: the wanted relative width.

    Returns:
      `[len(stored)]` coefficients, whose sum is near 1.

    Source: Karras et al. (2024), arXiv 2312.02696, equation 16 and appendix C.
    """
    steps = np.array([s for s, _ in stored], np.float64)
    gammas = np.array([gamma_of(w) for _, w in stored], np.float64)
    gram = _inner(steps[:, None], gammas[:, None], steps[None], gammas[None])
    wanted = _inner(steps, gammas, np.float64(step), np.float64(gamma_of(sigma_rel)))
    return np.linalg.lstsq(gram, wanted, rcond=1e-12)[0]
