"""The DiT of its paper, to the letter, so that published weights fit it.

It differs from `dit.py` in what weights depend on: the positions are fixed sines, the
noise level is told as a step k = t (num_timesteps - 1) of the chain, queries and keys
are not normalised, everything has a bias, and gates have no 1 added.

    token h_0 = patch W + position
    c = MLP(cos, sin of k) + table[label]
    h <- h + gate1 attention(norm(h) (1 + scale1) + shift1)                         (1)
    h <- h + gate2 mlp(norm(h) (1 + scale2) + shift2)

with the six from silu(c) W + b in each block, in the order shift1, scale1, gate1,
shift2, scale2, gate2.

Source: Peebles and Xie 2022 (arXiv 2212.09748), sections 3.1 and 3.2; details of
numbers, such as the epsilon 1e-6 of the norms, as in its published program.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffusionlab.models import layers
from diffusionlab.types import Array, Cond, DataSpec

FREQUENCIES = 256
"""Numbers that tell the step, half of them cosines."""


def sincos(width: int, place: np.ndarray) -> np.ndarray:
    """Returns sines then cosines of places `[L]`, float64 `[L, width]`."""
    omega = 10_000.0 ** (-np.arange(width // 2) / (width / 2))
    angle = np.multiply.outer(place, omega)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def positions(width: int, rows: int, columns: int) -> np.ndarray:
    """Returns what is added to the tokens, float32 `[rows columns, width]`.

    The first half of the width tells the column, the second the row.
    """
    row, column = (q.ravel() for q in np.indices((rows, columns), np.float64))
    parts = [sincos(width // 2, place) for place in (column, row)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def step_features(step: Array) -> Array:
    """Returns cosines then sines of steps `[B]`, float32 `[B, FREQUENCIES]`."""
    half = FREQUENCIES // 2
    omega = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = step.astype(jnp.float32)[:, None] * omega
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)


class PeeblesDiT(nn.Module):
    """Patches -> tokens -> transformer -> patches, `[B, H, W, C]` in and out.

    The default sizes are those of DiT-XL/2. What the published network says of the
    variance is not computed.

    Attributes:
      patch_size: side of a patch.
      width: of a token; a multiple of 4.
      num_layers, num_heads, mlp_ratio: of the transformer.
      num_timesteps: of the chain that t = 0 ... 1 stands for.
      unroll: unroll the scan over layers.
      remat: name of a policy in `jax.checkpoint_policies`, or '' to keep activations.
      conditions: names of further numbers it is told; what they add starts at zero.

    Raises:
      ValueError: sizes that do not divide.
    """

    spec: DataSpec
    dtype: str
    patch_size: int = 2
    width: int = 1152
    num_layers: int = 28
    num_heads: int = 16
    mlp_ratio: int = 4
    num_timesteps: int = 1000
    unroll: bool = False
    remat: str = ""
    conditions: tuple[str, ...] = ()

    PARAM_AXES = (
        *layers.ATTENTION_AXES,
        (r"modulation/kernel$", ("embed", "mlp")),
    )

    def __post_init__(self):
        super().__post_init__()
        layers.check_transformer(self)
        layers.check_images("peebles_dit", self.spec)
        if self.width % 4:
            raise ValueError(f"width: must be a multiple of 4, got {self.width}.")
        height, width = self.spec.shape[0], self.spec.shape[1]
        if self.patch_size < 1 or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"patch_size: {self.patch_size} does not divide images of "
                f"{height} by {width}."
            )

    @nn.compact
    def __call__(self, z: Array, cond: Cond, *, train: bool) -> Array:
        emb = nn.silu(self._embed(cond))
        patches = layers.patchify(z, self.patch_size)
        batch, rows, columns, features = patches.shape
        h = nn.Dense(self.width, dtype=self.dtype, name="stem")(patches)
        h = h.reshape(batch, rows * columns, self.width)
        h = h + jnp.asarray(positions(self.width, rows, columns), h.dtype)
        h = self._transform(layers.shard(h, "batch", "length", "embed"), emb)
        self.sow("intermediates", "features", h.mean(axis=1))
        shift, scale = _modulation(emb, self.width, 2, self.dtype)
        h = _norm(self.dtype)(h) * (1 + scale) + shift
        zeros = nn.initializers.zeros
        h = nn.Dense(features, kernel_init=zeros, dtype=self.dtype, name="head")(h)
        h = h.reshape(batch, rows, columns, features)
        return layers.unpatchify(h, self.patch_size)

    def _embed(self, cond: Cond) -> Array:
        features = step_features(cond["t"] * (self.num_timesteps - 1))
        small = nn.initializers.normal(0.02)

        def dense(name):
            return nn.Dense(
                self.width, kernel_init=small, dtype=self.dtype, name=f"step_{name}"
            )

        h = dense("out")(nn.silu(dense("in")(features.astype(self.dtype))))
        if self.spec.num_classes:
            table = nn.Embed(
                self.spec.num_classes + 1,
                self.width,
                dtype=self.dtype,
                embedding_init=small,
                name="label",
            )
            label = table(cond["label"])
            if "label_noise" in cond:
                is_null = cond["label"] == self.spec.num_classes
                label = cond["label_noise"](label, is_null)
            h = h + label
        for name in self.conditions:
            told = layers.fourier_features(cond[name], min(self.width, 128))
            h = h + nn.Dense(
                self.width,
                kernel_init=nn.initializers.zeros,
                dtype=self.dtype,
                name=f"condition_{name}",
            )(told.astype(self.dtype))
        return h

    def _transform(self, h: Array, emb: Array) -> Array:
        body = _Block
        if self.remat:
            policy = getattr(jax.checkpoint_policies, self.remat)
            body = nn.remat(body, policy=policy, prevent_cse=False)
        block = body(self.num_heads, self.mlp_ratio, self.dtype, name="block")
        scan = nn.scan(
            lambda block, h, emb: (block(h, emb), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.num_layers,
            unroll=self.num_layers if self.unroll else 1,
        )
        return scan(block, h, emb)[0]


class _Block(nn.Module):
    """Equation 1; a new one is the identity, for the gates start at zero."""

    num_heads: int
    mlp_ratio: int
    dtype: str

    @nn.compact
    def __call__(self, h: Array, emb: Array) -> Array:
        width = h.shape[-1]
        shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(
            emb, width, 6, self.dtype
        )
        branch = _norm(self.dtype)(h) * (1 + scale1) + shift1
        h = h + gate1 * _Attention(self.num_heads, self.dtype, name="attention")(branch)
        branch = _norm(self.dtype)(h) * (1 + scale2) + shift2
        mlp = _Mlp(self.mlp_ratio * width, self.dtype, name="mlp")
        return layers.shard(h + gate2 * mlp(branch), "batch", "length", "embed")


class _Attention(nn.Module):
    """Self-attention over `[B, L, D]`, every projection with a bias."""

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, h: Array) -> Array:
        width = h.shape[-1]
        heads = (self.num_heads, width // self.num_heads)

        def project(name):
            projected = nn.DenseGeneral(heads, dtype=self.dtype, name=name)(h)
            return layers.shard(projected, "batch", None, "heads", None)

        attended = jax.nn.dot_product_attention(
            project("query"), project("key"), project("value")
        )
        return nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="out")(
            attended
        )


class _Mlp(nn.Module):
    """Two dense layers with the GELU of the hyperbolic tangent."""

    hidden: int
    dtype: str

    @nn.compact
    def __call__(self, h: Array) -> Array:
        width = h.shape[-1]
        h = nn.Dense(self.hidden, dtype=self.dtype, name="up")(h)
        h = nn.gelu(layers.shard(h, "batch", None, "mlp"), approximate=True)
        return nn.Dense(width, dtype=self.dtype, name="down")(h)


def _norm(dtype: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=dtype)


def _modulation(emb: Array, width: int, number: int, dtype: str) -> list[Array]:
    """Returns `number` arrays `[B, 1, width]` of the embedding, zero at the start."""
    dense = nn.Dense(
        number * width,
        kernel_init=nn.initializers.zeros,
        dtype=dtype,
        name="modulation",
    )
    # Whole along the width, as in `layers.TransformerBlock`.
    together = layers.shard(dense(emb), "batch", None)
    return jnp.split(together[:, None, :], number, axis=-1)
