"""Sliced Wasserstein distance: optimal transport along random directions.

In one dimension, with the quantile functions F^-1 and G^-1 of two sets of any sizes,

    W_p^p = int_0^1 |F^-1(u) - G^-1(u)|^p du                                        (1)

exactly, as both are steps. For L random directions of length 1

    SW_p = ( mean_l W_p^p(x.theta_l, y.theta_l) )^(1/p)                             (2)

Source: Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures",
section 3.1, by random directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from diffusionlab.metrics import base
from diffusionlab.metrics.base import Features
from diffusionlab.types import EvalResult

_ROWS = 4096  # rows of features projected together
_DIRECTIONS = 64  # of them whose projections are held together


def steps(num: int, num_other: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (index, other index, weight) of the pieces of equation 1.

    On a piece both quantile functions are constant; there are at most num + num_other
    of them, and the weights add up to 1.
    """
    # In units of 1 / (num num_other) all ends are integers.
    ends = np.union1d(
        np.arange(1, num + 1, dtype=np.int64) * num_other,
        np.arange(1, num_other + 1, dtype=np.int64) * num,
    )
    starts = np.concatenate([[0], ends[:-1]])
    return starts // num_other, starts // num, (ends - starts) / (num * num_other)


def wasserstein(a: np.ndarray, b: np.ndarray, power: int = 2) -> np.ndarray:
    """Returns equation 1 for each column of sorted `[N, L]` and `[M, L]`, `[L]`."""
    if len(a) == len(b):
        return np.mean(np.abs(a - b) ** power, axis=0)
    mine, theirs, weight = steps(len(a), len(b))
    return weight @ np.abs(a[mine] - b[theirs]) ** power


def directions(width: int, number: int, seed: int) -> np.ndarray:
    """Returns `[width, number]` uniform directions of length 1."""
    found = np.random.default_rng(seed).normal(size=(number, width))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).T


def _project(rows: np.ndarray, along: np.ndarray) -> np.ndarray:
    found = np.empty((len(rows), along.shape[1]))
    for start in range(0, len(rows), _ROWS):
        piece = np.asarray(rows[start : start + _ROWS], np.float64)
        found[start : start + _ROWS] = piece @ along
    return found


def sliced_wasserstein(
    x: np.ndarray,
    y: np.ndarray,
    num_directions: int = 512,
    power: int = 2,
    seed: int = 0,
    parts: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Returns equation 2 of `x` `[N, d]` and `y` `[M, d]`, and without each part of x.

    Args:
      x, y: any float type.
      num_directions: L.
      power: p, 1 or 2.
      seed: of the directions.
      parts: indices of rows of `x`, no row in two of them.

    Returns:
      `[1 + len(parts)]` float64.
    """
    parts = parts or []
    along = directions(x.shape[1], num_directions, seed)
    total = np.zeros(1 + len(parts))
    group = np.full(len(x), -1)
    for i, part in enumerate(parts):
        group[part] = i
    for start in range(0, num_directions, _DIRECTIONS):
        some = along[:, start : start + _DIRECTIONS]
        mine, theirs = _project(x, some), np.sort(_project(y, some), axis=0)
        order = np.argsort(mine, axis=0)
        mine = np.take_along_axis(mine, order, axis=0)
        total[0] += wasserstein(mine, theirs, power).sum()
        for i in range(len(parts)):
            # Rows that stay, in order; every column loses the same number of them.
            kept = (group != i)[order]
            rest = mine.T[kept.T].reshape(some.shape[1], -1).T
            total[1 + i] += wasserstein(rest, theirs, power).sum()
    return (total / num_directions) ** (1 / power)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlicedWasserstein:
    """Sliced Wasserstein distance of the features; equation 2.

    Number `sliced_wasserstein`, in units of the features. It is positive even for two
    sets of one distribution, and falls with their sizes: compare equal numbers only.

    Attributes:
      num_directions: random ones.
      power: p of equation 1: 2, or 1, which a few far samples change less.
      seed: of the directions.
      groups: of the jackknife behind the interval; 0 is without interval.
    """

    num_directions: int = 512
    power: int = 2
    seed: int = 0
    groups: int = 10
    needs = ("features",)
    reference_rows = True

    def __post_init__(self):
        base.check_positive(num_directions=self.num_directions)
        if self.power not in (1, 2):
            raise ValueError(f"power: must be 1 or 2, got {self.power}.")
        base.check_groups(self.groups)

    def __call__(self, samples: Features, reference: Features) -> EvalResult:
        x, y = base.both_rows(samples, reference, "features")
        groups = self.groups if len(x) >= 2 * self.groups else 0
        parts = base.groups_of(len(x), groups, samples.label)
        value, *rest = sliced_wasserstein(
            x, y, self.num_directions, self.power, self.seed, parts
        )
        name = "sliced_wasserstein"
        intervals = {name: base.jackknife(value, rest)} if groups else {}
        notes = {
            name: f"{len(x)} samples against {len(y)} examples, {self.num_directions} "
            f"directions of {x.shape[1]} features, p = {self.power}"
        }
        return EvalResult({name: float(value)}, notes, intervals=intervals)
