"""Peak signal-to-noise ratio of pairs of images.

    PSNR = 10 log10( range² / MSE )                                                 (1)

per pair, in decibels, with the mean over all pixels and channels. The mean over pairs
of (1) is not (1) of the mean error; it is that of scikit-image averaged over pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from diffusionlab.metrics import base
from diffusionlab.types import DataSpec


def psnr(
    x: np.ndarray, y: np.ndarray, data_range: float = 2.0, cap: float = np.inf
) -> np.ndarray:
    """Returns equation 1 of `x[i]` and `y[i]`, `[B]` float64, at most `cap`.

    Args:
      x, y: `[B, ...]`.
      data_range: what the values span; 2 for [-1, 1].
      cap: decibels; without it two equal images have infinitely many.
    """
    if x.shape != y.shape:
        raise ValueError(f"psnr: the shapes {x.shape} and {y.shape} differ.")
    error = np.subtract(x, y, dtype=np.float64).reshape(len(x), -1)
    with np.errstate(divide="ignore"):
        found = 10 * np.log10(data_range**2 / np.mean(error**2, axis=1))
    return np.minimum(found, cap)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Psnr:
    """PSNR of each pair in decibels, values taken to span 2; equation 1.

    Neither of the two is clipped or rounded to levels of 8 bits before.

    Attributes:
      cap: decibels that a pair has at most, as equal ones would have infinitely many.
    """

    cap: float = 100.0

    def __post_init__(self):
        base.check_positive(cap=self.cap)

    def check(self, spec: DataSpec) -> None:
        """Any shape will do."""

    def prepare(self, room) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """Returns `f(x, y) -> [B]` float64 for `[B, ...]` in [-1, 1]."""
        return lambda x, y: psnr(x, y, cap=self.cap)
