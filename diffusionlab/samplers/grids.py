"""Where a sampler stops between noise and data, t = 0.

With i = 0 ... N and u_i = 1 - i / N, before the schedule is asked:

    uniform    t = u
    quadratic  t = u^power                                                          (1)
    cosine     t = cos(pi/2 (1 - u))
    logsnr     equal steps in logsnr
    rho        sigma / alpha = (low^(1/rho) + u (high^(1/rho) - low^(1/rho)))^rho,
               and a last step to t = 0                                             (2)
    shifted    t -> shift t / (1 + (shift - 1) t) on another grid                   (3)
    discrete   t = k / (K - 1), steps k of a chain of K, then a step to t = 0       (4)
    straight   sigma / (alpha + sigma) = u
    custom     a list of times
    from       another grid times its first stop, a given logsnr

Equal steps in logsnr stop at `logsnr_max`, where the last step leaves for t = 0, as (2)
does at `low`: a schedule whose own end is much cleaner would spend them there. All of
them start at t = 1 but (2), which starts at the level `high`, (4) where it leads, and
`from`.

Source: Song, Meng and Ermon 2021 (arXiv 2010.02502), appendix D.2, for (1); Karras et
al. 2022 (arXiv 2206.00364), equation 5, for (2); Lu et al. 2022 (arXiv 2206.00927) for
equal steps in logsnr; Esser et al. 2024 (arXiv 2403.03206), equation 23, for (3); Shi
et al. 2024, MD4 (arXiv 2406.04329), for cosine.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.types import Array, Schedule


class Grid(Protocol):
    """(schedule, num_steps) -> times `[num_steps + 1]`, falling from noise to 0."""

    def __call__(self, schedule: Schedule, num_steps: int) -> Array: ...


_NEAR_ZERO = 1e-7


def _u(num_steps: int) -> np.ndarray:
    return np.arange(num_steps, -1, -1, dtype=np.float32) / np.float32(num_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform:
    """Equal steps in t."""

    def __call__(self, schedule: Schedule, num_steps: int) -> Array:
        return _u(num_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quadratic:
    """Equation 1; with power 2 the steps shrink towards the data.

    Attributes:
      power: of u; 1 is uniform.

    Raises:
      ValueError: power is not positive.
    """

    power: float = 2.0

    def __post_init__(self):
        if self.power <= 0:
            raise ValueError(f"power: must be positive, got {self.power}.")

    def __call__(self, schedule: Schedule, num_steps: int) -> Array:
        return _u(num_steps) ** np.float32(self.power)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Short steps near t = 1: of tokens few are revealed while little is known.

    With `alpha_linear` it is `uniform` with `alpha_cosine`; the two together are too
    much of it.
    """

    def __call__(self, schedule: Schedule, num_steps: int) -> Array:
        angle = math.pi / 2 * (1.0 - _u(num_steps).astype(np.float64))
        return np.append(np.cos(angle[:-1]), 0.0).astype(np.float32)


def _to_zero(inner: Array) -> Array:
    """Appends t = 0, clean data, to times `[num_steps]`.

    A stop at the schedule's own end is a noise level like any other: it stays, as near
    to 0 as to have that level.
    """
    return jnp.append(jnp.clip(inner, _NEAR_ZERO, 1.0), 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logsnr:
    """Equal steps in logsnr from t = 1 to `logsnr_max`, then one to t = 0.

    Attributes:
      logsnr_max: the last stop; None is the schedule's own end, and the step that
        would follow from there is left out.
    """

    logsnr_max: float | None = 9.0

    def __call__(self, schedule: Schedule, num_steps: int) -> Array:
        first, end = schedule.logsnr(jnp.float32(1)), schedule.logsnr(jnp.float32(0))
        if self.logsnr_max is None or num_steps == 1:
            logsnr = first + (end - first) * (1.0 - _u(num_steps))
            return schedule.inverse(logsnr).at[0].set(1.0).at[-1].set(0.0)
        if not float(first) < self.logsnr_max < float(end):
            raise ValueError(
                f"grid.logsnr_max: must be between the ends {float(first):.4g} and "
                f"{float(end):.4g} of the schedule, got {self.logsnr_max}."
            )
        u = _u(num_steps - 1)
        inner = schedule.inverse(first * u + self.logsnr_max * (1.0 - u))
        return _to_zero(inner.at[0].set(1.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rho:
    """Equation 2, the grid of EDM: num_steps noise levels, then t = 0.

    Attributes:
      sigma_min, sigma_max: the last and the first noise level sigma / alpha; a level
        beyond the schedule's end is that end. Sampling starts at sigma_max, as if the
        data were gaussian there: the mean of the data is a fraction 1 / sigma_max.
      rho: larger spends more steps on little noise.

    Raises:
      ValueError: not 0 < sigma_min < sigma_max, or rho is not positive.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                "sigma_min: expected 0 < sigma_min < sigma_max, got "
                f"{self.sigma_min} and {self.sigma_max}."
            )
        if self.rho <= 0:
            raise ValueError(f"rho: must be positive, got {self.rho}.")

    def __call__(self, schedule: Schedule, num_steps: int) -> Array:
        ends = (schedule.logsnr(jnp.float32(t)) for t in (0.0, 1.0))
        cleanest, noisiest = (math.exp(-0.5 * float(logsnr)) for logsnr in ends)
        low = max(self.sigma_min, cleanest) ** (1 / self.rho)
        whole = self.sigma_max >= noisiest
        high = min(self.sigma_max, noisiest) ** (1 / self.rho)
        if not low < high:
            raise ValueError(
                f"grid.sigma_min: the levels {self.sigma_min} to {self.sigma_max} lie "
                f"outside those of the schedule, {cleanest:.4g} to {noisiest:.4g}."
            )

        def stops(number: int) -> Array:
            u = _u(number - 1) if number > 1 else np.ones(1, np.float32)
            root = low + u * (high - low)
            t = schedule.inverse(-2.0 * self.rho * jnp.log(root))
            return t.at[0].set(1.0) if whole else t

        return _to_zero(stops(num_steps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discrete:
    """Equation 4: steps of the chain on which a network was trained, and no others.

    With r = K / N and i = 0 ... N - 1, rounded to whole numbers:

        trailing  k = K - i r - 1     from the noisiest step on
        leading   k = (N - 1 - i) r   down to the cleanest step, k = 0
        linspace  k = (1 - i / (N - 1)) (K - 1), both

    N = K is all of the chain, whichever it is.

    Attributes:
      num_timesteps: K, that of the schedule `discrete_beta`.
      spacing: 'trailing', 'leading' or 'linspace'.

    Raises:
      ValueError: num_timesteps is below 2, or spacing another word.
    """

    num_timesteps: int = 1000
    spacing: str = "trailing"

    def __post_init__(self):
        if self.num_timesteps < 2:
            raise ValueError(
                f"num_timesteps: must be at least 2, got {self.num_timesteps}."
            )
        if self.spacing not in ("trailing", "leading", "linspace"):
            raise ValueError(
                "spacing: expected trailing, leading or linspace, got "
                f"{self.spacing!r}."
            )

    def __call__(self, schedule: Schedule, num_steps: int) -> Array:
        number = self.num_timesteps
        if num_steps > number:
            raise ValueError(
                f"num_steps: {num_steps} are more than the chain's {number}."
            )
        if getattr(schedule, "num_timesteps", number) != number:
            raise ValueError(
                f"grid.num_timesteps: is {number}, but the schedule's chain has "
                f"{schedule.num_timesteps}."
            )
        i = np.arange(num_steps)
        k = {
            "trailing": number - i * number / num_steps - 1,
            "leading": np.floor(number / num_steps) * i[::-1],
            "linspace": (1 - i / max(num_steps - 1, 1)) * (number - 1),
        }[self.spacing]
        return _to_zero(jnp.asarray(np.round(k) / (number - 1), jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Custom:
    """A list of times.

    Attributes:
      times: num_steps + 1 of them, strictly from 1 down to 0.

    Raises:
      ValueError: the list is not that.
    """

    times: tuple

    def __post_init__(self):
        steps = np.diff(np.asarray(self.times, np.float32))
        if len(steps) == 0 or self.times[0] != 1 or self.times[-1] != 0:
            raise ValueError(f"times: must lead from 1 to 0, got {self.times}.")
        if not np.all(steps < 0):
            raise ValueError(f"times: must decrease strictly, got {self.times}.")

    def __call__(self, schedule: Schedule, num_steps: int) -> Array:
        if len(self.times) != num_steps + 1:
            raise ValueError(
                f"grid.times: {num_steps} steps need {num_steps + 1} times, got "
                f"{len(self.times)}."
            )
        return np.asarray(self.times, np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class From:
    """Another grid between a noise level and t = 0: every time times the first one.

    A generator is a denoiser that starts from noise at a level of its own, below t = 1.

    Attributes:
      first_logsnr: of the first stop.
      grid: the grid whose times are scaled; None is uniform.
    """

    first_logsnr: float
    grid: Grid | None = None

    def __call__(self, schedule: Schedule, num_steps: int) -> Array:
        ends = [float(schedule.logsnr(jnp.float32(t))) for t in (1.0, 0.0)]
        if not ends[0] <= self.first_logsnr < ends[1]:
            raise ValueError(
                f"grid.first_logsnr: must be between the ends {ends[0]:.4g} and "
                f"{ends[1]:.4g} of the schedule, got {self.first_logsnr}."
            )
        first = schedule.inverse(jnp.float32(self.first_logsnr))
        return first * (self.grid or Uniform())(schedule, num_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shifted:
    """Equation 3: `shift` above 1 moves the stops towards noise.

    Under the flow schedule it adds 2 log(1 / shift) to the logsnr of every stop.

    Attributes:
      shift: the ratio; 1 changes nothing.
      grid: the grid whose times are moved; None is uniform.

    Raises:
      ValueError: shift is not positive.
    """

    shift: float
    grid: Grid | None = None

    def __post_init__(self):
        if self.shift <= 0:
            raise ValueError(f"shift: must be positive, got {self.shift}.")

    def __call__(self, schedule: Schedule, num_steps: int) -> Array:
        t = (self.grid or Uniform())(schedule, num_steps)
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)


def tau(schedule: Schedule, t: Array) -> Array:
    """Returns sigma / (alpha + sigma), shaped as t, exact at both ends."""
    return jax.nn.sigmoid(-0.5 * schedule.logsnr(jnp.asarray(t, jnp.float32)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Straight:
    """Equal steps in sigma / (alpha + sigma), the time of a straight flow.

    DDIM on it is Euler's method with equal steps for z / (alpha + sigma).
    """

    def __call__(self, schedule: Schedule, num_steps: int) -> Array:
        u = jnp.asarray(_u(num_steps)[1:-1])
        inner = schedule.inverse(2.0 * (jnp.log1p(-u) - jnp.log(u)))
        return jnp.concatenate([jnp.ones(1), inner, jnp.zeros(1)])
