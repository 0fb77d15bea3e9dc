"""Noise with the covariance of x given z_t, from products with the Jacobian of x_hat.

Let J = d x_hat / d z_t, and Sigma = Cov[x | z_t] = (sigma² / alpha) J. A basis draws

    Sigma^(1/2) xi,   xi ~ N(0, I)                                                  (1)

from a few products J v. The structured ones take J to be diagonal in a frame W with
W' W = I (`samplers/frames.py`), and need a single product to estimate its diagonal q:

    Sigma^(1/2) xi ~ W' (sqrt((sigma² / alpha) q) xi_W),   xi_W ~ N(0, I)           (2)

`Lanczos` and `Oracle` assume no structure, need more products, and are what the others
are measured against.

Source: (1) and (2) are derived in `samplers/covariance.py`; see there for what is
published. Jozefiak et al. 2026 (arXiv 2605.22723) for Lanczos.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.samplers import base, frames
from diffusionlab.types import Array, Prediction

_MAX_ORACLE = 64
# Of a product, the share that float32 may leave where nothing is left in exact numbers.
_EXHAUSTED = 1e-5


class Tangent(NamedTuple):
    """x_hat and its derivative at one z_t.

    Attributes:
      product: v -> (prediction, J v), both from one pass.
      linearise: () -> (prediction, v -> J v), for several products.
    """

    product: Callable[[Array], tuple[Prediction, Array]]
    linearise: Callable[[], tuple[Prediction, Callable[[Array], Array]]]


class Basis(Protocol):
    """How (1) is drawn.

    Attributes:
      num_products: products J v of one draw.
    """

    num_products: int

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError where one example of this shape does not suit."""
        ...

    def draw(
        self,
        tangent: Tangent,
        keys: Array,
        shape: tuple[int, ...],
        variances: Callable[[Array], Array],
    ) -> tuple[Prediction, Array]:
        """Returns the prediction, and (1) `[B, *shape]`, example i from `keys[i]`.

        `variances` turns eigenvalues of J into those of Sigma.
        """
        ...


def signs(keys: Array, shape: tuple[int, ...]) -> Array:
    """Returns float32 -1 or 1 `[B, *shape]`, example i from `keys[i]`."""
    return jax.vmap(lambda key: jax.random.rademacher(key, shape, jnp.float32))(keys)


def draw_structured(
    basis,
    tangent: Tangent,
    keys: Array,
    shape: tuple[int, ...],
    variances: Callable[[Array], Array],
) -> tuple[Prediction, Array]:
    """Equation 2: `Basis.draw` for one that has `frame(shape)`."""
    frame = basis.frame(shape)
    v = frame.inverse(signs(base.fold(keys, 0), frame.size))
    prediction, product = tangent.product(v)
    scale = jnp.sqrt(variances(frames.eigenvalues(frame, v, product)))
    xi = base.normal(base.fold(keys, 1), frame.size)
    return prediction, frame.inverse(scale * xi)


def _check_block(block: int, shape: tuple[int, ...], divides: bool) -> None:
    for axis in frames.spatial_axes(shape):
        size = shape[axis]
        if block > size or (divides and size % block):
            wanted = "divide" if divides else "be at most"
            raise ValueError(
                f"block: must {wanted} each side of an example {shape}, got {block}."
            )


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}: must be at least 1, got {number}.")


def _any_shape(basis, shape: tuple[int, ...]) -> None:
    """`Basis.check` where every shape suits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DctGlobal:
    """The DCT along every axis but the channels, or along the one axis of a vector.

    Cosines diagonalise a stationary symmetric covariance with mirrored borders.

    Attributes:
      smooth: average over rings of equal rounded frequency, the mean of an image apart.
      colours: transform three channels too, to brightness and two opponent colours.
    """

    smooth: bool = False
    colours: bool = True

    num_products = 1
    check, draw = _any_shape, draw_structured

    def frame(self, shape: tuple[int, ...]) -> frames.Frame:
        """Returns W for one example."""
        frame = frames.separable(shape, frames.dct_matrix, self.colours)
        if not self.smooth:
            return frame
        groups = frames.rings(
            frames.frequencies([shape[axis] for axis in frames.spatial_axes(shape)])
        )
        return frame._replace(smooth=functools.partial(frames.average_within, groups))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DctBlock:
    """The DCT of disjoint blocks: a spectrum for every place.

    Attributes:
      block: side of a block; divides every side of the data.
      smooth, colours: as of `DctGlobal`; rings are those of a block.

    Raises:
      ValueError: block is below 1.
    """

    block: int = 4
    smooth: bool = False
    colours: bool = True

    num_products = 1
    draw = draw_structured

    def __post_init__(self):
        _positive(block=self.block)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError where `block` does not divide a side."""
        _check_block(self.block, shape, divides=True)

    def frame(self, shape: tuple[int, ...]) -> frames.Frame:
        """Returns W for one example."""
        dct = frames.dct_matrix(self.block)
        frame = frames.separable(
            shape, lambda size: np.kron(np.eye(size // self.block), dct), self.colours
        )
        if not self.smooth:
            return frame
        sides = [shape[axis] for axis in frames.spatial_axes(shape)]
        frequency = [np.arange(n) % self.block for n in sides]
        place = np.meshgrid(*(np.arange(n) // self.block for n in sides), indexing="ij")
        ring, groups = frames.rings(frequency), 0
        for index, count in zip(place, sides, strict=True):
            groups = groups * count + index
        groups = groups * (ring.max() + 1) + ring
        return frame._replace(smooth=functools.partial(frames.average_within, groups))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DctConv:
    """The DCT of every window, overlapping ones too: a spectrum that varies gently.

    There are block² coefficients per pixel, so W W' is no identity: the estimate of q,
    averaged over `window` neighbouring places for each filter, is exact for J = a I and
    an approximation otherwise.

    Attributes:
      block: side of a filter.
      window: places along an axis over which S averages.
      colours: as of `DctGlobal`.

    Raises:
      ValueError: block or window is below 1.
    """

    block: int = 4
    window: int = 7
    colours: bool = True

    num_products = 1
    draw = draw_structured

    def __post_init__(self):
        _positive(block=self.block, window=self.window)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError where `block` exceeds a side."""
        _check_block(self.block, shape, divides=False)

    def frame(self, shape: tuple[int, ...]) -> frames.Frame:
        """Returns W for one example."""
        frame = frames.separable(
            shape,
            lambda size: frames.windowed_dct_matrix(size, self.block),
            self.colours,
        )
        split, window = [], []
        for axis, size in enumerate(frame.size):
            transformed = axis in frames.spatial_axes(shape)
            split += [size // self.block, self.block] if transformed else [size]
            window += [self.window, 1] if transformed else [1]

        def smooth(q: Array) -> Array:
            places = q.reshape(q.shape[0], *split)
            sums = jax.lax.reduce_window(
                places, 0.0, jax.lax.add, (1, *window), (1,) * places.ndim, "SAME"
            )
            return sums.reshape(q.shape)

        return frame._replace(smooth=smooth)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FftGlobal:
    """The Hartley transform, Re - Im of the FFT: real, orthonormal, its own inverse.

    For periodic data; it diagonalises every stationary symmetric covariance there.
    """

    num_products = 1
    check, draw = _any_shape, draw_structured

    def frame(self, shape: tuple[int, ...]) -> frames.Frame:
        """Returns W for one example."""
        axes = [axis + 1 for axis in frames.spatial_axes(shape)]

        def hartley(x: Array) -> Array:
            spectrum = jnp.fft.fftn(x, axes=axes, norm="ortho")
            return spectrum.real - spectrum.imag

        return frames.Frame(shape, hartley, hartley)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelIsotropic:
    """One variance for all entries of an example, tr(Sigma) / D: white noise.

    v' J v / D is Hutchinson's estimate of that trace.
    """

    num_products = 1
    check, draw = _any_shape, draw_structured

    def frame(self, shape: tuple[int, ...]) -> frames.Frame:
        """Returns W for one example."""
        axes = tuple(range(1, len(shape) + 1))
        return frames.Frame(
            shape,
            forward=lambda x: x,
            inverse=lambda y: y,
            smooth=lambda q: jnp.mean(q, axes, keepdims=True),
        )


def _root_times(vectors: Array, values: Array, xi: Array) -> Array:
    """Returns U diag(sqrt(values)) U' xi for `[B, D, D]`, `[B, D]`, `[B, D]`."""
    along = jnp.einsum("bde,bd->be", vectors, xi, precision="highest")
    along = jnp.sqrt(values) * along
    return jnp.einsum("bde,be->bd", vectors, along, precision="highest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lanczos:
    """Equation 1 in the Krylov space of xi, with any covariance.

    With q_1 = xi / |xi| and Q the orthonormal basis of xi, J xi, ..., J^(m-1) xi:

        Sigma^(1/2) xi ~ |xi| Q f(Q' J Q) e_1,   f = square root of the variance    (3)

    exact once m reaches the number of distinct eigenvalues, to which no further product
    adds anything: its direction is left at zero. Q' J Q is tridiagonal where J is
    symmetric, as it is for a true denoiser; a trained one is symmetrised there.

    Attributes:
      num_products: m.

    Raises:
      ValueError: m is below 1.
    """

    num_products: int = 3

    check = _any_shape

    def __post_init__(self):
        _positive(num_products=self.num_products)

    def draw(
        self,
        tangent: Tangent,
        keys: Array,
        shape: tuple[int, ...],
        variances: Callable[[Array], Array],
    ) -> tuple[Prediction, Array]:
        """Returns the prediction and (3), `[B, *shape]`."""
        prediction, apply = tangent.linearise()
        xi = base.normal(base.fold(keys, 1), shape)
        size, flat = xi.shape[0], xi.reshape(xi.shape[0], -1)
        length = jnp.linalg.norm(flat, axis=1, keepdims=True)
        directions, products = [flat / length], []
        for i in range(self.num_products):
            product = apply(directions[i].reshape(xi.shape)).reshape(size, -1)
            products.append(product)
            scale = jnp.linalg.norm(product, axis=1, keepdims=True)
            # Twice is enough to be orthogonal to rounding.
            for direction in 2 * directions:
                overlap = jnp.sum(direction * product, 1, keepdims=True)
                product -= overlap * direction
            # What is left of an exhausted space is rounding, with no direction.
            norm = jnp.linalg.norm(product, axis=1, keepdims=True)
            direction = product / jnp.maximum(norm, 1e-30)
            directions.append(jnp.where(norm > _EXHAUSTED * scale, direction, 0.0))
        q, jq = (jnp.stack(rows, 2) for rows in (directions[:-1], products))
        projected = jnp.einsum("bdi,bdj->bij", q, jq, precision="highest")
        values, vectors = jnp.linalg.eigh(projected, symmetrize_input=True)
        first = length * jnp.eye(1, self.num_products)
        along = _root_times(vectors, variances(values), first)
        noise = jnp.einsum("bdi,bi->bd", q, along, precision="highest")
        return prediction, noise.reshape(xi.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle:
    """Equation 1 with the whole Jacobian, symmetrised: the reference for tests.

    Attributes:
      num_products: entries of one example, one product each; at most 64.

    Raises:
      ValueError: num_products is not in 1 ... 64.
    """

    num_products: int

    def __post_init__(self):
        _positive(num_products=self.num_products)
        if self.num_products > _MAX_ORACLE:
            raise ValueError(
                f"num_products: at most {_MAX_ORACLE} entries, got {self.num_products}."
            )

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError where an example has another number of entries."""
        if math.prod(shape) != self.num_products:
            raise ValueError(
                f"num_products: must be the {math.prod(shape)} entries of an example "
                f"{shape}, got {self.num_products}."
            )

    def draw(
        self,
        tangent: Tangent,
        keys: Array,
        shape: tuple[int, ...],
        variances: Callable[[Array], Array],
    ) -> tuple[Prediction, Array]:
        """Returns the prediction and (1), `[B, *shape]`."""
        prediction, apply = tangent.linearise()
        xi = base.normal(base.fold(keys, 1), shape)
        size = xi.shape[0]
        units = jnp.eye(self.num_products).reshape(-1, 1, *shape)
        units = jnp.broadcast_to(units, (self.num_products, *xi.shape))
        # In the order [column, example, row].
        columns = jax.vmap(apply)(units).reshape(self.num_products, size, -1)
        jacobian = jnp.moveaxis(columns, 0, 2)
        values, vectors = jnp.linalg.eigh(jacobian, symmetrize_input=True)
        noise = _root_times(vectors, variances(values), xi.reshape(size, -1))
        return prediction, noise.reshape(xi.shape)
