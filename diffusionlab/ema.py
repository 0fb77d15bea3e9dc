"""Averages of parameters over training, several at once.

Exponential: ema <- b ema + (1 - b) params with b = min(decay, (1 + k) / (10 + k)) at
step k, so that the random start is soon forgotten.

Power function: the average with weight proportional to k^gamma at step k, by
ema <- b ema + (1 - b) params, b = (1 - 1/k)^(gamma + 1). Its relative width is
sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)). From a few stored averages
of this kind any other length is reconstructed after training as the combination whose
weight profile is nearest in the L2 sense; if even that one is far, there is none.
Source: Karras et al. (2024), arXiv 2312.02696, section 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.types import Array, Params

MAX_DISTANCE = 0.06
"""Of a reconstructed profile, relative to the norm of the wanted one.

The widths 0.05 and 0.10 of a single checkpoint stay below it everywhere in between; on
ramps and random walks of range 1 the averages were then within 0.01 of the true ones.
"""


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

    For s_a <= s_b it is (a + 1)(b + 1) / (a + b + 1) (s_a / s_b)^b / s_b.
    """
    swap = step_a > step_b
    s, g = np.where(swap, step_b, step_a), np.where(swap, gamma_b, gamma_a)
    big_s, big_g = np.where(swap, step_a, step_b), np.where(swap, gamma_a, gamma_b)
    return (g + 1) * (big_g + 1) / (g + big_g + 1) * (s / big_s) ** big_g / big_s


def _combination(stored, step: int, sigma_rel: float) -> tuple[np.ndarray, float]:
    """Coefficients with sum 1 whose profile is nearest, and its relative distance.

    With Gram matrix G, inner products b with the wanted profile p, and c = 1/n + Q d
    where the columns of Q span sum 0: minimise c G c - 2 c b + p p over d.
    """
    steps = np.array([s for s, _ in stored], np.float64)
    gammas = np.array([gamma_of(w) for _, w in stored], np.float64)
    end, gamma = np.float64(step), np.float64(gamma_of(sigma_rel))
    gram = _inner(steps[:, None], gammas[:, None], steps[None], gammas[None])
    wanted = _inner(steps, gammas, end, gamma)
    square = _inner(end, gamma, end, gamma)
    mean = np.full(len(stored), 1 / len(stored))
    free = np.linalg.qr(np.c_[mean, np.eye(len(stored))[:, 1:]])[0][:, 1:]
    solved = np.linalg.lstsq(
        free.T @ gram @ free, free.T @ (wanted - gram @ mean), rcond=1e-12
    )
    found = mean + free @ solved[0]
    distance = square - 2 * found @ wanted + found @ gram @ found
    return found, float(np.sqrt(max(distance, 0.0) / square))


def reconstruction(
    stored: Sequence[tuple[int, float]], step: int, sigma_rel: float
) -> np.ndarray:
    """Returns the coefficients of stored averages that give another length.

    Unlike in the paper their sum is 1, for a combination must return a constant as it
    is. Near the end of what can be reached this puts the profiles up to a fifth further
    apart, and the error on drifting parameters is several times smaller.

    Args:
      stored: (step, sigma_rel) of each stored average; steps are updates of the role.
      step: the step at which the wanted average would have ended.
      sigma_rel: the wanted relative width.

    Returns:
      `[len(stored)]` coefficients.

    Raises:
      ValueError: no such width, or no combination comes within `MAX_DISTANCE` of its
        profile; says which width can be reached, and what to store.

    Source: Karras et al. (2024), arXiv 2312.02696, equation 16 and appendix C.
    """
    gamma_of(sigma_rel)
    if not stored:
        raise ValueError("sigma_rel: there is no stored average to combine.")
    found, distance = _combination(stored, step, sigma_rel)
    if distance <= MAX_DISTANCE:
        return found
    widths = [*(w for _, w in stored), *(np.arange(10, 289) / 1000)]
    widths.sort(key=lambda width: abs(np.log(width / sigma_rel)))
    reached = (w for w in widths if _combination(stored, step, w)[1] <= MAX_DISTANCE)
    near = next(reached, None)
    stored_widths = ", ".join(f"{w:g}" for w in sorted({w for _, w in stored}))
    stored_steps = sorted({s for s, _ in stored})
    raise ValueError(
        f"sigma_rel: the stored averages do not reach {sigma_rel:g}: their best "
        f"combination is {distance:.0%} off its profile, allowed {MAX_DISTANCE:.0%}. "
        + (f"The nearest width they reach is {near:g}. " if near else "")
        + f"Stored: sigma_rel {stored_widths}; checkpoints: {len(stored_steps)}, "
        f"from {stored_steps[0]} to {stored_steps[-1]} updates. Keep more of them "
        "(config.checkpoint.keep_every), or a second power average in config.ema."
    )
