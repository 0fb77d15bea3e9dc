"""Samplers against each other: quality by the number of evaluations of `predict`.

An evaluation is one call of the sampler's `predict` for a sample: guidance, such as
classifier-free, may call the network more than once in it.

The main number works for any data. With mean m and covariance C of the flattened
samples (1) and of as many held-out examples (2), the Frechet distance of gaussians is

    d² = |m_1 - m_2|² + tr(C_1 + C_2 - 2 (C_1^1/2 C_2 C_1^1/2)^1/2)                 (1)

Source: Dowson and Landau 1982 for (1); Heusel et al. 2017 (arXiv 1706.08500) for its
use, there on the features of a classifier and here on the data themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusionlab import keys as keys_lib
from diffusionlab import pictures, samplers, types
from diffusionlab.evals import arrays
from diffusionlab.evals import samples as samples_lib
from diffusionlab.evals.precision_recall import flat
from diffusionlab.samplers import base

_MAX_DIMENSION = 1024
_NUM_MEASURED = 64  # examples whose evaluations are counted, of an adaptive sampler
# The other count of a sampler whose evaluations are not all plain: without the
# Jacobian-vector products.
_PLAIN_COUNT = "num_predictions"


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Returns d of equation 1 for rows `[N, D]`, computed in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    first, second = (np.atleast_2d(np.cov(q, rowvar=False)) for q in (a, b))
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    middle = np.linalg.eigvalsh(root @ second @ root)
    square = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(first + second)
    square -= 2 * np.sum(np.sqrt(np.maximum(middle, 0)))
    return float(np.sqrt(max(square, 0.0)))


class Point(NamedTuple):
    """One sampler at one budget.

    Attributes:
      label: of the sampler.
      sampler: with its steps.
      count: evaluations; None if they have to be measured.
      plain: the same without Jacobian-vector products; equal where there are none.
    """

    label: str
    sampler: Any
    count: int | None
    plain: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerComparison:
    """Draws with every sampler at every budget, from the same noise.

    Numbers, `<sampler>/<evaluations>/<metric>`, and the same for real training examples
    as `real/<metric>`:

      frechet: d of equation 1, in units of the data; smaller is better.
      agreement: share recognised as the class asked for, see `Samples`; with labels.

    At a budget a sampler makes the most steps that need no more evaluations; equal
    counts are drawn once. One that counts Jacobian-vector products has a second curve
    without them. An adaptive one is run at each of `tolerances`, at its measured mean
    count, with ` (<tolerance>)` after it where another has the same. One that cannot
    work here is in the notes with its reason.

    Attributes:
      samplers: blocks; empty is every registered one with its defaults.
      num_evaluations: budgets.
      tolerances: rtol and atol of adaptive samplers.
      num_samples: samples of each, and held-out examples at most.
      every: steps between evaluations; 0 is at the end only.
    """

    samplers: tuple = ()
    num_evaluations: tuple[int, ...] = (4, 8, 16, 32, 64)
    tolerances: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4)
    num_samples: int = 1000
    every: int = 0

    def __post_init__(self):
        if not self.num_evaluations or min(self.num_evaluations) < 1:
            raise ValueError(
                "num_evaluations: expected budgets of at least 1, got "
                f"{self.num_evaluations}."
            )
        if self.tolerances and min(self.tolerances) <= 0:
            raise ValueError(f"tolerances: must be positive, got {self.tolerances}.")
        if self.num_samples < 2:
            raise ValueError(
                f"num_samples: must be at least 2, got {self.num_samples}."
            )

    def check(self, source: types.Source) -> None:
        """Raises ValueError where a covariance of the data would be too large."""
        size = int(np.prod(source.spec.shape))
        if size > _MAX_DIMENSION:
            raise ValueError(
                "name: the evaluator 'sampler_comparison' fits a covariance to at most "
                f"{_MAX_DIMENSION} dimensions, and the data have {size}."
            )

    def __call__(self, context: types.EvalContext) -> types.EvalResult:
        self.check(context.test)
        points, refused = self._points(context)
        test = arrays.spread(context.test, self.num_samples)
        train = arrays.spread(context.train, len(test["x"]))
        judge = functools.partial(_judge, train=train, test=test, spec=context.spec)
        real = judge(train["x"], train.get("label"))
        numbers = {f"real/{name}": value for name, value in real.items()}
        curves: dict[str, list[tuple[int, dict[str, float]]]] = {}
        start = time.monotonic()
        for done, point in enumerate(points):
            if done:
                left = (time.monotonic() - start) / done * (len(points) - done)
                ending = f"about {left:.0f} s left"
            else:
                ending = "the first one"
            budget = "adaptive" if point.count is None else f"{point.count} evaluations"
            print(
                f"sampler_comparison: {done + 1} of {len(points)}, {point.label}, "
                f"{budget}; {ending}",
                flush=True,
            )
            try:
                x, label = context.draw(self.num_samples, point.sampler)
            except ValueError as error:
                # Guidance may not suit an adaptive sampler.
                if point.count is not None or not str(error).startswith("config."):
                    raise
                refused[point.label] = str(error)
                continue
            found = judge(np.asarray(x), np.asarray(label))
            count = point.count or _measured(context, point.sampler)
            lines = [(point.label, count)]
            if point.plain not in (None, point.count):
                lines.append((f"{point.label} (Jacobian products free)", point.plain))
            for name, count in lines:
                key = f"{name}/{count}"
                if any(count == other for other, _ in curves.get(name, ())):
                    tells = point.count or f"{point.sampler.rtol:g}"
                    key += f" ({tells})"
                curves.setdefault(name, []).append((count, found))
                numbers |= {f"{key}/{metric}": v for metric, v in found.items()}
        notes = {
            "data": f"{self.num_samples} samples each, {len(test['x'])} held-out "
            "examples, as many training examples",
            **{f"refused: {label}": reason for label, reason in refused.items()},
        }
        return types.EvalResult(numbers, notes, self._pictures(curves, real))

    def _pictures(self, curves, real) -> dict[str, np.ndarray]:
        titles = {"frechet": "Frechet distance", "agreement": "share misrecognised"}
        shown = {}
        for metric, reference in real.items():
            title = titles[metric]
            value = lambda found, m=metric: (  # noqa: E731
                1 - found[m] if m == "agreement" else found[m]
            )
            lines = []
            for label, points in curves.items():
                points = sorted(points, key=lambda point: point[0])
                counts = [count for count, _ in points]
                lines.append((label, counts, [value(found) for _, found in points]))
            shown[metric] = pictures.curves(
                lines,
                x_title="evaluations of predict per sample",
                y_title=title,
                level=("real data", value({metric: reference})),
            )
        return shown

    def _points(self, context) -> tuple[list[Point], dict[str, str]]:
        """What is drawn, and samplers that cannot work here with their reasons."""
        points, refused = [], {}
        for label, sampler in _labelled(self.samplers or _registered(refused)):
            try:
                found = list(self._budgets(label, sampler, context, refused))
            except ValueError as error:
                refused[label] = str(error)
                continue
            if not found:
                refused[label] = f"needs more than {max(self.num_evaluations)}"
            points += found
        return points, refused

    def _budgets(self, label, sampler, context, refused) -> Iterator[Point]:
        """Raises ValueError where the sampler refuses process or data altogether."""
        if sampler.num_evaluations is None:
            for tolerance in self.tolerances:
                adaptive = dataclasses.replace(sampler, rtol=tolerance, atol=tolerance)
                adaptive.times(context.process.schedule)
                yield Point(label, adaptive, None, None)
            return
        seen, reasons = set(), {}
        for budget in sorted(self.num_evaluations):
            try:
                largest = _within(sampler, budget)
                if largest is not None:
                    largest.times(context.process.schedule)
                    if hasattr(largest, "check"):
                        largest.check(context.process, context.spec)
            except ValueError as error:
                reasons[f"{label} at {budget} evaluations"] = error
                continue
            if largest is not None and largest.num_evaluations not in seen:
                count = largest.num_evaluations
                seen.add(count)
                plain = getattr(largest, _PLAIN_COUNT, count)
                yield Point(label, largest, count, plain)
        if reasons and not seen:
            raise [*reasons.values()][-1]
        refused.update({where: str(error) for where, error in reasons.items()})


def _within(sampler, budget: int):
    """The sampler with the most steps that `budget` pays for, or None.

    Raises:
      ValueError: of the sampler, where it accepts none of these numbers of steps.
    """
    reason = None
    for num_steps in range(budget, 0, -1):
        try:
            found = dataclasses.replace(sampler, num_steps=num_steps)
        except ValueError as error:
            reason = error
            continue
        if found.num_evaluations <= budget:
            return found
    if reason is not None:
        raise reason
    return None


def _registered(refused: dict[str, str]) -> list:
    """Every registered sampler with its defaults; adds those that have none."""
    found = []
    for name, where in samplers.REGISTRY["sampler"].items():
        module, _, kind = where.partition(":")
        # More steps than any sampler asks for; each budget sets its own number.
        try:
            found.append(getattr(importlib.import_module(module), kind)(num_steps=16))
        except (TypeError, ValueError) as error:
            refused[name] = str(error)
    return found


def _labelled(found) -> Iterator[tuple[str, Any]]:
    """Yields each sampler with its registered name and the options it changes."""
    names = {where: name for name, where in samplers.REGISTRY["sampler"].items()}
    seen: dict[str, int] = {}
    for sampler in found:
        kind = type(sampler)
        label = names.get(f"{kind.__module__}:{kind.__name__}", kind.__name__)
        options = [
            f"{field.name}={_word(getattr(sampler, field.name))}"
            for field in dataclasses.fields(sampler)
            if field.name != "num_steps"
            and getattr(sampler, field.name) != _default(field)
        ]
        label = ", ".join([label, *options])
        seen[label] = seen.get(label, 0) + 1
        yield (label if seen[label] == 1 else f"{label} ({seen[label]})"), sampler


def _default(field):
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _word(value) -> str:
    return type(value).__name__ if dataclasses.is_dataclass(value) else f"{value}"


def _judge(x, label, *, train, test, spec) -> dict[str, float]:
    """The metrics of one set of samples."""
    x = np.nan_to_num(np.asarray(x, np.float64), nan=1e6, posinf=1e6, neginf=-1e6)
    # A sampler that runs away is that much worse, and breaks nothing.
    x = np.clip(x, -1e6, 1e6)
    found = {"frechet": frechet(flat(x), flat(test["x"]))}
    if spec.num_classes:
        agreement = samples_lib.agreement(x, label, train, test, spec)
        found["agreement"] = agreement["agreement"]
    return found


@functools.lru_cache(maxsize=64)
def _counting(sampler, process, shape, labelled: bool):
    """Returns `f(predict, index, label)` -> evaluations `[B]` of each sample."""

    def run(predict, index, label):
        keys = keys_lib.sample_keys(0, index)
        cond = {"label": label} if labelled else {}
        times = sampler.times(process.schedule)
        z = process.prior_from(base.fold(keys, 0), shape, times[0])
        plain = lambda z, t: predict(z, t, cond)  # noqa: E731
        state = base.solve(sampler, process, plain, z, times, keys)
        return jax.numpy.broadcast_to(state.evaluations, index.shape)

    return run


def _measured(context, sampler) -> int:
    """The mean number of evaluations of an adaptive sampler, rounded."""
    classes = context.spec.num_classes
    function = _counting(sampler, context.process, context.spec.shape, classes > 0)
    index = np.arange(_NUM_MEASURED, dtype=np.int32)
    counts = context.compute(function, index, index % max(classes, 1), guided=True)
    return round(float(np.mean(counts)))
