"""Frames W with W' W = I, in which a covariance is nearly diagonal.

Most are separable: one matrix M `[size', size]` per axis, M' M = I. With independent
signs u, a probe v = W' u, and an average S over coefficients that share an eigenvalue,

    J ~ W' diag(q) W,   q = S[(W v) (W J v)] / S[(W v)²]                            (1)

For an orthonormal W the denominator is 1, as W v = u. Where J is diagonal in W, (1) is
then exact for every u: u_k² = 1. Otherwise, S apart, it has the mean (W J W')_kk and
the variance sum_{m != k} (W J W')_km². Signs of pixels have the same mean, but not the
exactness: v is made of signs in the frame.

Source: Bekas, Kokiopoulou and Saad 2007, An estimator for the diagonal of a matrix, for
the ratio in (1); that the signs are those of the frame is ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.types import Array, lift


class Frame(NamedTuple):
    """A W with W' W = I, for examples of one shape.

    Attributes:
      size: shape of the coefficients of one example.
      forward: W, `[B, *shape]` -> `[B, *size]`.
      inverse: W', its transpose.
      smooth: S of equation 1, up to a factor; the result broadcasts to `[B, *size]`.
      power: diagonal of W W', `[*size]` or a number.
    """

    size: tuple[int, ...]
    forward: Callable[[Array], Array]
    inverse: Callable[[Array], Array]
    smooth: Callable[[Array], Array] = lambda q: q
    power: float | np.ndarray = 1.0


def eigenvalues(frame: Frame, v: Array, product: Array) -> Array:
    """Returns q `[B, *size]` of equation 1 for a probe v and J v, both `[B, ...]`."""
    probe = frame.forward(v)
    # A mirrored window has no odd part, ever: 0 / 0 without a neighbour.
    square = jnp.maximum(frame.smooth(probe**2), 1e-30)
    return frame.smooth(probe * frame.forward(product)) / square


def data_variances(frame: Frame, x: np.ndarray) -> tuple:
    """Returns the variance of data along each coefficient, as nested tuples.

    Relative to that of white noise; what the sampler `covariance` takes by this name.

    Args:
      frame: `basis.frame(shape)`.
      x: `[N, *shape]` examples.
    """
    variance = jnp.var(frame.forward(jnp.asarray(x, jnp.float32)), axis=0)
    power = jnp.broadcast_to(jnp.float32(frame.power), frame.size)
    return _tuples(
        np.asarray(frame.smooth(variance[None]) / frame.smooth(power[None]))[0]
    )


def _tuples(nested) -> tuple | float:
    return float(nested) if nested.ndim == 0 else tuple(map(_tuples, nested))


@functools.cache
def dct_matrix(size: int) -> np.ndarray:
    """Returns the orthonormal DCT-II, one row per frequency, float64."""
    frequency, position = np.mgrid[:size, :size]
    rows = np.cos(np.pi * frequency * (2 * position + 1) / (2 * size))
    return rows * np.where(frequency == 0, 1.0, 2**0.5) / size**0.5


@functools.cache
def windowed_dct_matrix(size: int, block: int) -> np.ndarray:
    """Returns the DCT of every window, `[(size + block - 1) block, size]`, float64.

    Windows begin everywhere, and borders are mirrored. The inside is seen `block` times
    and positions near a border more often, so columns are normalised, for M' M = I.
    """
    index = np.pad(np.arange(size), block - 1, mode="symmetric")
    windows = np.lib.stride_tricks.sliding_window_view(index, block)
    rows = np.einsum("kp,wpi->wki", dct_matrix(block), np.eye(size)[windows])
    rows = rows.reshape(-1, size)
    return rows / np.sqrt((rows**2).sum(0))


def spatial_axes(shape: tuple[int, ...]) -> range:
    """Returns the axes of one example along which it is transformed: not channels."""
    return range(max(len(shape) - 1, 1))


def _multiply(x: Array, matrices: Sequence[np.ndarray]) -> Array:
    """Applies one matrix per axis of the examples, the first of them first."""
    # A product costs less than an FFT up to sides of hundreds, and next to nothing
    # beside a network. The default precision of a GPU or TPU is below float32.
    for axis, matrix in enumerate(matrices, start=1):
        matrix = jnp.asarray(matrix, jnp.float32)
        x = jnp.tensordot(x, matrix, axes=(axis, 1), precision="highest")
        x = jnp.moveaxis(x, -1, axis)
    return x


def separable(
    shape: tuple[int, ...], matrix: Callable[[int], np.ndarray], colours: bool
) -> Frame:
    """Returns the frame of one `matrix(size)` per axis, channels apart.

    Args:
      shape: of one example.
      matrix: size -> M `[size', size]` with M' M = I.
      colours: transform three channels too, to brightness and two opponent colours.
    """
    matrices = [matrix(shape[axis]) for axis in spatial_axes(shape)]
    if colours and len(shape) > 1 and shape[-1] == 3:
        matrices.append(dct_matrix(3))
    transposed = [m.T for m in matrices]
    size = tuple(len(m) for m in matrices) + shape[len(matrices) :]
    power = functools.reduce(np.multiply.outer, [(m**2).sum(1) for m in matrices])
    return Frame(
        size,
        forward=lambda x: _multiply(x, matrices),
        inverse=lambda y: _multiply(y, transposed),
        power=power.reshape(power.shape + (1,) * (len(size) - power.ndim)),
    )


def rings(frequencies: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the rounded radius of every frequency, from those along each axis."""
    square = sum(f**2 for f in np.meshgrid(*frequencies, indexing="ij"))
    return np.round(np.sqrt(square)).astype(int)


def average_within(groups: np.ndarray, q: Array) -> Array:
    """Returns q `[B, *groups.shape, ...]`, averaged over coefficients of one group."""
    labels, group = np.unique(groups, return_inverse=True)
    flat = jnp.moveaxis(q.reshape(q.shape[0], groups.size, -1), 1, 0)
    sums = jax.ops.segment_sum(flat, group.ravel(), len(labels))
    means = sums / lift(jnp.asarray(np.bincount(group.ravel()), jnp.float32), 3)
    return jnp.moveaxis(means[group.ravel()], 0, 1).reshape(q.shape)


def frequencies(sides: Sequence[int]) -> list[np.ndarray]:
    """Returns those along each axis, in units of the lowest along the longest one."""
    return [np.arange(n) * (max(sides) / n) for n in sides]
