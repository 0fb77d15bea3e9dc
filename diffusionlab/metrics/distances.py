"""Euclidean distances between all pairs of two sets: which are small, exactly.

Squared distances of float32 matrix products,

    |a - b|² = |a|² + |b|² - 2 a.b                                                  (1)

about a common centre, are off by at most c (|a|² + |b|²). Where only those below a
limit matter, say r², then |b| <= |a| + r, so that the error is at most

    margin = c (|a|² + (|a| + r)²)                                                  (2)

and what is further from the limit than that is decided. The few other pairs are decided
by the float64 sum of (a_k - b_k)², which is 0 for a copy and the same in both orders.
The answers are those of float64 throughout, at half the time or less.

Where the pairs that are left are many, as of clusters far apart, (1) is taken once more
in float64, with a margin of that, before the sum. Rows that are copies, of which a
collapsed model has many, are known by their hash, and 0 apart without a sum.

A set is held as float32 rows about the centre, besides what was given: of 50,000 rows
of 2,048 features that is 400 MB.

Source: Higham and Mary 2019, "A new approach to probabilistic rounding error analysis",
theorem 2.4: a dot product of d terms is off by more than 8 d^(1/2) u times the two
lengths with a probability below 1e-13.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

_ENTRIES = 2**24  # of a block of distances: 64 MB
_ROWS = 4096  # of a block, at most
_PIECE = 2**22  # entries of rows that are float64 at one time: 32 MB
_UNIT = 2.0**-24  # of rounding to float32
_UNIT_64 = 2.0**-53
_MANY = 4096  # pairs, from which on products in float64 are worth their start
_DENSE = 16  # products take as long as sums over one in so many of the pairs


@dataclasses.dataclass(frozen=True)
class Points:
    """One set of rows.

    Attributes:
      rows: `[N, d]` as they were given.
      centred: `[N, d]` float32, about a centre that all sets in use have in common.
      square: `[N]` float32, squared lengths of `centred`.
      centre: `[d]` float64.
      hashes: `[N]` int64, the same for copies of a row, and for no others.
    """

    rows: np.ndarray
    centred: np.ndarray
    square: np.ndarray
    centre: np.ndarray
    hashes: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: np.ndarray) -> Points:
        """Returns some of the points."""
        return Points(
            self.rows[index],
            self.centred[index],
            self.square[index],
            self.centre,
            self.hashes[index],
        )

    def margin(self, limit: np.ndarray, unit: float = _UNIT) -> np.ndarray:
        """Returns equation 2 `[N]` for a limit r² `[N]` of each point."""
        length = np.sqrt(self.square, dtype=np.float64)
        # The last terms: rounding of the rows, and of the sums in equation 1.
        factor = (8 * np.sqrt(self.rows.shape[1]) + 16) * unit
        far = length + np.sqrt(np.maximum(limit, 0))
        return factor * (length**2 + far**2)


def points(rows: np.ndarray, centre: np.ndarray) -> Points:
    """Returns `[N, d]` rows about `centre` `[d]` float64."""
    centred = np.empty(rows.shape, np.float32)
    square = np.empty(len(rows), np.float32)
    # 64 bits: among 50,000 rows two are confused with a probability of 1e-10.
    hashes = np.fromiter(
        (hash((rows.dtype.str, row.tobytes())) for row in np.asarray(rows)),
        np.int64,
        len(rows),
    )
    piece = max(1, _PIECE // rows.shape[1])
    for start in range(0, len(rows), piece):
        some = rows[start : start + piece] - centre
        centred[start : start + piece] = some
        square[start : start + piece] = np.einsum("ij,ij->i", some, some)
    return Points(rows, centred, square, centre, hashes)


def centre(rows: np.ndarray) -> np.ndarray:
    """Returns the mean `[d]` float64 of `[N, d]`."""
    return np.mean(rows, axis=0, dtype=np.float64)


def blocks(a: Points, b: Points) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (rows of a, equation 1 `[rows, len(b)]` float32) block by block.

    A block is overwritten by the next one.
    """
    rows = min(max(1, _ENTRIES // len(b)), len(a), _ROWS)
    block = np.empty((rows, len(b)), np.float32)
    for start in range(0, len(a), rows):
        some = slice(start, min(start + rows, len(a)))
        found = block[: some.stop - start]
        # One and the same array on both sides takes numpy half the work.
        np.matmul(a.centred[some], b.centred.T, out=found)
        found *= -2
        found += a.square[some, None]
        found += b.square
        yield some, found


def places(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the row and column indices where `mask` `[N, M]` is true, row by row."""
    # Three times as fast as `nonzero` of two axes where few are.
    return np.divmod(np.flatnonzero(mask), mask.shape[1])


def exact(a: Points, b: Points, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Returns |a_i - b_j|² for each pair of indices, `[P]` float64."""
    found = np.zeros(len(i))
    other = np.flatnonzero(a.hashes[i] != b.hashes[j])
    piece = max(1, _PIECE // a.rows.shape[1])
    for start in range(0, len(other), piece):
        some = other[start : start + piece]
        apart = np.subtract(a.rows[i[some]], b.rows[j[some]], dtype=np.float64)
        found[some] = np.einsum("ij,ij->i", apart, apart)
    return found


def near(
    a: Points, b: Points, i: np.ndarray, j: np.ndarray, limit: np.ndarray | int
) -> np.ndarray:
    """Returns |a_i - b_j|² for each pair, `[P]`: exactly, where near to a limit.

    Elsewhere it is rounded, and on the same side of the limit.

    Args:
      a, b: `[N, d]` and `[M, d]`.
      i, j: `[P]`, indices of pairs; i ascends.
      limit: `[P]`, or k: the k-th smallest of all pairs of an i.
    """
    found = _products(a, b, i, j)
    if found is None:
        return exact(a, b, i, j)
    margin = _pair_margin(a, b, i, j)
    if isinstance(limit, int):
        of, back = _used(i, len(a))
        limit = found[_kth(found, i, j, limit, of)][back]
        # Twice: a k-th smallest is off by no more than the worst pair is.
        margin = 2 * np.maximum.reduceat(margin, np.searchsorted(i, of))[back]
    unsure = np.flatnonzero(np.abs(found - limit) <= margin)
    found[unsure] = exact(a, b, i[unsure], j[unsure])
    return found


def _pair_margin(a: Points, b: Points, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """The error of `_products`, as in equation 2."""
    factor = (8 * np.sqrt(a.rows.shape[1]) + 16) * _UNIT_64
    return factor * (a.square[i].astype(np.float64) + b.square[j])


def _products(a: Points, b: Points, i: np.ndarray, j: np.ndarray) -> np.ndarray | None:
    """Equation 1 of pairs in float64 `[P]`; None where sums take less time."""
    if len(i) < _MANY:
        return None
    mine, i = _used(i, len(a))
    theirs, j = _used(j, len(b))
    if len(i) * _DENSE < len(mine) * len(theirs):
        return None
    left = a.rows[mine] - a.centre
    block = np.empty((len(mine), len(theirs)))
    piece = max(1, _PIECE // a.rows.shape[1])
    for start in range(0, len(theirs), piece):
        some = slice(start, start + piece)
        right = b.rows[theirs[some]] - b.centre
        np.matmul(left, right.T, out=block[:, some])
        block[:, some] *= -2
        block[:, some] += np.einsum("ij,ij->i", right, right)
    block += np.einsum("ij,ij->i", left, left)[:, None]
    return block[i, j]


def _used(index: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """The different indices below `num`, and the place of each among them."""
    used = np.zeros(num, bool)
    used[index] = True
    return np.flatnonzero(used), (np.cumsum(used) - 1)[index]


def _kth(square, i, j, k: int, of: np.ndarray) -> np.ndarray:
    """The place of the k-th smallest pair with each i in `of`; i ascends."""
    order = np.lexsort((j, square, i))
    return order[np.searchsorted(i, of) + k - 1]


def kth_nearest(
    a: Points, b: Points, k: int, own: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the index of the k-th nearest of `b` to each of `a`, and |a - b|².

    Args:
      a, b: `[N, d]` and `[M, d]`.
      k: 1 is the nearest; there must be as many.
      own: `[N]`, the index in `b` of each point of `a` itself, which does not count.
    """
    index, square = np.empty(len(a), np.int64), np.empty(len(a))
    for rows, block in blocks(a, b):
        count = len(block)
        if own is not None:
            block[np.arange(count), own[rows]] = np.inf
        if k == 1:
            limit = block.min(axis=1).astype(np.float64)
        else:
            limit = np.partition(block, k - 1, axis=1)[:, k - 1].astype(np.float64)
        # Twice: the limit itself is off by as much.
        high = limit + 2 * a.take(rows).margin(limit)
        i, j = places(block <= high[:, None].astype(np.float32))
        apart = near(a, b, i + rows.start, j, k)
        place = _kth(apart, i, j, k, np.arange(count))
        index[rows], square[rows] = j[place], apart[place]
    return index, square
