"""Precision, recall, density and coverage by balls around nearest neighbours.

The support of a set is taken to be the union of balls around its points, each as large
as the distance to the k-th nearest other point. For real r_i with radii R_i, samples
f_j with radii F_j and d_ij = |r_i - f_j|:

    precision = mean_j [some i: d_ij <= R_i]                                        (1)
    recall    = mean_i [some j: d_ij <= F_j]                                        (2)
    density   = mean_j sum_i [d_ij <= R_i] / k                                      (3)
    coverage  = mean_i [some j: d_ij <= R_i]                                        (4)

with < in place of <= where `strict`. Squared distances are compared, from a matrix
product in float64; one below its rounding error counts as 0.

Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991), equations 1 and 2, for (1) and (2);
Naeem et al. 2020 (arXiv 2002.09797), equations 3 and 4, for (3) and (4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from diffusionlab.metrics import base
from diffusionlab.metrics.base import Features, Interval
from diffusionlab.types import EvalResult

_CHUNK = 2**23  # entries of a block of the distance matrix: 64 MB
_COLUMNS = 4096  # rows of the other set that are converted to float64 together


def flat(x: np.ndarray) -> np.ndarray:
    """Returns `[N, ...]` as float32 `[N, D]`."""
    return np.asarray(x, np.float32).reshape(len(x), -1)


def _squares(rows: np.ndarray, centre: np.ndarray) -> np.ndarray:
    found = np.empty(len(rows))
    for start in range(0, len(rows), _COLUMNS):
        piece = rows[start : start + _COLUMNS] - centre
        found[start : start + _COLUMNS] = np.einsum("ij,ij->i", piece, piece)
    return found


def distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (rows of a, squared distances `[rows, len(b)]` float64) block by block.

    A block is overwritten by the next one.
    """
    rows = min(max(1, _CHUNK // len(b)), len(a))
    # Centred, the expanded square loses less to cancellation.
    centre = np.mean(b, axis=0, dtype=np.float64)
    square_a, square_b = _squares(a, centre), _squares(b, centre)
    # A sum of d products is off by about d^(1/2) eps times the two lengths, and where
    # the distance is that small, the lengths are equal.
    error = 8 * np.sqrt(a.shape[1]) * np.finfo(np.float64).eps
    block = np.empty((rows, len(b)))
    for start in range(0, len(a), rows):
        left = a[start : start + rows] - centre
        found, near = block[: len(left)], square_a[start : start + rows, None]
        left *= -2
        for first in range(0, len(b), _COLUMNS):
            right = b[first : first + _COLUMNS] - centre
            found[:, first : first + _COLUMNS] = left @ right.T
        found += near
        found += square_b
        found[found < error * near] = 0.0
        yield slice(start, start + len(left)), found


def nearest(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the index of the nearest row of `b` to each of `a`, and its distance."""
    index = np.empty(len(a), np.int64)
    distance = np.empty(len(a), np.float64)
    for rows, block in distances(a, b):
        index[rows] = block.argmin(axis=1)
        # Exactly, so that a copy has distance 0 and not the rounding of the expansion.
        apart = np.subtract(a[rows], b[index[rows]], dtype=np.float64)
        distance[rows] = np.linalg.norm(apart, axis=1)
    return index, distance


def check_k(k: int, num: int, name: str = "") -> None:
    """Raises ValueError unless each of `num` points has `k` others."""
    if not 1 <= k < num:
        raise ValueError(
            f"k: expected 1 to {num - 1} for {num} points{name and ' of ' + name}, got "
            f"{k}."
        )


def square_radii(x: np.ndarray, k: int, parts: list[slice] | None = None) -> np.ndarray:
    """Returns the squared distance of each row of `x` to its k-th nearest other row.

    Args:
      x: `[N, D]`.
      k: 1 is the nearest.
      parts: of the rows; None is all of them together.

    Returns:
      `[N]`; with parts `[1 + len(parts), N]`: among all rows, and without each part.

    Raises:
      ValueError: there are no k other rows.
    """
    check_k(k, len(x))
    whole = parts is None
    parts = [slice(0, len(x))] if whole else parts
    # The k nearest of each part hold the k nearest of any union of parts.
    near = np.full((len(x), len(parts), k), np.inf)
    for rows, block in distances(x, x):
        # Not every point finds itself at exactly 0, so itself is taken out by place.
        block[np.arange(len(block)), np.arange(rows.start, rows.stop)] = np.inf
        for i, part in enumerate(parts):
            some = block[:, part]
            if some.shape[1] > k:
                some = np.partition(some, k - 1, axis=1)[:, :k]
            near[rows, i, : some.shape[1]] = some
    everything = np.partition(near.reshape(len(x), -1), k - 1, axis=1)[:, k - 1]
    if whole:
        return everything
    rest = []
    for i in range(len(parts)):
        others = np.delete(near, i, axis=1).reshape(len(x), -1)
        rest.append(np.partition(others, k - 1, axis=1)[:, k - 1])
    return np.stack([everything, *rest])


def knn_radii(x: np.ndarray, k: int) -> np.ndarray:
    """Returns the distance `[N]` of each row of `x` to its k-th nearest other row."""
    return np.sqrt(square_radii(x, k))


class Inside(NamedTuple):
    """Which points lie in which balls.

    Attributes:
      balls: `[M]` int, balls of the reference in which each sample lies.
      covered: `[N]` bool, whether some sample lies in the ball of each real point.
      recalled: `[N]` bool, whether each real point lies in the ball of a sample.
      covered_without: `[groups, N]` bool, `covered` without each group of samples.
      recalled_without: `[groups, N]` bool, where the radii, too, are without the group.
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
    groups: int = 0,
    recall: bool = True,
) -> Inside:
    """Returns which of `fake` `[M, D]` lie in balls of `real` `[N, D]`, and vice versa.

    Args:
      real, fake: any float type.
      k: neighbour that sets the radius of a ball.
      strict: < in place of <=.
      groups: of the samples that are left out in turn, as `base.groups_of`.
      recall: False saves the radii of the samples; `recalled` is then all False.
    """
    check_k(k, len(real))
    less = np.less if strict else np.less_equal
    parts = base.groups_of(len(fake), max(groups, 1))
    radii_real = square_radii(real, k)
    radii_fake = None
    if recall:
        radii_fake = np.atleast_2d(square_radii(fake, k, parts if groups else None))
    balls = np.zeros(len(fake), np.int64)
    covered = np.zeros((len(parts), len(real)), bool)
    recalled = np.zeros((groups + 1, len(real)), bool)
    for rows, block in distances(fake, real):
        for g, part in enumerate(parts):
            start, stop = max(rows.start, part.start), min(rows.stop, part.stop)
            if start >= stop:
                continue
            some = block[start - rows.start : stop - rows.start]
            within = less(some, radii_real)
            balls[start:stop] = np.count_nonzero(within, axis=1)
            covered[g] |= within.any(axis=0)
            if not recall:
                continue
            for left_out in range(groups + 1):
                if left_out != g + 1:
                    radii = radii_fake[left_out, start:stop, None]
                    recalled[left_out] |= less(some, radii).any(axis=0)
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
      groups: of the jackknife behind the interval of recall; 0 is without intervals.
    """

    k: int = 3
    strict: bool = False
    groups: int = 10
    needs = ("features",)

    def __post_init__(self):
        base.check_positive(k=self.k)
        base.check_groups(self.groups)

    def __call__(self, samples: Features, reference: Features) -> EvalResult:
        fake, real = _checked(samples, reference, self.k)
        groups = _groups(len(fake), self.groups, self.k)
        found = inside(real, fake, self.k, self.strict, groups)
        count = int(np.sum(found.balls > 0))
        precision, interval = base.of_share(count, len(fake))
        numbers = {"precision": precision, "recall": float(found.recalled.mean())}
        intervals = {"precision": interval} if self.groups else {}
        if groups:
            intervals["recall"] = _of_groups(found.recalled, found.recalled_without)
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
      groups: of the jackknife behind the interval of coverage; 0 is without intervals.
    """

    k: int = 5
    strict: bool = True
    groups: int = 10
    needs = ("features",)

    def __post_init__(self):
        base.check_positive(k=self.k)
        base.check_groups(self.groups)

    def __call__(self, samples: Features, reference: Features) -> EvalResult:
        fake, real = _checked(samples, reference, self.k, both=False)
        groups = _groups(len(fake), self.groups, 0)
        found = inside(real, fake, self.k, self.strict, groups, recall=False)
        intervals = {}
        density = float(found.balls.mean() / self.k)
        if self.groups and len(fake) > 1:
            density, intervals["density"] = base.of_mean(found.balls / self.k)
        numbers = {"density": density, "coverage": float(found.covered.mean())}
        if groups:
            intervals["coverage"] = _of_groups(found.covered, found.covered_without)
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


def _of_groups(values: np.ndarray, without: np.ndarray) -> Interval:
    """The jackknife of a share, which ends at 0 and at 1."""
    low, high = base.jackknife(float(values.mean()), without.mean(axis=1))
    return max(low, 0.0), min(high, 1.0)


def _about(real, fake, k, strict) -> str:
    return (
        f"{len(fake)} samples against {len(real)} examples, {real.shape[1]} features, "
        f"k = {k}, distance {'<' if strict else '<='} radius"
    )
