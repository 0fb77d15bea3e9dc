"""Precision, recall, density and coverage by balls around nearest neighbours.

The support of a set is taken to be the union of balls around its points, each as large
as the distance to the k-th nearest other point. For real r_i with radii R_i, samples
f_j with radii F_j and d_ij = |r_i - f_j|:

    precision = mean_j [some i: d_ij <= R_i]                                        (1)
    recall    = mean_i [some j: d_ij <= F_j]                                        (2)
    density   = mean_j sum_i [d_ij <= R_i] / k                                      (3)
    coverage  = mean_i [some j: d_ij <= R_i]                                        (4)

with < in place of <= where `strict`. Distances are compared as in float64, see
`distances.py`, which keeps both sets as float32 in memory.

Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991), equations 1 and 2, for (1) and (2);
Naeem et al. 2020 (arXiv 2002.09797), equations 3 and 4, for (3) and (4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusionlab.metrics import base, distances
from diffusionlab.metrics.base import Features, Interval
from diffusionlab.metrics.distances import Points
from diffusionlab.types import EvalResult

_FEW = 10  # values that differ from all others, below which a jackknife misses them


def flat(x: np.ndarray) -> np.ndarray:
    """Returns `[N, ...]` as float32 `[N, D]`."""
    return np.asarray(x, np.float32).reshape(len(x), -1)


def nearest(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the index of the nearest row of `b` to each of `a`, and its distance."""
    centre = distances.centre(b)
    parts = distances.points(a, centre), distances.points(b, centre)
    index, square = distances.kth_nearest(*parts, 1)
    return index, np.sqrt(square)


def check_k(k: int, num: int, name: str = "") -> None:
    """Raises ValueError unless each of `num` points has `k` others."""
    if not 1 <= k < num:
        of = f" of {name}" if name else ""
        raise ValueError(f"k: expected 1 to {num - 1} for {num} points{of}, got {k}.")


def knn_radii(x: np.ndarray, k: int) -> np.ndarray:
    """Returns the distance `[N]` of each row of `x` to its k-th nearest other row.

    Raises:
      ValueError: there are no k other rows.
    """
    check_k(k, len(x))
    points = distances.points(x, distances.centre(x))
    return np.sqrt(distances.kth_nearest(points, points, k, np.arange(len(x)))[1])


def _square_radii(x: Points, k: int, parts: list[np.ndarray]) -> np.ndarray:
    """Squared radii to within a margin `[1 + len(parts), N]`: all, without each part.

    With a single part, which is all rows, there is nothing without it: `[1, N]`.
    """
    # The k nearest of each part hold the k nearest of any union of parts.
    near = np.full((len(x), len(parts), k), np.inf, np.float32)
    for rows, block in distances.blocks(x, x):
        # Not every point finds itself at exactly 0, so itself is taken out by place.
        block[np.arange(len(block)), np.arange(rows.start, rows.stop)] = np.inf
        for i, part in enumerate(parts):
            some = block if len(parts) == 1 else np.take(block, part, axis=1)
            if some.shape[1] > k:
                some.partition(k - 1, axis=1)
                some = some[:, :k]
            near[rows, i, : some.shape[1]] = some

    def kth(some):
        return np.partition(some.reshape(len(x), -1), k - 1, axis=1)[:, k - 1]

    found = [kth(near)]
    if len(parts) > 1:
        found += [kth(np.delete(near, i, axis=1)) for i in range(len(parts))]
    return np.stack(found).astype(np.float64)


class _Balls:
    """The balls around the points of one set, and what is for sure in or out of them.

    Attributes:
      low, high: `[N]` float32, a squared distance below or above is in or out.
      without: `[groups, N]` float32, squared radii without each group.
    """

    def __init__(self, x: Points, k: int, parts: list[np.ndarray], strict: bool):
        radii = _square_radii(x, k, parts)
        band = 2 * x.margin(radii[0])  # of a radius, and of a distance to be compared
        self.low = (radii[0] - band).astype(np.float32)
        self.high = (radii[0] + band).astype(np.float32)
        self.without = radii[1:].astype(np.float32)
        self._x, self._k = x, k
        self._less = np.less if strict else np.less_equal
        self._exact = np.full(len(x), np.nan)

    def hold(self, which: np.ndarray, others: Points, other: np.ndarray) -> np.ndarray:
        """Whether the balls `which` `[P]` hold the points `other` `[P]` of `others`."""
        new = np.unique(which[np.isnan(self._exact[which])])
        if len(new):
            some = self._x.take(new)
            self._exact[new] = distances.kth_nearest(some, self._x, self._k, new)[1]
        radii = self._exact[which]
        return self._less(distances.near(others, self._x, other, which, radii), radii)


class Inside(NamedTuple):
    """Which points lie in which balls.

    Attributes:
      balls: `[M]` int, balls of the reference in which each sample lies.
      covered: `[N]` bool, whether some sample lies in the ball of each real point.
      recalled: `[N]` bool, whether each real point lies in the ball of a sample.
      covered_without: `[groups, N]` bool, `covered` without each group of samples.
      recalled_without: `[groups, N]` bool, where the radii, too, are without the group;
        decided in float32.
    """

    balls: np.ndarray
    covered: np.ndarray
    recalled: np.ndarray
    covered_without: np.ndarray
    recalled_without: np.ndarray


def inside(
    real: np.ndarray,
    fake: np.ndarray,
    k: int,
    strict: bool = False,
    groups: Sequence[np.ndarray] = (),
    recall: bool = True,
) -> Inside:
    """Returns which of `fake` `[M, D]` lie in balls of `real` `[N, D]`, and vice versa.

    Args:
      real, fake: any float type.
      k: neighbour that sets the radius of a ball.
      strict: < in place of <=.
      groups: indices of samples that are left out in turn, as of `base.groups_of`.
      recall: False saves the radii of the samples; `recalled` is then all False.
    """
    check_k(k, len(real))
    parts, groups = groups or [np.arange(len(fake))], len(groups)
    centre = distances.centre(real)
    x, y = distances.points(real, centre), distances.points(fake, centre)
    of_real = _Balls(x, k, [np.arange(len(x))], strict)
    of_fake = None
    if recall:
        check_k(k, len(fake))
        of_fake = _Balls(y, k, parts, strict)
    balls = np.zeros(len(fake), np.int64)
    covered = np.zeros((len(parts), len(real)), bool)
    recalled = np.zeros((groups + 1, len(real)), bool)
    for rows, block in distances.blocks(y, x):
        within = block < of_real.low
        j, i = distances.places(within ^ (block <= of_real.high))
        within[j, i] = of_real.hold(i, y, j + rows.start)
        balls[rows] = np.count_nonzero(within, axis=1)
        if recall:
            reached = block < of_fake.low[rows, None]
            j, i = distances.places(reached ^ (block <= of_fake.high[rows, None]))
            reached[j, i] = of_fake.hold(j + rows.start, x, i)
            recalled[0] |= reached.any(axis=0)
        for g, part in enumerate(parts):
            of_part = part[slice(*np.searchsorted(part, [rows.start, rows.stop]))]
            here = of_part - rows.start
            covered[g] |= within[here].any(axis=0)
            some = block[here] if groups and recall else None
            for left_out in range(groups if recall else 0):
                if left_out != g:
                    radii = of_fake.without[left_out, of_part, None]
                    recalled[1 + left_out] |= (some <= radii).any(axis=0)
    times = covered.sum(axis=0)
    return Inside(
        balls, times > 0, recalled[0], times[None] > covered[:groups], recalled[1:]
    )


class Prdc(NamedTuple):
    """Equations 1 to 4."""

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: np.ndarray, fake: np.ndarray, k: int = 5, strict: bool = True) -> Prdc:
    """Returns equations 1 to 4; with `strict` the counts of the package `prdc`."""
    found = inside(real, fake, k, strict)
    return Prdc(
        float(np.mean(found.balls > 0)),
        float(found.recalled.mean()),
        float(found.balls.mean() / k),
        float(found.covered.mean()),
    )


def precision_recall(
    real: np.ndarray, fake: np.ndarray, k: int = 5
) -> tuple[float, float]:
    """Returns (precision, recall) of `fake` with respect to `real`, each `[N, ...]`."""
    return tuple(prdc(flat(real), flat(fake), k, strict=False)[:2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """Improved precision and recall; equations 1 and 2.

    Numbers `precision` and `recall`. With the defaults they are those of torch-fidelity
    and of the evaluator of guided diffusion. Both depend on the numbers of samples and
    of examples, as balls shrink where points are many: compare equal numbers only.

    Attributes:
      k: neighbour that sets the radius of a ball.
      strict: < in place of <=.
      groups: of the jackknife behind the interval of recall, which is at least
        Wilson's where nearly all or no examples are recalled; 0 is without intervals.
    """

    k: int = 3
    strict: bool = False
    groups: int = 10
    needs = ("features",)
    reference_rows = True

    def __post_init__(self):
        base.check_positive(k=self.k)
        base.check_groups(self.groups)

    def __call__(self, samples: Features, reference: Features) -> EvalResult:
        fake, real = _checked(samples, reference, self.k)
        groups = _groups(len(fake), self.groups, self.k)
        parts = base.groups_of(len(fake), groups, samples.label)
        found = inside(real, fake, self.k, self.strict, parts)
        count = int(np.sum(found.balls > 0))
        precision, interval = base.of_share(count, len(fake))
        numbers = {"precision": precision, "recall": float(found.recalled.mean())}
        intervals = {"precision": interval} if self.groups else {}
        if groups:
            intervals["recall"] = _of_groups(
                found.recalled, found.recalled_without, len(fake)
            )
        notes = {"precision": _about(real, fake, self.k, self.strict)}
        return EvalResult(numbers, notes, intervals=intervals)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensityCoverage:
    """Density and coverage; equations 3 and 4.

    Numbers `density` and `coverage`. With the defaults they are those of the package
    `prdc`. For equal distributions and numbers density is about 1 and coverage about
    1 - 2^-k.

    Attributes:
      k: neighbour that sets the radius of a ball.
      strict: < in place of <=.
      groups: of the jackknife behind the interval of coverage, which is at least
        Wilson's where nearly all or no examples are covered; 0 is without intervals.
    """

    k: int = 5
    strict: bool = True
    groups: int = 10
    needs = ("features",)
    reference_rows = True

    def __post_init__(self):
        base.check_positive(k=self.k)
        base.check_groups(self.groups)

    def __call__(self, samples: Features, reference: Features) -> EvalResult:
        fake, real = _checked(samples, reference, self.k, both=False)
        groups = _groups(len(fake), self.groups, 0)
        parts = base.groups_of(len(fake), groups, samples.label)
        found = inside(real, fake, self.k, self.strict, parts, recall=False)
        intervals = {}
        density = float(found.balls.mean() / self.k)
        if self.groups and len(fake) > 1:
            density, intervals["density"] = base.of_mean(found.balls / self.k)
        numbers = {"density": density, "coverage": float(found.covered.mean())}
        if groups:
            intervals["coverage"] = _of_groups(
                found.covered, found.covered_without, len(fake)
            )
        notes = {"density": _about(real, fake, self.k, self.strict)}
        return EvalResult(numbers, notes, intervals=intervals)


def _checked(samples, reference, k, both=True):
    fake, real = base.both_rows(samples, reference, "features")
    check_k(k, len(real), reference.name)
    if both:
        check_k(k, len(fake), samples.name)
    return fake, real


def _groups(num: int, groups: int, k: int) -> int:
    """`groups`, or 0 where without one of them no k other samples would be left."""
    largest = -(-num // groups) if groups else 0
    return groups if num >= groups and num - largest > k else 0


def _of_groups(values: np.ndarray, without: np.ndarray, num: int) -> Interval:
    """The jackknife of a share, which ends at 0 and at 1.

    Near to either end no group may change anything, and the jackknife has no width:
    there Wilson's interval is taken where it reaches further, of as many independent
    values as there are examples, or samples if they are fewer.
    """
    share = float(values.mean())
    low, high = base.jackknife(share, without.mean(axis=1))
    count = int(np.sum(values))
    if min(count, len(values) - count) < _FEW:
        num = min(num, len(values))
        wide = base.of_share(share * num, num)[1]
        low, high = min(low, wide[0]), max(high, wide[1])
    return max(low, 0.0), min(high, 1.0)


def _about(real, fake, k, strict) -> str:
    return (
        f"{len(fake)} samples against {len(real)} examples, {real.shape[1]} features, "
        f"k = {k}, distance {'<' if strict else '<='} radius"
    )
