"""Mean and covariance of any number of rows, batch by batch, in float64.

Two sets of n_a and n_b rows with means m_a, m_b and scatter matrices
M = sum (x - m)(x - m)^T are one set with

    m = m_a + d n_b / n,   M = M_a + M_b + d d^T n_a n_b / n,   d = m_b - m_a       (1)

which loses nothing to cancellation, in any order and any division into parts.

Source: Chan, Golub and LeVeque 1979, equation 2.1, for vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

_ROWS = 4096  # rows taken at a time: 64 MB of 2,048 float64 features


class Moments(NamedTuple):
    """The first two moments of `num` rows.

    Attributes:
      num: rows.
      mean: `[d]` float64.
      scatter: `[d, d]` float64, the sum of outer products about the mean.
    """

    num: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """`[d, d]`, with divisor num - 1."""
        if self.num < 2:
            raise ValueError(f"covariance: needs at least 2 rows, got {self.num}.")
        return self.scatter / (self.num - 1)


def pieces(rows: np.ndarray, index: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Yields the rows of `[N, d]`, or those of `index`, some thousand at a time."""
    num = len(rows) if index is None else len(index)
    for start in range(0, num, _ROWS):
        some = slice(start, start + _ROWS)
        yield rows[some if index is None else index[some]]


def of_rows(rows: np.ndarray, index: np.ndarray | None = None) -> Moments:
    """Returns the moments of `[N, d]`, or of its rows `index`.

    A memory map is read piece by piece; ascending indices read it in order.
    """
    return merge(map(_of_piece, pieces(rows, index)))


def _of_piece(rows: np.ndarray) -> Moments:
    rows = np.asarray(rows, np.float64)
    mean = rows.mean(axis=0)
    centred = rows - mean
    return Moments(len(rows), mean, centred.T @ centred)


def merge(parts: Iterable[Moments]) -> Moments:
    """Returns the moments of all parts together; equation 1.

    Raises:
      ValueError: there are none.
    """
    parts = iter(parts)
    total = next(parts, None)
    if total is None:
        raise ValueError("merge: there are no moments.")
    for part in parts:
        num = total.num + part.num
        delta = part.mean - total.mean
        mean = total.mean + delta * (part.num / num)
        scatter = total.scatter + part.scatter
        scatter += np.outer(delta, delta) * (total.num * part.num / num)
        total = Moments(num, mean, scatter)
    return total


def without(total: Moments, part: Moments) -> Moments:
    """Returns the moments of the rows of `total` that are not in `part`; equation 1.

    Meant for small parts: where nearly all rows go, what is left is a difference of
    two large numbers.

    Raises:
      ValueError: no row would be left.
    """
    num = total.num - part.num
    if num < 1:
        raise ValueError(f"without: {part.num} of {total.num} rows leave none.")
    mean = total.mean + (total.mean - part.mean) * (part.num / num)
    delta = part.mean - mean
    scatter = np.outer(delta, delta)
    scatter *= -(num * part.num / total.num)
    scatter += total.scatter
    scatter -= part.scatter
    return Moments(num, mean, scatter)
