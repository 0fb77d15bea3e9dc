"""The laws from which training times are drawn.

A law returns times and an importance weight for each; the loss is the mean of
weight * loss(t). Weight 1 trains on the law as it is; the weight 1 / density corrects
it back to uniform t, the law under which `objectives/weightings.py` states its factors.

Every law is stratified by default over the batch: t_i is the quantile of
(u + i / B) mod 1 with one u ~ U(0, 1), so each t_i alone has the law asked for and the
batch covers it evenly.

A law of the noise level has, with l = logsnr(t) and its density p(l), the density

    p(t) = -l'(t) p(l)                                                              (1)

and, of p, only the part between the two ends of the schedule.

Source: Kingma, Salimans, Poole and Ho 2021 (arXiv 2107.00630) for the
stratified times; Esser et al. 2024 (arXiv 2403.03206), section 3.1, for the
logit-normal law; Karras et al. 2022 (arXiv 2206.00364), table 1, for the log-normal
one; Ho, Jain and Abbeel 2020 (arXiv 2006.11239), algorithm 1, for the discrete one.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from diffusionlab.schedules import base
from diffusionlab.types import Array, Schedule

_HALF_STEP = 2.0**-24  # of float32 at 1; the quantiles 0 and 1 may be infinite


def quantiles(key: Array, batch_size: int, stratified: bool) -> Array:
    """Returns `[B]` in [0, 1), each uniform, spread evenly if `stratified`."""
    if not stratified:
        return jax.random.uniform(key, (batch_size,))
    strata = jnp.arange(batch_size, dtype=jnp.float32) / batch_size
    return (jax.random.uniform(key) + strata) % 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform:
    """t ~ U(0, 1), weight 1.

    Attributes:
      stratified: spread the times of a batch evenly.
    """

    stratified: bool = True

    def sample(
        self, key: Array, batch_size: int, schedule: Schedule
    ) -> tuple[Array, Array]:
        """Returns t `[B]` in [0, 1) and weights `[B]`, all 1; both float32."""
        t = quantiles(key, batch_size, self.stratified)
        return t, jnp.ones_like(t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """logit(t) ~ N(mean, std²), with t = 1 noise.

    Attributes:
      mean: above 0 draws more noisy times.
      std: standard deviation of logit(t).
      stratified: spread the times of a batch evenly.
      as_uniform: weight by 1 / density, so that the expected loss is the one of uniform
        t. The weights have a heavy tail: only the clipping of the quantiles keeps
        their variance finite. The published method is False: weight 1.

    Raises:
      ValueError: std is not positive.
    """

    mean: float = 0.0
    std: float = 1.0
    stratified: bool = True
    as_uniform: bool = False

    def __post_init__(self):
        if self.std <= 0:
            raise ValueError(f"std: must be positive, got {self.std}.")

    def sample(
        self, key: Array, batch_size: int, schedule: Schedule
    ) -> tuple[Array, Array]:
        """Returns t `[B]` in (0, 1) and weights `[B]`; both float32."""
        quantile = quantiles(key, batch_size, self.stratified)
        quantile = jnp.clip(quantile, _HALF_STEP, 1.0 - _HALF_STEP)
        normal = math.sqrt(2.0) * jax.lax.erf_inv(2.0 * quantile - 1.0)
        logit = self.mean + self.std * normal
        t = jax.nn.sigmoid(logit)
        if not self.as_uniform:
            return t, jnp.ones_like(t)
        log_weight = (
            jax.nn.log_sigmoid(logit)
            + jax.nn.log_sigmoid(-logit)
            + 0.5 * normal**2
            + math.log(self.std * math.sqrt(2.0 * math.pi))
        )
        return t, jnp.exp(log_weight)


def _ends(schedule: Schedule) -> tuple[Array, Array]:
    """Returns the logsnr at t = 0 and at t = 1."""
    return schedule.logsnr(jnp.float32(0.0)), schedule.logsnr(jnp.float32(1.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogNormal:
    """log(sigma / alpha) ~ N(mean, std²), between the ends of the schedule.

    Attributes:
      mean, std: of -logsnr / 2; the defaults are EDM's.
      stratified: spread the times of a batch evenly.
      as_uniform: weight by 1 / density, equation 1, so that the expected loss is the
        one of uniform t. The published method is False: weight 1.

    Raises:
      ValueError: std is not positive.
    """

    mean: float = -1.2
    std: float = 1.2
    stratified: bool = True
    as_uniform: bool = False

    def __post_init__(self):
        if self.std <= 0:
            raise ValueError(f"std: must be positive, got {self.std}.")

    def sample(
        self, key: Array, batch_size: int, schedule: Schedule
    ) -> tuple[Array, Array]:
        """Returns t `[B]` in [0, 1] and weights `[B]`; both float32."""
        low, high = (
            jax.scipy.special.ndtr((-0.5 * logsnr - self.mean) / self.std)
            for logsnr in _ends(schedule)
        )
        quantile = low + (high - low) * quantiles(key, batch_size, self.stratified)
        quantile = jnp.clip(quantile, _HALF_STEP, 1.0 - _HALF_STEP)
        normal = jax.scipy.special.ndtri(quantile)
        t = schedule.inverse(-2.0 * (self.mean + self.std * normal))
        if not self.as_uniform:
            return t, jnp.ones_like(t)
        inverse_density = jnp.exp(0.5 * normal**2) * self.std * math.sqrt(2 * math.pi)
        # -l' / 2 is the slope of log(sigma / alpha).
        slope = -0.5 * schedule.derivative(t)
        return t, (high - low) * inverse_density / slope


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogsnrUniform:
    """logsnr ~ U, between the ends of the schedule or within a part of them.

    Attributes:
      logsnr_min, logsnr_max: the part; None is the schedule's own end, and so is a
        number beyond it.
      stratified: spread the times of a batch evenly.
      as_uniform: weight by 1 / density, equation 1, so that the expected loss is the
        one of uniform t between the two. False: weight 1.

    Raises:
      ValueError: logsnr_min is not below logsnr_max.
    """

    logsnr_min: float | None = None
    logsnr_max: float | None = None
    stratified: bool = True
    as_uniform: bool = False

    def __post_init__(self):
        if self.logsnr_min is not None and self.logsnr_max is not None:
            base.check_range(self.logsnr_min, self.logsnr_max)

    def sample(
        self, key: Array, batch_size: int, schedule: Schedule
    ) -> tuple[Array, Array]:
        """Returns t `[B]` in [0, 1] and weights `[B]`; both float32."""
        high, low = _ends(schedule)
        if self.logsnr_max is not None:
            high = jnp.minimum(high, self.logsnr_max)
        if self.logsnr_min is not None:
            low = jnp.maximum(low, self.logsnr_min)
        quantile = quantiles(key, batch_size, self.stratified)
        t = schedule.inverse(high + (low - high) * quantile)
        if not self.as_uniform:
            return t, jnp.ones_like(t)
        part = schedule.inverse(low) - schedule.inverse(high)
        return t, (high - low) / (-schedule.derivative(t) * part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discrete:
    """t uniform on k / (K - 1), k = 0 ... K - 1, weight 1: the steps of a chain.

    Attributes:
      num_timesteps: K; that of the schedule `discrete_beta` trains on its steps alone.
      stratified: spread the times of a batch evenly.

    Raises:
      ValueError: fewer than 2 steps.
    """

    num_timesteps: int = 1000
    stratified: bool = True

    def __post_init__(self):
        if self.num_timesteps < 2:
            raise ValueError(
                f"num_timesteps: must be at least 2, got {self.num_timesteps}."
            )

    def sample(
        self, key: Array, batch_size: int, schedule: Schedule
    ) -> tuple[Array, Array]:
        """Returns t `[B]` in [0, 1] and weights `[B]`, all 1; both float32."""
        quantile = quantiles(key, batch_size, self.stratified)
        # The product may round up to K.
        step = jnp.minimum(
            jnp.floor(quantile * self.num_timesteps), self.num_timesteps - 1
        )
        t = step / (self.num_timesteps - 1)
        return t, jnp.ones_like(t)
