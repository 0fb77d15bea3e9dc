"""Kernel distances between features: KID and CMMD, both maximum mean discrepancies.

    MMD² = E k(x, x') + E k(y, y') - 2 E k(x, y)                                    (1)

KID has k(x, y) = (x.y / d + 1)³ and leaves i = j out of the first two means, so that
its expectation does not depend on the number of samples, and may come out negative. It
is a mean over random subsets. CMMD has unit vectors, k(x, y) = exp(-|x - y|² / (2 s²))
with s = 10, keeps i = j, and is 1000 times (1).

Source: Binkowski et al. 2018 (arXiv 1801.01401), section 4; Jayasumana et al. 2024
(arXiv 2401.09603), section 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from diffusionlab.metrics import base
from diffusionlab.metrics.base import Features
from diffusionlab.types import EvalResult

_BLOCK = 2048  # rows of either set in one block of a kernel matrix: 32 MB
_FEW = 1000  # examples, below which the draw of the reference matters


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    found = x @ y.T
    found /= x.shape[1]
    found += 1.0
    # A power of a float64 array takes ten times as long as two products.
    square = found * found
    square *= found
    return square


class Subset(NamedTuple):
    """One subset.

    Attributes:
      value: equation 1.
      influence: `[m]`, twice the first-order part of each sample in it.
    """

    value: float
    influence: np.ndarray


def _subset(x: np.ndarray, y: np.ndarray) -> Subset:
    num = len(x)
    within, across, other = _cubic(x, x), _cubic(x, y), _cubic(y, y)
    mine = (within.sum(axis=1) - np.diagonal(within)) / (num - 1)
    theirs = (other.sum() - np.trace(other)) / (num * (num - 1))
    to_other = across.mean(axis=1)
    value = float(mine.mean() + theirs - 2 * to_other.mean())
    return Subset(value, 2 * (mine - to_other))


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the unbiased equation 1 with KID's kernel for two sets `[m, d]`."""
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(
            "kernel_distance: expected two sets of the same number of rows, at least "
            f"2, got {len(x)} and {len(y)}."
        )
    return _subset(np.asarray(x, np.float64), np.asarray(y, np.float64)).value


class Subsets(NamedTuple):
    """Equation 1 over random subsets.

    Attributes:
      values: `[subsets]`.
      influence: `[N]`, the mean over the subsets a sample was in; NaN for none.
    """

    values: np.ndarray
    influence: np.ndarray


def kernel_subsets(
    x: np.ndarray, y: np.ndarray, subsets: int, size: int, seed: int
) -> Subsets:
    """Returns KID of random subsets of `x` `[N, d]` and `y` `[M, d]`.

    The rows are those of torch-fidelity 0.4: from one `RandomState(seed)`, of `x` and
    then of `y`, subset after subset, without replacement.
    """
    rng = np.random.RandomState(seed)
    values = np.empty(subsets)
    total, times = np.zeros(len(x)), np.zeros(len(x))
    for i in range(subsets):
        mine = rng.choice(len(x), size, replace=False)
        theirs = rng.choice(len(y), size, replace=False)
        found = _subset(x[mine].astype(np.float64), y[theirs].astype(np.float64))
        values[i] = found.value
        total[mine] += found.influence
        times[mine] += 1
    with np.errstate(invalid="ignore"):
        return Subsets(values, total / times)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """Kernel distance, unbiased: KID with the features of Inception; equation 1.

    Numbers `kernel`, the mean over subsets, and `kernel_std` over them (divisor: their
    number). With the defaults they are those of torch-fidelity. The interval has two
    parts: that of the samples, from the first-order influence of each, and that of the
    choice of subsets, kernel_std² over their number. It does not hold what another
    draw of the reference would change: below 0 as a whole, it says that the reference
    is small, not that the samples are better than data.

    Where every subset is the whole of both sets there is one, and no `kernel_std`.

    Attributes:
      subsets: random ones.
      subset_size: rows of each; the smaller of the two sets where it has fewer.
      seed: of the subsets.
    """

    subsets: int = 100
    subset_size: int = 1000
    seed: int = 2020
    needs = ("features",)
    reference_rows = True

    def __post_init__(self):
        base.check_positive(subsets=self.subsets)
        if self.subset_size < 2:
            raise ValueError(
                f"subset_size: must be at least 2, got {self.subset_size}."
            )

    def __call__(self, samples: Features, reference: Features) -> EvalResult:
        x, y = base.both_rows(samples, reference, "features")
        size = min(self.subset_size, len(x), len(y))
        if size < 2:
            raise ValueError(
                f"{samples.name}, {reference.name}: a kernel distance needs at least 2 "
                f"examples of each, got {len(x)} and {len(y)}."
            )
        subsets = 1 if size == len(x) == len(y) else self.subsets
        found = kernel_subsets(x, y, subsets, size, self.seed)
        mean, std = float(found.values.mean()), float(found.values.std())
        of = "1 subset" if subsets == 1 else f"{subsets} subsets"
        notes = {
            "kernel": f"{of} of {size} from {len(x)} samples and {len(y)} examples, "
            f"{x.shape[1]} features"
        }
        numbers = {"kernel": mean}
        if size == len(x) == len(y):
            notes["kernel_std"] = "none: every subset is the whole of both sets"
        else:
            numbers["kernel_std"] = std
        few = _warning(size, self.subset_size, len(y))
        if few:
            notes["warning"] = few
        influence = found.influence[~np.isnan(found.influence)]
        square = influence.var(ddof=1) / len(x) + std**2 / subsets
        half = 1.96 * np.sqrt(square)
        intervals = {"kernel": (float(mean - half), float(mean + half))}
        return EvalResult(numbers, notes, intervals=intervals)


def _warning(size: int, wanted: int, num_other: int) -> str | None:
    """What to know of small sets, or None."""
    found = []
    if size < wanted:
        found.append(
            f"subsets of {size}, as there are no {wanted} examples in both sets: the "
            "expectation is the same, the spread is larger"
        )
    if num_other < _FEW or size == num_other:
        found.append(
            f"the draw of the {num_other} examples of the reference shifts all values "
            "alike, also below 0, and the interval does not hold it: compare with the "
            "value of real data against the same reference"
        )
    return "; ".join(found) + "." if found else None


def unit(rows: np.ndarray) -> np.ndarray:
    """Returns `[N, d]` float64 with rows of length 1; a row of zeros stays."""
    rows = np.asarray(rows, np.float64)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length == 0, 1.0, length)


class _Part(NamedTuple):
    """The rows `index` of a set, which are read in blocks as they are needed."""

    rows: np.ndarray
    index: np.ndarray

    def blocks(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self.index), _BLOCK):
            yield unit(self.rows[self.index[start : start + _BLOCK]])


def _gaussian_sum(x: _Part, y: _Part, bandwidth: float) -> float:
    """The sum of CMMD's kernel over all pairs, block by block."""
    total = 0.0
    for left in x.blocks():
        for right in y.blocks():
            block = left @ right.T
            # |x - y|² = |x|² + |y|² - 2 x.y, and rows of zeros have length 0.
            block *= -2.0
            block += np.sum(left * left, axis=1)[:, None]
            block += np.sum(right * right, axis=1)
            block *= -0.5 / bandwidth**2
            total += float(np.exp(block, out=block).sum())
    return total


class KernelSums(NamedTuple):
    """Sums of a kernel over pairs, from which equation 1 follows without any group.

    Attributes:
      num: `[G]`, samples in each group.
      within: `[G, G]`, over pairs of samples.
      across: `[G]`, over pairs of a sample and an example.
      other: over pairs of examples.
      num_other: examples.
    """

    num: np.ndarray
    within: np.ndarray
    across: np.ndarray
    other: float
    num_other: int

    def distance(self, kept: np.ndarray) -> float:
        """Equation 1, biased, of the groups in `kept` `[G]` bool."""
        num = self.num[kept].sum()
        return float(
            self.within[np.ix_(kept, kept)].sum() / num**2
            + self.other / self.num_other**2
            - 2 * self.across[kept].sum() / (num * self.num_other)
        )


def kernel_sums(
    x: np.ndarray,
    y: np.ndarray,
    bandwidth: float = 10.0,
    groups: Sequence[np.ndarray] = (),
) -> KernelSums:
    """Returns the sums of CMMD's kernel over `x` `[N, d]` and `y` `[M, d]`.

    Args:
      x, y: any float type.
      bandwidth: s of the kernel.
      groups: G parts of the indices of `x`, all of them; without, one of all.
    """
    parts = [_Part(x, index) for index in groups or [np.arange(len(x))]]
    other = _Part(y, np.arange(len(y)))
    within = np.zeros((len(parts), len(parts)))
    for g, left in enumerate(parts):
        for h in range(g, len(parts)):
            within[g, h] = within[h, g] = _gaussian_sum(left, parts[h], bandwidth)
    across = np.array([_gaussian_sum(part, other, bandwidth) for part in parts])
    num = np.array([len(part.index) for part in parts])
    among = _gaussian_sum(other, other, bandwidth)
    return KernelSums(num, within, across, among, len(y))


def cmmd(
    x: np.ndarray, y: np.ndarray, bandwidth: float = 10.0, scale: float = 1000.0
) -> float:
    """Returns CMMD of `x` `[N, d]` and `y` `[M, d]`, their rows brought to length 1."""
    return scale * kernel_sums(x, y, bandwidth).distance(np.ones(1, bool))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cmmd:
    """Kernel distance of unit vectors, biased: CMMD with those of CLIP; equation 1.

    Number `cmmd`. With the defaults it is that of the reference code.

    Attributes:
      bandwidth: s of the kernel.
      scale: by which equation 1 is multiplied.
      groups: of the jackknife behind the interval, which costs no more; 0 is without.
    """

    bandwidth: float = 10.0
    scale: float = 1000.0
    groups: int = 10
    needs = ("features",)
    reference_rows = True

    def __post_init__(self):
        base.check_positive(bandwidth=self.bandwidth, scale=self.scale)
        base.check_groups(self.groups)

    def __call__(self, samples: Features, reference: Features) -> EvalResult:
        x, y = base.both_rows(samples, reference, "features")
        groups = self.groups if len(x) >= self.groups else 0
        parts = base.groups_of(len(x), groups, samples.label)
        sums = kernel_sums(x, y, self.bandwidth, parts)
        every = np.ones(max(groups, 1), bool)
        value = self.scale * sums.distance(every)
        intervals = {}
        if groups:
            rest = [
                self.scale * sums.distance(row) for row in ~np.eye(groups, dtype=bool)
            ]
            intervals["cmmd"] = base.jackknife(value, rest)
        notes = {
            "cmmd": f"{len(x)} samples against {len(y)} examples, {x.shape[1]} "
            f"features, bandwidth {self.bandwidth:g}, times {self.scale:g}"
        }
        return EvalResult({"cmmd": value}, notes, intervals=intervals)
