"""The laws from which training times are drawn.

A law returns times and an importance weight for each; the loss is the mean of
weight * loss(t). Weight 1 trains on the law as it is; the weight 1 / density corrects
it back to uniform t, the law under which `objectives/weightings.py` states its factors.

Both laws are stratified by default over the batch: t_i is the quantile of
(u + i / B) mod 1 with one u ~ U(0, 1), so each t_i alone has the law asked for and the
batch covers it evenly.

Source: Kingma, Salimans, Poole and Ho 2021 (arXiv 2107.00630) for the
stratified times; Esser et al. 2024 (arXiv 2403.03206), section 3.1, for the
logit-normal law.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from diffusionlab.types import Array, Schedule


def _quantiles(key: Array, batch_size: int, stratified: bool) -> Array:
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
        t = _quantiles(key, batch_size, self.stratified)
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
        # The quantiles 0 and 1 are infinite; 2^-24 is the half-step of float32 at 1.
        quantile = _quantiles(key, batch_size, self.stratified)
        quantile = jnp.clip(quantile, 2.0**-24, 1.0 - 2.0**-24)
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
