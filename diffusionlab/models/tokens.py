"""What networks of tokens share: places of tokens, and the projection to logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffusionlab.models import layers
from diffusionlab.types import Array

PARAM_AXES = (
    *layers.ATTENTION_AXES,
    (r"table/embedding$", ("vocab", "embed")),
    (r"head/kernel$", ("embed", "vocab")),
)


def places(shape: tuple[int, ...]) -> np.ndarray:
    """Returns where each token is, `[L, axes]` int; axes of size 1 are left out."""
    long = [size for size in shape if size > 1] or [1]
    return np.indices(long).reshape(len(long), -1).T


def check(name: str, module: nn.Module) -> None:
    """Checks what every network of tokens is built from; its fields name it.

    Raises:
      ValueError: the process is of numbers, or the sizes do not fit.
    """
    if not hasattr(module.process, "num_symbols"):
        raise ValueError(f"name: '{name}' needs the process 'categorical'.")
    layers.check_transformer(module)
    shape = tuple(module.spec.shape)
    axes, features = places(shape).shape[1], module.width // module.num_heads
    if features % 2 or features < 2 * axes:
        raise ValueError(
            f"num_heads: leaves {features} features per head of width {module.width}; "
            f"expected an even number, at least {2 * axes} for data of shape {shape}."
        )
    if module.chunk < 0:
        raise ValueError(f"chunk: must be at least 0, got {module.chunk}.")


class Head(nn.Module):
    """`[B, L, D]` -> logits `[B, L, K]`, or log-probabilities `[B, L]` of a target.

    Both are float32, whatever the compute dtype of the product. It starts at 0: every
    token as likely as any other. A target is scored `chunk` positions at a time, and
    their logits are made again where gradients need them, so that no more than
    `[B, chunk, K]` is ever held; with 0 all positions are scored at once.
    """

    num_tokens: int
    chunk: int
    dtype: str

    @nn.compact
    def __call__(self, h: Array, target: Array | None = None) -> Array:
        zeros = nn.initializers.zeros
        kernel = self.param("kernel", zeros, (h.shape[-1], self.num_tokens))
        bias = self.param("bias", zeros, (self.num_tokens,))

        def logits(h):
            product = jnp.einsum(
                "bld,dk->blk",
                h.astype(self.dtype),
                kernel.astype(self.dtype),
                preferred_element_type=jnp.float32,
            )
            return product + bias

        def score(h, target):
            found = logits(h)
            own = jnp.take_along_axis(found, target[..., None], axis=-1)[..., 0]
            return own - jax.nn.logsumexp(found, axis=-1)

        if target is None:
            return logits(h)
        length = h.shape[1]
        if not 0 < self.chunk < length:
            return score(h, target)
        extra = -length % self.chunk
        pieces = []
        for whole in (h, target):
            rest = ((0, 0),) * (whole.ndim - 2)
            whole = jnp.pad(whole, ((0, 0), (0, extra), *rest))
            split = (whole.shape[0], -1, self.chunk, *whole.shape[2:])
            pieces.append(jnp.moveaxis(whole.reshape(split), 1, 0))
        # A scan already keeps its steps apart, so nothing has to stop their merging.
        body = jax.checkpoint(score, prevent_cse=False)
        scores = jax.lax.map(lambda piece: body(*piece), tuple(pieces))
        return jnp.moveaxis(scores, 0, 1).reshape(h.shape[0], -1)[:, :length]


def target_of(cond, batch: int) -> Array | None:
    """Returns cond['target'] `[B, ...]` as `[B, L]`, if it is there."""
    return cond["target"].reshape(batch, -1) if "target" in cond else None
