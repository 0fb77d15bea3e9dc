"""Classifier-free guidance, in an interval of noise levels, and rescaled.

    x_w = x_uncond + w (x_cond - x_uncond),   w = 1 is off                          (1)

and the same for eps. At one z_t the map between x, eps and v is affine, so (1) is the
same guidance in each of them. With `rescale` = phi, raw being what the network answers
and std that of one example's entries,

    raw = phi raw_w std(raw_cond) / std(raw_w) + (1 - phi) raw_w                    (2)

which is not the same in each space.

Source: Ho and Salimans 2022 (arXiv 2207.12598), whose scale is w - 1, for (1);
Kynkäänniemi et al. 2024 (arXiv 2404.07724) for the interval; Lin et al. 2023
(arXiv 2305.08891), equations 15 and 16, for (2).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffusionlab.guidance import base
from diffusionlab.types import (
    Array,
    Cond,
    CondPredict,
    DataSpec,
    Prediction,
    Process,
    lift,
)

_TINY = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierFree:
    """Equation 1 where logsnr_min <= logsnr <= logsnr_max, else x_cond.

    Inside the interval both predictions come from one doubled batch, or from two calls;
    outside, where t is a scalar as in sampling, the unconditional one is not computed.

    Attributes:
      guidance_scale: w; 1 returns `predict` itself.
      logsnr_min, logsnr_max: ends of the interval; None is open. An empty interval
        returns `predict` itself.
      two_pass: call the network twice instead of on a doubled batch: less memory, the
        same numbers to rounding.
      rescale: phi of equation 2, in [0, 1]; 0 is off.

    Raises:
      ValueError: rescale outside [0, 1].
    """

    guidance_scale: float = 1.0
    logsnr_min: float | None = None
    logsnr_max: float | None = None
    two_pass: bool = False
    rescale: float = 0.0

    processes = ("gaussian", "categorical")

    def __post_init__(self):
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale: must be in [0, 1], got {self.rescale}.")

    @property
    def off(self) -> bool:
        """Whether it returns `predict` itself."""
        empty = base.is_empty(self.logsnr_min, self.logsnr_max)
        return self.guidance_scale == 1.0 or empty

    @property
    def needs_null_label(self) -> bool:
        """Whether the network must have been trained without labels, too."""
        return self.guidance_scale != 1.0

    def __call__(
        self, predict: CondPredict, process: Process, spec: DataSpec
    ) -> CondPredict:
        """Returns the guided `predict`; its cond has 'label' `[B]`.

        Raises:
          ValueError: the scale is not 1 and the data have no classes.
        """
        if self.guidance_scale != 1.0 and not spec.num_classes:
            raise ValueError(
                f"guidance_scale: {self.guidance_scale} needs labels, and the data "
                "have no classes; use 1."
            )
        if self.rescale and not hasattr(process, "target"):
            raise ValueError("rescale: is for the process gaussian; use 0.")
        if self.off:
            return predict

        def both(z_t: Array, t: Array, cond: Cond) -> tuple[Prediction, Prediction]:
            conditional, unconditional = self._pair(predict, spec, z_t, t, cond)
            guided = base.extrapolate(unconditional, conditional, self.guidance_scale)
            if self.rescale:
                guided = self._rescaled(process, guided, conditional, z_t, t)
            return guided, conditional

        return base.within(both, predict, process, self.logsnr_min, self.logsnr_max)

    def _pair(
        self, predict: CondPredict, spec: DataSpec, z_t: Array, t: Array, cond: Cond
    ) -> tuple[Prediction, Prediction]:
        """Returns the conditional and the unconditional prediction."""
        null = base.with_null_label(cond, spec)
        if self.two_pass:
            return predict(z_t, t, cond), predict(z_t, t, null)
        twice = jax.tree.map(lambda *pair: jnp.concatenate(pair), cond, null)
        t = jnp.asarray(t)
        t = jnp.concatenate([t, t]) if t.ndim else t
        doubled = predict(jnp.concatenate([z_t, z_t]), t, twice)
        size = z_t.shape[0]
        return (
            jax.tree.map(lambda q: q[:size], doubled),
            jax.tree.map(lambda q: q[size:], doubled),
        )

    def _rescaled(
        self,
        process: Process,
        guided: Prediction,
        conditional: Prediction,
        z_t: Array,
        t: Array,
    ) -> Prediction:
        """Returns equation 2 as (x, eps)."""
        t = jnp.broadcast_to(t, z_t.shape[:1])
        raw, wanted = (process.target(*p, t) for p in (guided, conditional))
        entries = tuple(range(1, raw.ndim))
        # An example of one entry has no deviation: it stays as it is.
        have, want = jnp.std(raw, entries), jnp.std(wanted, entries)
        factor = jnp.where(have > _TINY, want / jnp.maximum(have, _TINY), 1.0)
        factor = self.rescale * factor + (1.0 - self.rescale)
        return process.predict(lift(factor, raw.ndim) * raw, z_t, t)
