"""Structural similarity of pairs of images.

With means m, variances v and the covariance v_xy in a gaussian window of 11 x 11
pixels, standard deviation 1.5, and values that span R

    SSIM = (2 m_x m_y + c_1)(2 v_xy + c_2) / ((m_x² + m_y² + c_1)(v_x + v_y + c_2))  (1)
    c_1 = (0.01 R)²,  c_2 = (0.03 R)²

averaged over the places where the whole window lies in the image, and over channels.
That is scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5,
use_sample_covariance=False, data_range=2)`. torchmetrics 1.9 averages over all places
of the image continued by reflection: another number.

Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural
similarity", equation 13.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from diffusionlab.types import DataSpec

_SIZE = 11
_SIGMA = 1.5


def _window() -> np.ndarray:
    weight = np.exp(-0.5 * ((np.arange(_SIZE) - _SIZE // 2) / _SIGMA) ** 2)
    return weight / weight.sum()


def _local_mean(x: np.ndarray) -> np.ndarray:
    """`[B, H, W, C]` -> `[B, H - 10, W - 10, C]`, weighted by the window."""
    from scipy import ndimage

    inner = slice(_SIZE // 2, -(_SIZE // 2))
    for axis in (1, 2):
        x = ndimage.correlate1d(x, _window(), axis=axis, mode="constant")
    return x[:, inner, inner]


def ssim(x: np.ndarray, y: np.ndarray, data_range: float = 2.0) -> np.ndarray:
    """Returns the mean of equation 1 for each pair, `[B]` float64 in [-1, 1].

    Args:
      x, y: `[B, H, W, C]`.
      data_range: R; 2 for [-1, 1].

    Raises:
      ValueError: the shapes differ, or the window is larger than the images.
    """
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(
            f"ssim: expected two arrays [B, H, W, C], got shapes {x.shape}, {y.shape}."
        )
    _check_size(x.shape[1:])
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    mean_x, mean_y = _local_mean(x), _local_mean(y)
    var_x = _local_mean(x * x) - mean_x**2
    var_y = _local_mean(y * y) - mean_y**2
    both = _local_mean(x * y) - mean_x * mean_y
    c_1, c_2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    found = (2 * mean_x * mean_y + c_1) * (2 * both + c_2)
    found /= (mean_x**2 + mean_y**2 + c_1) * (var_x + var_y + c_2)
    return found.mean(axis=(1, 2, 3))


def _check_size(shape) -> None:
    if min(shape[0], shape[1]) < _SIZE:
        raise ValueError(
            f"name: 'ssim' has a window of {_SIZE} x {_SIZE} pixels, and the images "
            f"are {shape[0]} x {shape[1]}; take 'psnr' for them."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ssim:
    """SSIM of each pair, at most 1, which equal images have; equation 1."""

    def check(self, spec: DataSpec) -> None:
        """Raises ValueError unless examples are images of at least 11 x 11 pixels."""
        if len(spec.shape) != 3:
            raise ValueError(
                "name: 'ssim' takes images [H, W, C], and the data have shape "
                f"{spec.shape}."
            )
        _check_size(spec.shape)

    def prepare(self, room) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """Returns `f(x, y) -> [B]` float64 for `[B, H, W, C]` in [-1, 1]."""
        return ssim
