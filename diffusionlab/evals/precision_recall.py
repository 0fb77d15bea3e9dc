"""Precision and recall of samples by k-nearest-neighbour balls.

The support of a set is taken to be the union of balls around its points, each as large
as the distance to the k-th nearest other point:

  precision = share of samples inside the support of the real data       (1)
  recall    = share of real data inside the support of the samples       (2)

Source: Kynkaanniemi et al. 2019, "Improved precision and recall metric for assessing
generative models", arXiv 1904.06991, equations 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_CHUNK = 2**22  # entries of a block of the distance matrix: 16 MB


def flat(x: np.ndarray) -> np.ndarray:
    """Returns `[N, ...]` as float32 `[N, D]`."""
    return np.asarray(x, np.float32).reshape(len(x), -1)


def distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (rows of a, euclidean distances `[rows, len(b)]`) block by block."""
    rows = max(1, _CHUNK // len(b))
    # Centred, the expanded square loses less to cancellation.
    centre = b.mean(axis=0)
    a, b = a - centre, b - centre
    square_b = np.sum(b * b, axis=1)
    for start in range(0, len(a), rows):
        block = a[start : start + rows]
        square = np.sum(block * block, axis=1)[:, None] + square_b - 2 * block @ b.T
        yield slice(start, start + len(block)), np.sqrt(np.maximum(square, 0))


def nearest(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the index of the nearest row of `b` to each of `a`, and its distance."""
    index = np.empty(len(a), np.int64)
    distance = np.empty(len(a), np.float32)
    for rows, block in distances(a, b):
        index[rows] = block.argmin(axis=1)
        # Exactly, so that a copy has distance 0 and not the rounding of the expansion.
        distance[rows] = np.linalg.norm(a[rows] - b[index[rows]], axis=1)
    return index, distance


def knn_radii(x: np.ndarray, k: int) -> np.ndarray:
    """Returns the distance `[N]` of each row of `x` to its k-th nearest other row.

    Raises:
      ValueError: there are no k other rows.
    """
    if not 1 <= k < len(x):
        raise ValueError(f"k: expected 1 to {len(x) - 1} for {len(x)} points, got {k}.")
    radii = np.empty(len(x), np.float32)
    for rows, block in distances(x, x):
        # Not every point finds itself at exactly 0, so itself is taken out by place.
        block[np.arange(len(block)), np.arange(rows.start, rows.stop)] = np.inf
        radii[rows] = np.partition(block, k - 1, axis=1)[:, k - 1]
    return radii


def precision_recall(
    real: np.ndarray, fake: np.ndarray, k: int = 5
) -> tuple[float, float]:
    """Returns (precision, recall) of `fake` with respect to `real`, each `[N, D]`."""
    real, fake = flat(real), flat(fake)
    radii_real, radii_fake = knn_radii(real, k), knn_radii(fake, k)
    inside, covered = 0, np.zeros(len(real), bool)
    for rows, block in distances(fake, real):
        inside += np.any(block <= radii_real, axis=1).sum()
        covered |= np.any(block <= radii_fake[rows, None], axis=0)
    return float(inside / len(fake)), float(covered.mean())
