"""Weightings: the factor on the squared eps error, under uniform t.

With logsnr = l and its derivative l' < 0 in t, the loss is

    L = E_{t ~ U(0, 1), eps} [ factor(t) |eps - eps_hat|² ]                         (1)

A factor -l'/2 w(l) makes (1) an integral over l, which no schedule changes but for its
ends; w decreasing in l makes it an evidence bound on data with added noise.

Source: Kingma and Gao 2023 (arXiv 2303.00848).
"""

from __future__ import annotations

import dataclasses
import math
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
class Edm:
    """Factor 1 + exp(-l) / d²: the unweighted error of EDM's network output F.

    In EDM's variables, where exp(-l) is the square of their sigma, it is
    lambda = (sigma² + d²) / (sigma d)² on the squared error of x. Times drawn from
    `log_normal` go with it.

    Attributes:
      sigma_data: d, the standard deviation of the data; the number that the process
        has too.

    Raises:
      ValueError: sigma_data is not positive.

    Source: Karras et al. 2022 (arXiv 2206.00364), table 1 and section 5.
    """

    sigma_data: float = 1.0

    def __post_init__(self):
        if self.sigma_data <= 0:
            raise ValueError(f"sigma_data: must be positive, got {self.sigma_data}.")

    def __call__(self, schedule: Schedule, t: Array) -> Array:
        return 1.0 + jnp.exp(-schedule.logsnr(t)) / self.sigma_data**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinSnr:
    """Factor min(1, gamma exp(-l)): min(SNR, gamma) on the squared error of x.

    Attributes:
      gamma: the SNR above which the error of x has a constant weight.

    Raises:
      ValueError: gamma is not positive.

    Source: Hang et al. 2023 (arXiv 2303.09556), section 3.4.
    """

    gamma: float = 5.0

    def __post_init__(self):
        if self.gamma <= 0:
            raise ValueError(f"gamma: must be positive, got {self.gamma}.")

    def __call__(self, schedule: Schedule, t: Array) -> Array:
        return jnp.minimum(1.0, self.gamma * jnp.exp(-schedule.logsnr(t)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class P2:
    """Factor (k + exp(l))^-gamma: less weight where only fine detail is left.

    Attributes:
      gamma: 0 is `Eps`; the paper uses 0.5 and 1.
      k: bounds the factor at the noisy end by k^-gamma.

    Raises:
      ValueError: gamma is negative, or k is not positive.

    Source: Choi et al. 2022 (arXiv 2204.00227), equation 8.
    """

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self):
        if self.gamma < 0:
            raise ValueError(f"gamma: must not be negative, got {self.gamma}.")
        if self.k <= 0:
            raise ValueError(f"k: must be positive, got {self.k}.")

    def __call__(self, schedule: Schedule, t: Array) -> Array:
        log_sum = jnp.logaddexp(math.log(self.k), schedule.logsnr(t))
        return jnp.exp(-self.gamma * log_sum)


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
