"""What a metric compares, and how sure it is.

An interval is two-sided, 95 %, and about the samples alone: the reference is taken as
given. Smooth statistics have it from a delete-one-group jackknife: of g groups of
samples, theta_(i) is the statistic without group i, and

    se² = (g - 1) / g  sum_i (theta_(i) - mean theta_(.))²                          (1)
    interval = theta ± t_{g-1}(0.975) se                                            (2)

Unlike the bootstrap it adds no duplicates, to which Frechet distances and neighbours
are not indifferent, and it costs g statistics. Groups are random, whatever the order
of the samples. Where there are equal numbers of each class, which is no chance, every
group has its share of each, so that the interval is that of a fixed number of each
class, several times as narrow where classes are far apart.

Source: Efron and Stein 1981 for (1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from diffusionlab.metrics import moments as moments_lib
from diffusionlab.metrics.moments import Moments
from diffusionlab.types import EvalResult

Interval = tuple[float, float]
_SEED = 1981  # of the groups


class Features(Protocol):
    """The features of one set of examples.

    Attributes:
      name: of the set, for messages: 'samples', 'the training split of digits'.
      num: examples.
      label: `[N]` int, or None.
      class_names: of the labels.
    """

    name: str
    num: int
    label: np.ndarray | None
    class_names: tuple[str, ...]

    def rows(self, output: str) -> np.ndarray:
        """Returns `[N, d]` float32, perhaps a memory map.

        Raises:
          ValueError: only moments are known, as of a published file.
        """
        ...

    def moments(self, output: str) -> Moments:
        """Returns the moments of an output, computed once."""
        ...

    def examples(self, indices: Sequence[int]) -> np.ndarray:
        """Returns some of the examples themselves, float32 in [-1, 1], for pictures.

        Raises:
          ValueError: they are not there, as with a published file.
        """
        ...


class Metric(Protocol):
    """From the features of samples and of a reference to named numbers.

    Attributes:
      needs: outputs of the extractor that it looks at.
      reference_rows: whether it wants the features of every example of the reference;
        one that does not say so is content with their moments.
    """

    needs: tuple[str, ...]
    reference_rows: bool

    def __call__(self, samples: Features, reference: Features) -> EvalResult: ...


def jackknife(value: float, without: Sequence[float]) -> Interval:
    """Returns equation 2 for the statistic of all samples, and without each group."""
    from scipy import stats

    without = np.asarray(without, np.float64)
    groups = len(without)
    square = (groups - 1) / groups * np.sum((without - without.mean()) ** 2)
    half = stats.t.ppf(0.975, groups - 1) * np.sqrt(square)
    return float(value - half), float(value + half)


def groups_of(
    num: int, groups: int, label: np.ndarray | None = None
) -> list[np.ndarray]:
    """Returns a random partition of `num` rows into groups of nearly equal size.

    It depends on the arguments alone. Contiguous groups would be those of one class
    each where samples are sorted by class. The indices of a group ascend, so that a
    memory map is read in order.

    Args:
      num: rows.
      groups: 0 is none.
      label: `[num]` int; classes of equal numbers, at least one row for each group,
        are spread evenly.
    """
    order = np.random.default_rng(_SEED).permutation(num)
    if label is not None and groups:
        counts = np.unique(label, return_counts=True)[1]
        if np.ptp(counts) <= 1 and counts.min() >= groups:
            order = order[np.argsort(np.asarray(label)[order], kind="stable")]
    return [np.sort(order[g::groups]) for g in range(groups)]


def of_mean(values: np.ndarray) -> tuple[float, Interval]:
    """Returns the mean of independent values `[N]`, and its interval."""
    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    half = float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))
    return mean, (mean - half, mean + half)


def check_groups(groups: int) -> None:
    """Raises ValueError unless there are no groups (no interval) or at least 2."""
    if groups != 0 and groups < 2:
        raise ValueError(
            f"groups: must be 0 (no interval) or 2 and more, got {groups}."
        )


def of_share(count: float, num: int) -> tuple[float, Interval]:
    """Returns count / num of `num` independent yes-or-no values, and Wilson's interval.

    Unlike that of `of_mean` it has a width where all values are the same.

    Source: Wilson 1927, "Probable inference", equation 5.
    """
    share, z = count / num, 1.96
    centre = (share + z**2 / (2 * num)) / (1 + z**2 / num)
    half = (
        z / (1 + z**2 / num) * np.sqrt(share * (1 - share) / num + (z / num) ** 2 / 4)
    )
    # The rounding of centre + half must not leave a share outside of its own interval.
    low, high = min(centre - half, share), max(centre + half, share)
    return share, (float(max(low, 0.0)), float(min(high, 1.0)))


def rows_of(features: Features, output: str) -> np.ndarray:
    """Returns `features.rows(output)`, looked through piece by piece.

    Raises:
      ValueError: there are no rows, they are not `[N, d]`, or some are not finite.
    """
    rows = features.rows(output)
    if rows.ndim != 2 or not rows.size:
        raise ValueError(
            f"{features.name}: '{output}' must be [N, d] with at least one row, got "
            f"shape {rows.shape}."
        )
    pieces = moments_lib.pieces(rows)
    bad = sum(int(np.sum(~np.isfinite(piece).all(axis=1))) for piece in pieces)
    if bad:
        raise ValueError(
            f"{features.name}: {bad} of {len(rows)} rows of '{output}' have NaN or "
            "infinite entries; look at the examples they come from."
        )
    return rows


def moments_of(features: Features, output: str) -> Moments:
    """Returns `features.moments(output)`.

    Raises:
      ValueError: they are of fewer than 2 rows, or not finite.
    """
    found = features.moments(output)
    if found.num < 2:
        raise ValueError(
            f"{features.name}: a covariance needs at least 2 examples, got {found.num}."
        )
    if not (np.isfinite(found.mean).all() and np.isfinite(found.scatter).all()):
        rows_of(features, output)  # says how many rows, where there are rows
        raise ValueError(
            f"{features.name}: the moments of '{output}' are not finite; make them "
            "again."
        )
    return found


def same_width(
    samples: Features, reference: Features, output: str, widths: tuple[int, int]
) -> None:
    """Raises ValueError unless both sets have features of one width."""
    if widths[0] != widths[1]:
        raise ValueError(
            f"{samples.name}, {reference.name}: '{output}' has {widths[0]} and "
            f"{widths[1]} entries; compute both with the same extractor."
        )


def both_rows(
    samples: Features, reference: Features, output: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of both sets, which have one width and are finite."""
    a, b = rows_of(samples, output), rows_of(reference, output)
    same_width(samples, reference, output, (a.shape[1], b.shape[1]))
    return a, b


def both_moments(
    samples: Features, reference: Features, output: str
) -> tuple[Moments, Moments]:
    """Returns the moments of both sets, which have one width and are finite."""
    a, b = moments_of(samples, output), moments_of(reference, output)
    same_width(samples, reference, output, (len(a.mean), len(b.mean)))
    return a, b


def group_moments(
    rows: np.ndarray, groups: int, label: np.ndarray | None = None
) -> Iterator[Moments]:
    """Yields the moments of each of `groups_of`; all of them are large."""
    parts = groups_of(len(rows), groups, label)
    return (moments_lib.of_rows(rows, part) for part in parts)


def check_positive(**fields: int | float) -> None:
    """Raises ValueError unless every field is above 0."""
    for name, value in fields.items():
        if not value > 0:
            raise ValueError(f"{name}: must be above 0, got {value}.")
