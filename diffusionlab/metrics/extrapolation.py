"""Scores at infinitely many samples: FID and inception score without their bias.

The expectation of either score at N samples is, for large N,

    E score(N) = score(infinity) + C / N                                            (1)

Least squares of the scores at several N in 1 / N gives score(infinity). The subsets of
one repeat are the beginnings of one random order of the samples, so that each sample
is looked at once per repeat.

Source: Chong and Forsyth 2020 (arXiv 1911.07023), section 3; there every N has a random
subset of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from diffusionlab.metrics import base, frechet, inception_score
from diffusionlab.metrics import moments as moments_lib
from diffusionlab.metrics.base import Features, Interval
from diffusionlab.types import EvalResult


def extrapolate(numbers: Sequence[int], scores: Sequence[float]) -> float:
    """Returns score(infinity) of equation 1, by least squares."""
    numbers = np.asarray(numbers, np.float64)
    design = np.stack([np.ones(len(numbers)), 1 / numbers], axis=1)
    return float(np.linalg.lstsq(design, np.asarray(scores, np.float64))[0][0])


def sizes(num: int, smallest: int, points: int) -> np.ndarray:
    """Returns `points` numbers of samples, evenly spaced up to `num`.

    They begin at `smallest`, or at half of `num` where that is less.

    Raises:
      ValueError: they are not different.
    """
    found = np.linspace(min(smallest, num // 2), num, points).astype(int)
    if found[0] < 2 or len(np.unique(found)) < points:
        raise ValueError(
            f"points: {points} different numbers up to {num} samples are asked for; "
            "take fewer points, or more samples."
        )
    return found


def _intercepts(
    sizes: np.ndarray,
    repeats: int,
    seed: int,
    scores: Callable[[list[np.ndarray]], list[float]],
) -> list[float]:
    """Equation 1 for each of `repeats` orders; `scores` gets the indices added."""
    rng, found = np.random.default_rng(seed), []
    edges = [0, *sizes]
    for _ in range(repeats):
        order = rng.permutation(sizes[-1])
        added = [
            # Ascending, so that a memory map is read in order.
            np.sort(order[start:stop])
            for start, stop in zip(edges[:-1], edges[1:], strict=True)
        ]
        found.append(extrapolate(sizes, scores(added)))
    return found


def _interval(intercepts: list[float], value: float, rest: list[float]) -> Interval:
    """95 % of the mean of `intercepts`.

    Its variance has two parts: of the score of all samples, a jackknife with the
    statistics `rest`; and of the order of the samples, from the spread over repeats.
    """
    low, high = base.jackknife(value, rest)
    order = np.var(intercepts, ddof=1) / len(intercepts)
    half = np.hypot((high - low) / 2, 1.96 * np.sqrt(order))
    middle = float(np.mean(intercepts))
    return float(middle - half), float(middle + half)


def _check(smallest, points, repeats, groups) -> None:
    base.check_positive(smallest=smallest)
    if points < 2:
        raise ValueError(f"points: must be at least 2, got {points}.")
    if repeats < 2:
        raise ValueError(
            f"repeats: must be at least 2, whose spread is in the interval, got "
            f"{repeats}."
        )
    base.check_groups(groups)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrechetInfinity:
    """Frechet distance at infinitely many samples: FID_infinity; equation 1.

    Number `frechet_infinity`. The reference is taken as it is, however few examples it
    has. The interval joins a jackknife of the distance of all samples with the spread
    over repeats. It costs `points` x `repeats` + `groups` distances.

    Attributes:
      smallest: the least number of samples; half of them where that is less.
      points: numbers of samples.
      repeats: random orders.
      seed: of the orders.
      groups: of the jackknife; 0 is without interval.
    """

    smallest: int = 5000
    points: int = 15
    repeats: int = 3
    seed: int = 0
    groups: int = 10
    needs = ("features",)

    def __post_init__(self):
        _check(self.smallest, self.points, self.repeats, self.groups)

    def __call__(self, samples: Features, reference: Features) -> EvalResult:
        rows = base.rows_of(samples, "features")
        target = base.moments_of(reference, "features")
        widths = rows.shape[1], len(target.mean)
        base.same_width(samples, reference, "features", widths)
        numbers = sizes(len(rows), self.smallest, self.points)
        distance = frechet.distance_to(target)

        def scores(added):
            total, found = None, []
            for index in added:
                part = moments_lib.of_rows(rows, index)
                total = part if total is None else moments_lib.merge([total, part])
                found.append(distance(total))
            return found

        found = _intercepts(numbers, self.repeats, self.seed, scores)
        intervals, notes = {}, _about("frechet_infinity", numbers, self.repeats)
        if self.groups and len(rows) >= max(self.groups, 4):
            whole = base.moments_of(samples, "features")
            parts = base.group_moments(rows, self.groups, samples.label)
            rest = [distance(moments_lib.without(whole, part)) for part in parts]
            intervals["frechet_infinity"] = _interval(found, distance(whole), rest)
        if numbers[0] <= widths[0]:
            notes["warning"] = (
                f"from {numbers[0]} samples of {widths[0]} features on: the distance "
                "is a straight line in 1/N only well above the number of features; "
                "take more samples."
            )
        value = float(np.mean(found))
        return EvalResult({"frechet_infinity": value}, notes, intervals=intervals)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionScoreInfinity:
    """Inception score at infinitely many samples, each in one split; equation 1.

    Number `inception_score_infinity`; the interval is as that of `FrechetInfinity`. It
    does not look at the reference.

    Attributes:
      smallest: the least number of samples; half of them where that is less.
      points: numbers of samples.
      repeats: random orders.
      seed: of the orders.
      groups: of the jackknife; 0 is without interval.
    """

    smallest: int = 5000
    points: int = 15
    repeats: int = 3
    seed: int = 0
    groups: int = 10
    needs = ("logits",)

    def __post_init__(self):
        _check(self.smallest, self.points, self.repeats, self.groups)

    def __call__(self, samples: Features, reference: Features) -> EvalResult:
        rows, name = base.rows_of(samples, "logits"), "inception_score_infinity"
        numbers = sizes(len(rows), self.smallest, self.points)

        def scores(added):
            sums = [inception_score.sums(rows, index) for index in added]
            totals = np.cumsum(sums, axis=0)
            return [inception_score.score(total) for total in totals]

        found = _intercepts(numbers, self.repeats, self.seed, scores)
        intervals = {}
        if self.groups and len(rows) >= self.groups:
            groups = base.groups_of(len(rows), self.groups, samples.label)
            parts = np.stack([inception_score.sums(rows, part) for part in groups])
            total = parts.sum(axis=0)
            rest = [inception_score.score(total - part) for part in parts]
            value = inception_score.score(total)
            intervals[name] = _interval(found, value, rest)
        notes = _about(name, numbers, self.repeats)
        return EvalResult({name: float(np.mean(found))}, notes, intervals=intervals)


def _about(name, numbers, repeats) -> dict[str, str]:
    return {
        name: f"from {len(numbers)} numbers of samples, {numbers[0]} to {numbers[-1]}, "
        f"in {repeats} random orders"
    }
