"""What transforms of `predict(z_t, t, cond)` share: their order, and the interval.

They are applied in the order of the registry, the first one innermost, so each guides
the result of those above it. What one evaluation then costs, in network evaluations:

    classifier_free     one more inside its interval, in one batch or in two
    autoguidance        one of the reference inside its interval
    classifier          the classifier forward and backward inside its interval
    dynamic_threshold   nothing
    clip_x              nothing
    cads                nothing; outermost, so that all above see the corrupted label,
                        the reference of autoguidance included

A transform that is off returns `predict` itself, or, a classifier's that is asked to
leave the label out, `predict` without it. `t` is a scalar, as in sampling, or
`[B]`, as in evaluation; only a scalar t saves the evaluations outside an interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from diffusionlab.types import (
    Array,
    CategoricalPrediction,
    Cond,
    CondPredict,
    DataSpec,
    Prediction,
    Process,
    lift,
)

Both = Callable[[Array, Array, Cond], tuple[Prediction, Prediction]]
"""(z_t, t, cond) -> the guided prediction, and the one it was made from."""


class Guidance(Protocol):
    """CondPredict -> CondPredict, for data of one kind under one process.

    One that needs another run has, beside `off`, the fields `reference` (its
    directory), `ema` and `step`, and says in `asks` which function of that run's
    objective it calls: it gets this function, `(z_t, t, cond) -> ...`, as a fourth
    argument. One that needs a prediction without a label has `needs_null_label`.
    """

    def __call__(
        self, predict: CondPredict, process: Process, spec: DataSpec
    ) -> CondPredict: ...


def compose(
    transforms: Sequence[Guidance],
    predict: CondPredict,
    process: Process,
    spec: DataSpec,
    references: Sequence[Callable[..., Any] | None] | None = None,
) -> CondPredict:
    """Returns `predict` after each transform in turn, the first one innermost.

    Args:
      transforms: in their order.
      predict: the network's.
      process: under which it was trained.
      spec: of the data.
      references: for each transform, what it asks of another run; None where it asks
        nothing.
    """
    references = references or [None] * len(transforms)
    if any(getattr(transform, "corrupts_labels", False) for transform in transforms):
        predict = _heard(predict)
    for transform, reference in zip(transforms, references, strict=True):
        if not hasattr(transform, "reference"):
            predict = transform(predict, process, spec)
            continue
        if reference is not None and transform.asks == "predict":
            reference = _heard(reference)
        predict = transform(predict, process, spec, reference)
    return predict


def _heard(predict: CondPredict) -> CondPredict:
    """Raises ValueError, when traced, if a network ignores the noise on its label."""

    def checked(z_t: Array, t: Array, cond: Cond) -> Prediction:
        noise = cond.get("label_noise")
        before = noise.uses.count if noise is not None else -1
        prediction = predict(z_t, t, cond)
        if noise is not None and noise.uses.count == before:
            raise ValueError(
                "config.guidance.cads: the network does not embed its label through "
                "models/layers.py's Embedding, so it would ignore the noise; leave "
                "cads out, or take a network that does: dit, mlp, uvit."
            )
        return prediction

    return checked


def is_empty(logsnr_min: float | None, logsnr_max: float | None) -> bool:
    """Whether no logsnr lies in the interval; None is an open end."""
    return None not in (logsnr_min, logsnr_max) and logsnr_min > logsnr_max


def within(
    both: Both,
    predict: CondPredict,
    process: Process,
    logsnr_min: float | None,
    logsnr_max: float | None,
) -> CondPredict:
    """Returns the guided prediction where logsnr_min <= logsnr <= logsnr_max.

    Elsewhere it is that of `predict`; for a scalar t nothing else is computed there.

    Source: Kynkäänniemi et al. 2024 (arXiv 2404.07724).

    Args:
      both: the guided prediction, and that of `predict`.
      predict: what is guided.
      process: knows the schedule.
      logsnr_min, logsnr_max: None is an open end.
    """
    low = -math.inf if logsnr_min is None else logsnr_min
    high = math.inf if logsnr_max is None else logsnr_max
    everywhere = lambda z_t, t, cond: both(z_t, t, cond)[0]  # noqa: E731
    if math.isinf(low) and math.isinf(high):
        return everywhere

    def in_interval(z_t: Array, t: Array, cond: Cond) -> Prediction:
        logsnr = process.schedule.logsnr(t)
        inside = (logsnr >= low) & (logsnr <= high)
        if logsnr.ndim == 0:
            return jax.lax.cond(inside, everywhere, predict, z_t, t, cond)
        guided, plain = both(z_t, t, cond)
        inside = lift(inside, z_t.ndim)
        return jax.tree.map(lambda g, p: jnp.where(inside, g, p), guided, plain)

    return in_interval


def extrapolate(weak: Prediction, strong: Prediction, scale: float) -> Prediction:
    """Returns weak + scale (strong - weak): of x and eps, or log-probabilities."""
    found = jax.tree.map(lambda w, s: w + scale * (s - w), weak, strong)
    if isinstance(found, CategoricalPrediction):
        return CategoricalPrediction(jax.nn.log_softmax(found.logits))
    return found


def with_null_label(cond: Cond, spec: DataSpec) -> Cond:
    """Returns `cond` with the null class, `num_classes`, for every label."""
    return {**cond, "label": jnp.full_like(cond["label"], spec.num_classes)}
