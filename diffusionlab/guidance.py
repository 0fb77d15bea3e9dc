"""Guidance: transforms of `predict(z_t, t, cond)`, applied one after the other.

    x_w = x_uncond + w (x_cond - x_uncond),   w = 1 is off                          (1)

and the same for eps. At one z_t the map between x, eps and v is affine, so (1) is the
same guidance in each of them.

Source: Ho and Salimans 2022 (arXiv 2207.12598), whose scale is w - 1; Kynkäänniemi et
al. 2024 (arXiv 2404.07724) for the interval; Saharia et al. 2022 (arXiv 2205.11487),
section 2.3, for clipping x.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

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


class Guidance(Protocol):
    """CondPredict -> CondPredict, for data of one kind under one process."""

    def __call__(
        self, predict: CondPredict, process: Process, spec: DataSpec
    ) -> CondPredict: ...


def compose(
    transforms: Sequence[Guidance],
    predict: CondPredict,
    process: Process,
    spec: DataSpec,
) -> CondPredict:
    """Returns `predict` after each transform in turn, the first one innermost."""
    for transform in transforms:
        predict = transform(predict, process, spec)
    return predict


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierFree:
    """Equation 1 where logsnr_min <= logsnr <= logsnr_max, else x_cond.

    Inside the interval both predictions come from one doubled batch; outside, where t
    is a scalar as in sampling, the unconditional one is not computed.

    Attributes:
      guidance_scale: w; 1 returns `predict` itself.
      logsnr_min, logsnr_max: ends of the interval; None is open. An empty interval
        returns `predict` itself.
    """

    guidance_scale: float = 1.0
    logsnr_min: float | None = None
    logsnr_max: float | None = None

    def __call__(
        self, predict: CondPredict, process: Process, spec: DataSpec
    ) -> CondPredict:
        """Returns the guided `predict`; its cond has 'label' `[B]`.

        Raises:
          ValueError: the scale is not 1 and the data have no classes.
        """
        if self.guidance_scale == 1.0:
            return predict
        if not spec.num_classes:
            raise ValueError(
                f"guidance_scale: {self.guidance_scale} needs labels, and the data "
                "have no classes; use 1."
            )
        low = -math.inf if self.logsnr_min is None else self.logsnr_min
        high = math.inf if self.logsnr_max is None else self.logsnr_max
        if low > high:
            return predict

        def everywhere(z_t: Array, t: Array, cond: Cond) -> Prediction:
            guided, _ = self._both(predict, spec, z_t, t, cond)
            return guided

        def in_interval(z_t: Array, t: Array, cond: Cond) -> Prediction:
            logsnr = process.schedule.logsnr(t)
            inside = (logsnr >= low) & (logsnr <= high)
            if logsnr.ndim == 0:
                return jax.lax.cond(inside, everywhere, predict, z_t, t, cond)
            guided, conditional = self._both(predict, spec, z_t, t, cond)
            inside = lift(inside, z_t.ndim)
            return jax.tree.map(
                lambda g, c: jnp.where(inside, g, c), guided, conditional
            )

        unbounded = math.isinf(low) and math.isinf(high)
        return everywhere if unbounded else in_interval

    def _both(
        self, predict: CondPredict, spec: DataSpec, z_t: Array, t: Array, cond: Cond
    ) -> tuple[Prediction, Prediction]:
        """Returns the guided and the conditional prediction, from one doubled batch."""
        null = jnp.full_like(cond["label"], spec.num_classes)
        cond = {name: jnp.concatenate([q, q]) for name, q in cond.items()} | {
            "label": jnp.concatenate([cond["label"], null])
        }
        t = jnp.asarray(t)
        t = jnp.concatenate([t, t]) if t.ndim else t
        doubled = predict(jnp.concatenate([z_t, z_t]), t, cond)
        size = z_t.shape[0]
        conditional = Prediction(*(q[:size] for q in doubled))
        guided = Prediction(
            *(q[size:] + self.guidance_scale * (q[:size] - q[size:]) for q in doubled)
        )
        return guided, conditional


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipX:
    """Clips the predicted x and makes eps agree: eps = (z_t - alpha x) / sigma.

    Where nothing is clipped the prediction is unchanged.

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

        def clipped(z_t: Array, t: Array, cond: Cond) -> Prediction:
            prediction = predict(z_t, t, cond)
            x = jnp.clip(prediction.x, self.low, self.high)
            alpha, sigma = (lift(q, x.ndim) for q in process.schedule.alpha_sigma(t))
            eps = (z_t - alpha * x) / sigma
            return Prediction(x, jnp.where(x == prediction.x, prediction.eps, eps))

        return clipped
