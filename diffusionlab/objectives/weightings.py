"""Weightings: the factor on the squared eps error, under uniform t.

With logsnr = l and its derivative l' < 0 in t, the loss is

    L = E_{t ~ U(0, 1), eps} [ factor(t) |eps - eps_hat|² ]                         (1)

A factor -l'/2 w(l) makes (1) an integral over l, which no schedule changes but for its
ends; w decreasing in l makes it an evidence bound on data with added noise.

Source: Kingma and Gao 2023 (arXiv 2303.00848).
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusionlab.types import Array, Schedule


class Weighting(Protocol):
    """(schedule, t `[B]`) -> factor `[B]`, float32, on the squared eps error."""

    def __call__(self, schedule: Schedule, t: Array) -> Array: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eps:
    """Factor 1: the unweighted error of eps.

    Source: Ho, Jain and Abbeel 2020 (arXiv 2006.11239), L_simple.
    """

    def __call__(self, schedule: Schedule, t: Array) -> Array:
        return jnp.ones_like(schedule.logsnr(t))


@dataclasses.dataclass(frozen=True, kw_only=True)
class X:
    """Factor exp(-l): the unweighted error of x."""

    def __call__(self, schedule: Schedule, t: Array) -> Array:
        return jnp.exp(-schedule.logsnr(t))


@dataclasses.dataclass(frozen=True, kw_only=True)
class V:
    """Factor ((alpha² + sigma²) / alpha)²: the unweighted error of v.

    It is 1 / sigmoid(l) where alpha² + sigma² = 1.

    Source: Salimans and Ho 2022 (arXiv 2202.00512), "SNR + 1" weighting.
    """

    def __call__(self, schedule: Schedule, t: Array) -> Array:
        alpha, sigma = schedule.alpha_sigma(t)
        return ((alpha**2 + sigma**2) / alpha) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Velocity:
    """Factor (l' sigma / 2)²: the unweighted error of the velocity, flow matching.

    Source: Lipman et al. 2022 (arXiv 2210.02747).
    """

    def __call__(self, schedule: Schedule, t: Array) -> Array:
        _, sigma = schedule.alpha_sigma(t)
        return (0.5 * schedule.derivative(t) * sigma) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Elbo:
    """Factor -l'/2: the evidence bound in nats, w = 1.

    Source: Kingma, Salimans, Poole and Ho 2021 (arXiv 2107.00630).
    """

    def __call__(self, schedule: Schedule, t: Array) -> Array:
        return -0.5 * schedule.derivative(t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sigmoid:
    """Factor -l'/2 sigmoid(bias - l).

    Attributes:
      bias: b. Noise levels with l far above b are switched off. It falls as images
        grow: about -1, -2, -3 for sides of 128, 256, 512.

    Source: Kingma and Gao 2023 (arXiv 2303.00848); with a bias that depends on the
    resolution, Hoogeboom et al. 2024, SiD2 (arXiv 2410.19324).
    """

    bias: float

    def __call__(self, schedule: Schedule, t: Array) -> Array:
        keep = jax.nn.sigmoid(self.bias - schedule.logsnr(t))
        return -0.5 * schedule.derivative(t) * keep


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmoidUniform:
    """Factor sigmoid(bias - l), without l'. It is not the weighting of SiD2.

    A frequent imitation of `Sigmoid`, here for comparison. What it weights depends on
    the schedule: it is `Sigmoid` times 2 / (-l'), for a shifted cosine proportional to
    sech((l - shift) / 2).

    Attributes:
      bias: as in `Sigmoid`.
    """

    bias: float

    def __call__(self, schedule: Schedule, t: Array) -> Array:
        return jax.nn.sigmoid(self.bias - schedule.logsnr(t))
