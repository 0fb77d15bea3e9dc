"""Guidance by another run: a weaker network, or a classifier of noisy data.

    x_w = x_ref + w (x - x_ref),   eps likewise,   w = 1 is off                     (1)

    eps_s = eps - s sigma grad log p(y | z_t)                                       (2)
    x_s = x + s sigma² / alpha grad log p(y | z_t),   s = 0 is off                  (3)

with the gradient in z_t; (2) and (3) agree, alpha x + sigma eps stays z_t. As the score
is -eps / sigma, Bayes' rule makes of an unconditional eps the conditional one at s = 1.
On an unconditional prediction s is the w of classifier-free guidance, on a conditional
one it is w - 1: hence another name than `guidance_scale`.

The other run has the same schedule, data shape and classes, so that z_t and the label
mean the same to it; its network and its prediction type are its own.

Source: Karras et al. 2024 (arXiv 2406.02507), equation 3, for (1); Dhariwal and Nichol
2021 (arXiv 2105.05233), section 4.2, for (2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoguidance:
    """Equation 1: away from a worse version of the network. One evaluation more.

    Attributes:
      reference: run directory of the worse network: smaller, or trained for less.
      ema: its average by name, 'none', or 'sigma_rel=WIDTH'; '' is its default.
      step: its checkpoint; None is the newest.
      guidance_scale: w; 1 returns `predict` itself, and reads nothing.
      logsnr_min, logsnr_max: ends of the interval; None is open. An empty interval
        returns `predict` itself.
    """

    reference: str
    ema: str = ""
    step: int | None = None
    guidance_scale: float = 1.0
    logsnr_min: float | None = None
    logsnr_max: float | None = None

    asks = "predict"
    processes = ("gaussian", "categorical")

    @property
    def off(self) -> bool:
        """Whether it returns `predict` itself."""
        empty = base.is_empty(self.logsnr_min, self.logsnr_max)
        return self.guidance_scale == 1.0 or empty

    def __call__(
        self,
        predict: CondPredict,
        process: Process,
        spec: DataSpec,
        reference: CondPredict | None = None,
    ) -> CondPredict:
        """Returns the guided `predict`; `reference` is that of the other run."""
        if self.off:
            return predict

        def both(z_t: Array, t: Array, cond: Cond) -> tuple[Prediction, Prediction]:
            own, weak = predict(z_t, t, cond), reference(z_t, t, cond)
            return base.extrapolate(weak, own, self.guidance_scale), own

        return base.within(both, predict, process, self.logsnr_min, self.logsnr_max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier:
    """Equations 2 and 3, with p from a run of the objective noisy_classification.

    Costs the classifier forward and backward. The null class gets no gradient.

    Attributes:
      reference: run directory of the classifier.
      ema: its average by name, 'none', or 'sigma_rel=WIDTH'; '' is its default.
      step: its checkpoint; None is the newest.
      classifier_scale: s; 0 is `predict` without a gradient, and reads nothing.
      unconditional: `predict` is asked without its label, the classifier with it; at
        a scale of 0, too.
      logsnr_min, logsnr_max: ends of the interval; None is open. An empty interval is
        a scale of 0.
    """

    reference: str
    ema: str = ""
    step: int | None = None
    classifier_scale: float = 0.0
    unconditional: bool = False
    logsnr_min: float | None = None
    logsnr_max: float | None = None

    asks = "log_probs"

    @property
    def off(self) -> bool:
        """Whether it needs no classifier."""
        empty = base.is_empty(self.logsnr_min, self.logsnr_max)
        return self.classifier_scale == 0.0 or empty

    @property
    def needs_null_label(self) -> bool:
        """Whether the network must have been trained without labels, too."""
        return self.unconditional

    def __call__(
        self,
        predict: CondPredict,
        process: Process,
        spec: DataSpec,
        reference: Callable[[Array, Array, Cond], Array] | None = None,
    ) -> CondPredict:
        """Returns the guided `predict`; its cond has 'label' `[B]`.

        Args:
          predict: what is guided.
          process: of both runs.
          spec: of the data.
          reference: `(z_t, t, cond) -> log p(y | z_t) [B, num_classes]`.

        Raises:
          ValueError: the scale is not 0 and the data have no classes.
        """
        if not self.off and not spec.num_classes:
            raise ValueError(
                f"classifier_scale: {self.classifier_scale} needs labels, and the "
                "data have no classes; use 0."
            )

        def without_label(z_t: Array, t: Array, cond: Cond) -> Prediction:
            return predict(z_t, t, base.with_null_label(cond, spec))

        plain = without_label if self.unconditional and spec.num_classes else predict
        if self.off:
            return plain

        def both(z_t: Array, t: Array, cond: Cond) -> tuple[Prediction, Prediction]:
            label = cond["label"]
            known = label < spec.num_classes

            def log_prob(z: Array) -> Array:
                every = reference(z, t, cond)
                index = jnp.where(known, label, 0)[:, None]
                own = jnp.take_along_axis(every, index, axis=1)[:, 0]
                return jnp.sum(jnp.where(known, own, 0.0))

            own = plain(z_t, t, cond)
            step = self.classifier_scale * jax.grad(log_prob)(z_t)
            alpha, sigma = (lift(q, z_t.ndim) for q in process.schedule.alpha_sigma(t))
            guided = Prediction(own.x + sigma**2 / alpha * step, own.eps - sigma * step)
            return guided, own

        return base.within(both, plain, process, self.logsnr_min, self.logsnr_max)
