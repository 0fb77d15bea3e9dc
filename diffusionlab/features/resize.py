"""Resizing of images, as the networks that measure them are used to it.

The two bilinear ways look at two neighbours in each direction, whatever the scale, and
differ in where pixel i of `out` reads among `size` pixels:

    tf1:         i size / out                                                       (1)
    half pixel:  max((i + 1/2) size / out - 1/2, 0)                                 (2)

with the upper neighbour clamped to the last pixel. Positions are computed in float32,
as the originals do. Bicubic resizing is Pillow's, whose kernel widens when it shrinks.

Source: TensorFlow 1's ResizeBilinear for (1), torch's interpolate for (2); Parmar,
Zhang and Zhu 2022 (arXiv 2104.11222) for Pillow's on floats, `clean`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.types import Array


def tf1_bilinear(x: Array, height: int, width: int) -> Array:
    """Returns `[..., H, W, C]` as float32 `[..., height, width, C]`; equation 1."""
    return _resized(x, _tf1(x.shape[-3], height), _tf1(x.shape[-2], width))


def half_pixel_bilinear(x: Array, height: int, width: int) -> Array:
    """Returns `[..., H, W, C]` as float32 `[..., height, width, C]`; equation 2."""
    return _resized(
        x, _half_pixel(x.shape[-3], height), _half_pixel(x.shape[-2], width)
    )


def pil_bicubic(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns uint8 `[B, H, W, C]` as float32 in [0, 255], not rounded; on the host.

    Each channel is resized by itself, as a picture of floats.
    """
    from PIL import Image

    out = np.empty((len(x), height, width, x.shape[-1]), np.float32)
    for i, channel in np.ndindex(len(x), x.shape[-1]):
        picture = Image.fromarray(x[i, :, :, channel].astype(np.float32))
        out[i, :, :, channel] = picture.resize(
            (width, height), Image.Resampling.BICUBIC
        )
    return out.clip(0, 255, out=out)


def _tf1(size: int, out: int) -> np.ndarray:
    scale = np.float32(size) / np.float32(out)
    return _matrix(np.arange(out, dtype=np.float32) * scale, size)


def _half_pixel(size: int, out: int) -> np.ndarray:
    scale = np.float32(size) / np.float32(out)
    half = np.float32(0.5)
    position = (np.arange(out, dtype=np.float32) + half) * scale - half
    return _matrix(np.maximum(position, 0), size)


def _matrix(position: np.ndarray, size: int) -> np.ndarray:
    """Returns `[out, size]`: what each pixel takes from its two neighbours."""
    low = np.minimum(position.astype(int), size - 1)
    high = np.minimum(low + 1, size - 1)
    upper = position - low.astype(np.float32)
    rows = np.arange(len(position))
    matrix = np.zeros((len(position), size), np.float32)
    np.add.at(matrix, (rows, low), 1 - upper)
    np.add.at(matrix, (rows, high), upper)
    return matrix


def _resized(x: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    # In full float32 wherever it runs: an accelerator may round products otherwise.
    exact = jax.lax.Precision.HIGHEST
    x = jnp.asarray(x, jnp.float32)
    if rows.shape[0] != rows.shape[1]:
        x = jnp.einsum("hi,...iwc->...hwc", rows, x, precision=exact)
    if columns.shape[0] != columns.shape[1]:
        x = jnp.einsum("wj,...hjc->...hwc", columns, x, precision=exact)
    return x
