"""Frechet distance between gaussians fitted to features: FID and its relatives.

For means m_i and covariances C_i (divisor N - 1, float64), the squared distance

    FD = |m_1 - m_2|² + tr C_1 + tr C_2 - 2 tr (C_1 C_2)^(1/2)                      (1)

With any R for which R R^T = C_1, the eigenvalues of C_1 C_2 other than 0 are those of
the symmetric matrix R^T C_2 R, so

    tr (C_1 C_2)^(1/2) = sum_i eigenvalue_i(R^T C_2 R)^(1/2)                        (2)

R is a Cholesky factor, or an eigenvector times the root of its eigenvalue per column
where C_1 is singular. Of n centred rows X the root is X^T / (n - 1)^(1/2) as it stands.

For N samples of N(0, I_d) against N(0, I_d) itself the expectation of (1) is not 0 but

    (d + d (d + 1) / 4) / N    for N much larger than d                             (3)

Source: Dowson and Landau 1982 for (1); Heusel et al. 2017 (arXiv 1706.08500) for its
use. (2) agrees with the eigenvalues of C_1 C_2 of torch-fidelity 0.4 and with the
`sqrtm` of clean-fid where C_1 C_2 is well conditioned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from diffusionlab.metrics import base
from diffusionlab.metrics import moments as moments_lib
from diffusionlab.metrics.base import Features
from diffusionlab.metrics.moments import Moments
from diffusionlab.types import EvalResult


class Root(NamedTuple):
    """A root of a covariance C `[d, d]`.

    Attributes:
      factor: R `[d, r]` with R R^T = C; r is d, or the rank of C.
      triangular: whether R is a lower triangle, which halves the work of products.
    """

    factor: np.ndarray
    triangular: bool = False

    def trace_with(self, covariance: np.ndarray) -> float:
        """Returns equation 2 of C and another covariance `[d, d]`."""
        from scipy.linalg import blas

        if self.triangular:
            # A covariance is its own transpose, and that is in the order of BLAS.
            middle = blas.dtrmm(1.0, self.factor, covariance.T, side=1, lower=1)
            middle = blas.dtrmm(1.0, self.factor, middle, lower=1, trans_a=1)
        else:
            middle = self.factor.T @ (covariance @ self.factor)
        return _sum_of_roots(middle)


def root(covariance: np.ndarray) -> Root:
    """Returns a root of `covariance` `[d, d]`, singular or not."""
    from scipy import linalg

    try:
        return Root(linalg.cholesky(covariance, lower=True, check_finite=False), True)
    except linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        # What rounding leaves of an eigenvalue of 0, as in `numpy.linalg.matrix_rank`.
        kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
        return Root(vectors[:, kept] * np.sqrt(values[kept]))


def _sum_of_roots(matrix: np.ndarray) -> float:
    """The sum of the square roots of the eigenvalues, which rounding makes negative."""
    # numpy's driver takes no longer than the best of scipy's at 1,024 and 2,048.
    return float(np.sum(np.sqrt(np.maximum(np.linalg.eigvalsh(matrix), 0.0))))


def distance_to(reference: Moments) -> Callable[[Moments], float]:
    """Returns `f(samples) -> FD`; the reference is factored once."""
    covariance = reference.covariance
    of_reference, trace = root(covariance), float(np.trace(covariance))

    def distance(samples: Moments) -> float:
        of_samples = samples.covariance
        square = float(np.sum((samples.mean - reference.mean) ** 2))
        both = trace + float(np.trace(of_samples))
        # Below 0 by no more than rounding.
        return max(square + both - 2 * of_reference.trace_with(of_samples), 0.0)

    return distance


def frechet_distance(a: Moments, b: Moments) -> float:
    """Returns equation 1, the squared form that FID is.

    Raises:
      ValueError: the widths differ, or one of the two has fewer than 2 rows.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(
            f"frechet_distance: the moments are of {len(a.mean)} and {len(b.mean)} "
            "features."
        )
    return distance_to(b)(a)


def distance_of_rows(a: np.ndarray, b: np.ndarray) -> float:
    """Returns equation 1 for rows `[N, d]` and `[M, d]`, cheaply where N or M < d."""
    if len(a) > len(b):
        a, b = b, a
    if len(a) >= a.shape[1]:
        return frechet_distance(moments_lib.of_rows(a), moments_lib.of_rows(b))
    (mean_a, root_a), (mean_b, root_b) = _centred(a), _centred(b)
    if len(b) < b.shape[1]:
        both = root_a.T @ root_b
        middle = both @ both.T
    else:
        middle = root_a.T @ (root_b @ (root_b.T @ root_a))
    square = np.sum((mean_a - mean_b) ** 2) + np.sum(root_a**2) + np.sum(root_b**2)
    return max(float(square) - 2 * _sum_of_roots(middle), 0.0)


def _centred(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of `[N, d]`, and a root `[d, N]` of the covariance."""
    rows = np.asarray(rows, np.float64)
    mean = rows.mean(axis=0)
    return mean, (rows - mean).T / np.sqrt(len(rows) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frechet:
    """Frechet distance of all features: FID with those of Inception; equation 1.

    Number `frechet`. Its interval is about the expectation at this number of samples,
    equation 3 included: compare equal numbers only, or use `frechet_infinity`.

    Attributes:
      groups: of the jackknife behind the interval, each of which costs one more
        distance (at 2,048 features about a second); 0 is without interval.
    """

    groups: int = 10
    needs = ("features",)

    def __post_init__(self):
        base.check_groups(self.groups)

    def __call__(self, samples: Features, reference: Features) -> EvalResult:
        return _measured("frechet", "features", samples, reference, self.groups)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpatialFrechet:
    """Frechet distance of features that keep their places: sFID.

    Number `spatial_frechet`, of the output 'spatial' (of Inception for sFID); otherwise
    as `Frechet`.

    Attributes:
      groups: of the jackknife behind the interval; 0 is without interval.

    Source: Nash et al. 2021 (arXiv 2103.03841), section 5.1.
    """

    groups: int = 10
    needs = ("spatial",)

    def __post_init__(self):
        base.check_groups(self.groups)

    def __call__(self, samples: Features, reference: Features) -> EvalResult:
        return _measured("spatial_frechet", "spatial", samples, reference, self.groups)


def _measured(name, output, samples, reference, groups) -> EvalResult:
    a, b = base.both_moments(samples, reference, output)
    distance = distance_to(b)
    value = distance(a)
    notes = {name: about(a, b)}
    few = warning(a, b)
    if few:
        notes["warning"] = few
    intervals = {}
    # Without a group at least 2 samples must be left for a covariance.
    if groups and a.num >= max(groups, 4):
        try:
            rows = samples.rows(output)
        except ValueError:
            notes["interval"] = "none: of the samples only the moments are known"
        else:
            parts = base.group_moments(rows, groups, samples.label)
            rest = [distance(moments_lib.without(a, part)) for part in parts]
            intervals[name] = base.jackknife(value, rest)
    return EvalResult({name: value}, notes, intervals=intervals)


def about(a: Moments, b: Moments) -> str:
    """Returns what a distance was computed from, for the notes."""
    known, other = (
        f"{part.num}" if np.isfinite(part.num) else "an unknown number of"
        for part in (a, b)
    )
    return (
        f"{known} samples against {other} examples, {len(a.mean)} features, covariance "
        "with divisor N - 1"
    )


def warning(a: Moments, b: Moments) -> str | None:
    """Returns what to know of a distance with fewer examples than features, or None."""
    width, few = len(a.mean), min(a.num, b.num)
    if few > width:
        return None
    return (
        f"{few} examples of {width} features: the covariance has rank {few - 1} at "
        "most, and the distance is far too large even where the distributions agree "
        "(the excess falls as 1/N only from N well above the features on); take more, "
        "or 'kernel', whose expectation does not depend on N."
    )
