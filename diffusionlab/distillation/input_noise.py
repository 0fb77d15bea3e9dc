"""Noise that a student of tokens is given besides z_t, which may have none.

Where everything is masked there is nothing random in z_t. A network with `noise_input`
numbers for each position has them as cond['noise'], `[B, ..., noise_input]`.

Source: Hoogeboom et al. 2026 (arXiv 2603.20155), section 4: gaussian noise for text and
a pyramid for images. Of the pyramid it says no more; the sides here are ours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffusionlab.types import Array

KINDS = ("none", "gaussian", "pyramid")


def input_noise(kind: str, key: Array, shape: tuple[int, ...], channels: int) -> Array:
    """Returns noise `[*shape, channels]` of variance 1, for one example.

    Args:
      kind: 'gaussian', or 'pyramid': the sum, over the root of their number, of
        images of noise of the sides 1, 2, 4, ... as far as the image goes, each
        enlarged to it by repetition.
      key: of the example.
      shape: of it; of a pyramid `[H, W, C]`.
      channels: numbers for each position.
    """
    if kind == "gaussian":
        return jax.random.normal(key, (*shape, channels))
    height, width, *rest = shape
    sides = [2**i for i in range(max(height, width).bit_length())]
    total = jnp.zeros((*shape, channels))
    for level, side in enumerate(sides):
        rows, columns = min(side, height), min(side, width)
        small = jax.random.normal(
            jax.random.fold_in(key, level), (rows, columns, *rest, channels)
        )
        total += small[jnp.arange(height) * rows // height][
            :, jnp.arange(width) * columns // width
        ]
    return total / len(sides) ** 0.5


def batch(kind: str, keys: Array, shape: tuple[int, ...], channels: int) -> Array:
    """Returns `input_noise` `[B, *shape, channels]`, example i from `keys[i]`."""
    return jax.vmap(lambda key: input_noise(kind, key, shape, channels))(keys)


def keys_at(keys: Array, t: Array) -> Array:
    """Returns keys `[B]` that differ by example and by time, a scalar or `[B]`."""
    t_each = jnp.broadcast_to(jnp.asarray(t, jnp.float32), keys.shape)
    bits = jax.lax.bitcast_convert_type(t_each, jnp.uint32)
    return jax.vmap(jax.random.fold_in)(keys, bits)
