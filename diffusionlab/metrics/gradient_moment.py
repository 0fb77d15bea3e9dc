"""The Gradient Moment: would a language model learn anything from samples, not data?

With G(batch) the gradient of the mean negative log-probability of the batch's tokens
under a reference model, in all its parameters, g the law of samples and q that of data:

    GM = |E_g[G] - E_q[G]|²                                                         (1)

It is estimated without bias from R independent batches of each, all pairs of them:

    D_i = G(samples_i) - G(data_i),   GM ≈ mean over i ≠ j of <D_i, D_j>            (2)

Single pairs, and the mean too where GM is small, may be negative. The standard error of
(2) is that of the jackknife over batches, which errs upwards where GM is zero. The
uncentred norms |E_g[G]|² and |E_q[G]|² are (2) with G in the place of D.

(1) is zero also where the reference is the generator itself, and its scale is that of
the reference's parameters: compare under one reference, which is not the generator, and
with entropy and perplexity beside it.

Source: Hoogeboom et al. 2026 (arXiv 2603.20155). There a single product of two batches
is averaged over draws; (2) has the same mean and, of the same batches, less variance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.types import Array

_COLUMNS = 2**20  # of the gradients at a time, in float64


class Moment(NamedTuple):
    """An estimate of equation 2, and its standard error."""

    value: float
    error: float


def total_and_count(
    log_probs: Callable[[Any, Array], Array], params: Any, tokens: Array, mask: Array
) -> tuple[Array, Array]:
    """Returns the sum of -log p over scored tokens, and how many there are.

    Args:
      log_probs: `log_probs(params, tokens) -> [B, L]`, of each given those before.
      params: of the reference model.
      tokens: `[B, L]` int32.
      mask: `[B, L]`, which tokens are scored; others may have any log-probability.
    """
    found = log_probs(params, tokens).astype(jnp.float32)
    return -jnp.sum(jnp.where(mask, found, 0.0)), jnp.sum(mask, dtype=jnp.float32)


def make_gradient(log_probs: Callable[[Any, Array], Array]) -> Callable:
    """Returns `gradient(params, tokens, mask, rows) -> [P]`, numpy float32: G.

    `tokens` and `mask` are numpy `[B, L]`, taken `rows` at a time; the mean is over the
    scored tokens of the whole batch, however they are divided.
    """

    @jax.jit
    def part(params, tokens, mask):
        def total(params):
            return total_and_count(log_probs, params, tokens, mask)

        slope, count = jax.grad(total, has_aux=True)(params)
        return slope, count

    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)

    def gradient(params, tokens, mask, rows: int) -> np.ndarray:
        found = None
        for start in range(0, len(tokens), rows):
            # The last part is filled with rows that count nothing: one program for all.
            chosen = np.minimum(np.arange(start, start + rows), len(tokens) - 1)
            counts = np.arange(start, start + rows) < len(tokens)
            one = part(params, tokens[chosen], mask[chosen] & counts[:, None])
            found = one if found is None else add(found, one)
        slope, count = jax.device_get(found)
        if not count:
            raise ValueError("mask: no token of a batch is scored.")
        flat = [np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(slope)]
        return np.concatenate(flat) / np.float32(count)

    return gradient


def gram(*blocks: np.ndarray) -> np.ndarray:
    """Returns the inner products `[R, R]` float64 of all rows of blocks `[., P]`."""
    num = sum(map(len, blocks))
    found = np.zeros((num, num))
    for start in range(0, blocks[0].shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        part = np.concatenate([b[:, columns] for b in blocks], dtype=np.float64)
        found += part @ part.T
    return found


def mean_of_pairs(products: np.ndarray) -> Moment:
    """Returns the mean off the diagonal of inner products `[R, R]`: equation 2.

    Raises:
      ValueError: there are fewer than two rows.
    """
    products = np.asarray(products, np.float64)
    num = len(products)
    if num < 2:
        raise ValueError(f"products: need at least 2 batches, got {num}.")
    others = products.sum(1) - np.diagonal(products)
    value = others.sum() / (num * (num - 1))
    if num == 2:
        return Moment(float(value), float("nan"))
    # Without batch i the mean is over (R - 1)(R - 2) ordered pairs.
    without = (others.sum() - 2 * others) / ((num - 1) * (num - 2))
    error = np.sqrt((num - 1) / num * np.sum((without - without.mean()) ** 2))
    return Moment(float(value), float(error))


def gradient_moment(samples: np.ndarray, data: np.ndarray) -> dict[str, Moment]:
    """Returns equation 2 of gradients of batches, and what stands beside it.

    Args:
      samples, data: `[R, P]` float32, G of R independent batches of each, R at least 2.

    Returns:
      'gradient_moment'; 'gradient_norm' and 'gradient_norm_real', the uncentred norms
      of samples and data; with four batches of data, 'gradient_moment_real', (2) of one
      half of them against the other: zero, within its error.

    Raises:
      ValueError: the shapes differ, or there are fewer than two batches.
    """
    if np.shape(samples) != np.shape(data):
        raise ValueError(
            f"data: gradients {np.shape(data)} do not match those of the samples, "
            f"{np.shape(samples)}."
        )
    num = len(samples)
    products = gram(samples, data)
    of_samples, of_data = products[:num, :num], products[num:, num:]
    cross = products[:num, num:]
    found = {
        "gradient_moment": mean_of_pairs(of_samples + of_data - cross - cross.T),
        "gradient_norm": mean_of_pairs(of_samples),
        "gradient_norm_real": mean_of_pairs(of_data),
    }
    if half := num // 2 if num >= 4 else 0:
        signs = np.concatenate([np.eye(half), -np.eye(half)], axis=1)
        halves = signs @ of_data[: 2 * half, : 2 * half] @ signs.T
        found["gradient_moment_real"] = mean_of_pairs(halves)
    return found
