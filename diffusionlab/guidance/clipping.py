"""The predicted x kept in the range of the data, by clipping and by thresholding.

Clipped is the value only. The derivative is that of the unclipped prediction
(straight-through), because samplers and guidance differentiate through `predict`, and a
derivative of zero wherever x leaves the range would cut them off.

Source: Saharia et al. 2022 (arXiv 2205.11487), section 2.3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusionlab.types import (
    Array,
    Cond,
    CondPredict,
    DataSpec,
    Prediction,
    Process,
    lift,
)


@jax.custom_jvp
def straight_through(x: Array, value: Array) -> Array:
    """Returns `value` with the derivative of `x`, forward and backward."""
    return value


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    # Not x + stop_gradient(value - x): that misses `value` by a rounding.
    return primals[1], tangents[0]


def _replace_x(
    predict: CondPredict, process: Process, change: Callable[[Array], Array]
) -> CondPredict:
    """Returns `predict` with x changed, and with eps = (z_t - alpha x) / sigma."""

    def changed(z_t: Array, t: Array, cond: Cond) -> Prediction:
        prediction = predict(z_t, t, cond)
        x = change(prediction.x)
        alpha, sigma = (lift(q, x.ndim) for q in process.schedule.alpha_sigma(t))
        eps = (z_t - alpha * x) / sigma
        # Where x stays, so does eps: the formula loses its digits near t = 0.
        eps = jnp.where(x == prediction.x, prediction.eps, eps)
        return Prediction(
            straight_through(prediction.x, x), straight_through(prediction.eps, eps)
        )

    return changed


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipX:
    """Clips the predicted x and makes eps agree: eps = (z_t - alpha x) / sigma.

    Where nothing is clipped the prediction is unchanged; the derivative is everywhere
    that of the unclipped prediction. No network evaluations.

    Attributes:
      low, high: range of the data.

    Raises:
      ValueError: low is not below high.
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(f"low: must be below high = {self.high}, got {self.low}.")

    def __call__(
        self, predict: CondPredict, process: Process, spec: DataSpec
    ) -> CondPredict:
        """Returns the clipped `predict`."""
        clip = lambda x: jnp.clip(x, self.low, self.high)  # noqa: E731
        return _replace_x(predict, process, clip)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicThreshold:
    """Clips x to [-s, s] and scales by limit / s, for s = max(limit, quantile of |x|).

    The quantile is that of one example's entries. Data lie in [-limit, limit]: an
    example with fewer than 1 - quantile of its entries outside is only clipped, and one
    that lies within is unchanged. eps = (z_t - alpha x) / sigma agrees; the derivative
    is everywhere that of the unclipped prediction. No network evaluations.

    Attributes:
      quantile: in (0, 1]; 1 is the largest entry.
      limit: range of the data.

    Raises:
      ValueError: quantile outside (0, 1], or limit not positive.
    """

    quantile: float = 0.995
    limit: float = 1.0

    def __post_init__(self):
        if not 0 < self.quantile <= 1:
            raise ValueError(f"quantile: must be in (0, 1], got {self.quantile}.")
        if not self.limit > 0:
            raise ValueError(f"limit: must be positive, got {self.limit}.")

    def __call__(
        self, predict: CondPredict, process: Process, spec: DataSpec
    ) -> CondPredict:
        """Returns the thresholded `predict`."""

        def threshold(x: Array) -> Array:
            size = jnp.abs(x).reshape(x.shape[0], -1)
            s = jnp.maximum(jnp.quantile(size, self.quantile, axis=1), self.limit)
            s = lift(s, x.ndim)
            return jnp.clip(x, -s, s) * (self.limit / s)

        return _replace_x(predict, process, threshold)
