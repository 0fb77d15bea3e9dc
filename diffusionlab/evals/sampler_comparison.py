"""Samplers against each other: quality by the number of evaluations of `predict`.

An evaluation is one call of the sampler's `predict` for a sample: guidance, such as
classifier-free, may call the network more than once in it.

The main number is the Frechet distance of `metrics/frechet.py` to held-out examples.
Of the data themselves, without an extractor, it is d, the root of that distance, which
has the units of the data; of the features of an extractor it is the distance as it is,
which with those of Inception is FID.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusionlab import keys as keys_lib
from diffusionlab import pictures, samplers, types
from diffusionlab.evals import arrays
from diffusionlab.evals import samples as samples_lib
from diffusionlab.metrics import base as metrics_base
from diffusionlab.metrics import frechet, moments
from diffusionlab.metrics.neighbours import flat
from diffusionlab.samplers import base

_MAX_DIMENSION = 1024
_MAX_JACKKNIFE = 512  # features: with more, intervals cost more than the samples
_BATCH = 64  # examples whose features are computed at a time
_NUM_MEASURED = 64  # examples whose evaluations are counted, of an adaptive sampler
# The other count of a sampler whose evaluations are not all plain: without the
# Jacobian-vector products.
_PLAIN_COUNT = "num_predictions"


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

      frechet: Frechet distance to the held-out examples; smaller is better. Without an
        extractor d, in units of the data; with one d², as `metrics/frechet.py`.
      agreement: share recognised as the class asked for, see `Samples`; with labels,
        and data of at most 1,024 dimensions.

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
      extractor: block of a feature network; None compares the data themselves, of at
        most 1,024 dimensions.
      groups: of the jackknife behind the intervals of `frechet`, each of which costs
        one more distance; 0 is without intervals, and so are more than 512 features.
      every: steps between evaluations; 0 is at the end only.
    """

    samplers: tuple = ()
    num_evaluations: tuple[int, ...] = (4, 8, 16, 32, 64)
    tolerances: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4)
    num_samples: int = 1000
    extractor: Any = None
    groups: int = 10
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
        metrics_base.check_groups(self.groups)

    def check(self, source: types.Source) -> None:
        """Raises ValueError or FileNotFoundError where it cannot work on these data."""
        if self.extractor is not None:
            try:
                self.extractor.check(source.spec)
            except (ValueError, FileNotFoundError) as error:
                raise type(error)(f"extractor.{error}") from None
        elif _size(source.spec) > _MAX_DIMENSION:
            raise ValueError(
                "name: the evaluator 'sampler_comparison' fits a covariance to at most "
                f"{_MAX_DIMENSION} dimensions, and the data have "
                f"{_size(source.spec)}; give an extractor."
            )

    def __call__(self, context: types.EvalContext) -> types.EvalResult:
        self.check(context.test)
        points, refused = self._points(context)
        test = arrays.spread(context.test, self.num_samples)
        train = arrays.spread(context.train, len(test["x"]))
        judge = _Judge(self.extractor, self.groups, context, train, test)
        real, interval = judge(train["x"], train.get("label"))
        numbers = {f"real/{name}": value for name, value in real.items()}
        intervals = {f"real/{name}": ends for name, ends in interval.items()}
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
            found, interval = judge(np.asarray(x), np.asarray(label))
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
                intervals |= {f"{key}/{m}": ends for m, ends in interval.items()}
        notes = {
            "data": f"{self.num_samples} samples each, {len(test['x'])} held-out "
            "examples, as many training examples",
            "frechet": judge.meaning,
            **{f"refused: {label}": reason for label, reason in refused.items()},
        }
        about = {
            "samples": {"num": self.num_samples, **context.about},
            "reference": {"name": "held-out data", "num": len(test["x"])},
            "network": judge.about,
        }
        shown = self._pictures(curves, real, judge.meaning)
        return types.EvalResult(numbers, notes, shown, intervals, about)

    def _pictures(self, curves, real, meaning: str) -> dict[str, np.ndarray]:
        titles = {"frechet": meaning, "agreement": "share misrecognised"}
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
                levels=[("real data", value({metric: reference}))],
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
    """Every sampler of gaussian noise with its defaults; adds those without."""
    found = []
    for name, where in samplers.REGISTRY["sampler"].items():
        module, _, kind = where.partition(":")
        sampler = getattr(importlib.import_module(module), kind)
        if "gaussian" not in getattr(sampler, "processes", ("gaussian",)):
            continue
        # More steps than any sampler asks for; each budget sets its own number.
        try:
            found.append(sampler(num_steps=16))
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


def _size(spec: types.DataSpec) -> int:
    return math.prod(spec.shape)


class _Judge:
    """Measures samples against held-out examples.

    Attributes:
      meaning: what its Frechet distance is, for a note and a picture.
      about: JSON of the feature network.
    """

    def __init__(self, extractor, groups: int, context, train, test):
        self._train, self._test, self._groups = train, test, groups
        self._spec, self._network = context.spec, None
        self.about = {"network": "the data themselves"}
        self.meaning = "Frechet distance of the data, d"
        if extractor is not None:
            self._network, self._apply = extractor.load(context.room), context.apply
            self.about = self._network.about
            self.meaning = "Frechet distance of features, d²"
        reference = moments.of_rows(self._features(test["x"]))
        self._square = frechet.distance_to(reference)

    def __call__(self, x, label) -> tuple[dict, dict]:
        """Returns the numbers of one set of samples, and intervals of some of them."""
        x = np.nan_to_num(np.asarray(x, np.float32), nan=1e6, posinf=1e6, neginf=-1e6)
        # A sampler that runs away is that much worse, and breaks nothing.
        x = np.clip(x, -1e6, 1e6)
        rows = self._features(x)
        value = self._distance(total := moments.of_rows(rows))
        found, intervals = {"frechet": value}, {}
        # Without a group at least 2 samples must be left for a covariance.
        enough = len(rows) >= max(self._groups, 4)
        if self._groups and enough and rows.shape[1] <= _MAX_JACKKNIFE:
            parts = metrics_base.group_moments(rows, self._groups, label)
            rest = [self._distance(moments.without(total, part)) for part in parts]
            intervals["frechet"] = metrics_base.jackknife(value, rest)
        spec = self._spec
        if spec.num_classes and _size(spec) <= _MAX_DIMENSION:
            agreement = samples_lib.agreement(x, label, self._train, self._test, spec)
            found["agreement"] = agreement["agreement"]
        return found, intervals

    def _distance(self, found: moments.Moments) -> float:
        square = self._square(found)
        return math.sqrt(square) if self._network is None else square

    def _features(self, x: np.ndarray) -> np.ndarray:
        if self._network is None:
            return flat(x)
        network, parts = self._network, []
        for start in range(0, len(x), _BATCH):
            # The last batch is filled up: another size would be another program.
            chosen = np.minimum(np.arange(start, start + _BATCH), len(x) - 1)
            ready = network.prepare(np.asarray(x[chosen], np.float32))
            found = self._apply(network.apply, network.params, ready)
            parts.append(found["features"])
        return np.concatenate(parts)[: len(x)]


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
