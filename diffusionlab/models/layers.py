"""Blocks that several architectures share.

Initialisers other than flax's default: every residual branch and every modulation ends
in zeros, so that a block starts as the identity and a network starts at output 0, where
the loss of a v-prediction on unit-variance data is already the optimum.
"""

from __future__ import annotations

import math

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec

from diffusionlab.types import Array, Cond, DataSpec

_MESH_AXES = {"batch": ("data", "fsdp"), "heads": ("tensor",), "mlp": ("tensor",)}

ATTENTION_AXES = (
    (r"attention/(query|key|value)/kernel$", ("embed", "heads", None)),
    (r"attention/out/kernel$", ("heads", None, "embed")),
    (r"mlp/up/kernel$", ("embed", "mlp")),
    (r"mlp/down/kernel$", ("mlp", "embed")),
)


def shard(x: Array, *logical: str | None) -> Array:
    """Hints that axis i of `x` lies on the mesh axes of `logical[i]`.

    Outside a mesh, and where an axis does not divide, the hint says nothing: it steers
    the compiler and never changes a number.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    axes = []
    for size, name in zip(x.shape, logical, strict=True):
        wanted = _MESH_AXES.get(name, ())
        count = math.prod(mesh.shape[axis] for axis in wanted)
        axes.append(wanted if wanted and size % count == 0 else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def fourier_features(logsnr: Array, width: int) -> Array:
    """Sines and cosines of logsnr, `[B] -> [B, width]`, float32.

    Periods run from 3 to 300 units of logsnr: smooth over the whole range, and no
    feature turns faster than a network could follow.
    """
    frequencies = 2 * jnp.pi / jnp.geomspace(3.0, 300.0, width // 2)
    angles = logsnr.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def rotary_angles(positions: Array, features: int) -> Array:
    """By how much each pair of features of a head turns, `[L, features / 2]` float32.

    Pair j of n turns by position / 10000^(j / n). Several axes share the pairs out.

    Args:
      positions: `[L, axes]`.
      features: of a head, even and at least two per axis.

    Source: Su et al. 2021 (arXiv 2104.09864), equation 34.
    """
    angles = []
    shares = np.array_split(np.arange(features // 2), positions.shape[1])
    for axis, share in enumerate(shares):
        frequencies = 10_000.0 ** (-np.arange(len(share)) / len(share))
        angles.append(positions[:, axis, None] * frequencies)
    return jnp.concatenate([jnp.asarray(a, jnp.float32) for a in angles], axis=1)


def rotate(x: Array, angles: Array) -> Array:
    """Returns x `[B, L, heads, features]`, its pairs turned by angles `[L, pairs]`.

    The inner product of two turned vectors depends on the difference of their angles.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    turned = [first * cos - second * sin, first * sin + second * cos]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Embedding(nn.Module):
    """Noise level and class as one vector `[B, width]`; class `num_classes` is null.

    `cond['label_noise']`, if there, is a function (embedding `[B, width]` of the label,
    whether it is the null class `[B]`) -> what takes the place of the embedding.

    Attributes:
      conditions: names of further numbers in cond, `[B]` each. What they add starts at
        zero: a network with a new condition is the same as before.
      noise_level: whether the noise level is part of it.
    """

    spec: DataSpec
    width: int
    dtype: str
    conditions: tuple[str, ...] = ()
    noise_level: bool = True

    @nn.compact
    def __call__(self, cond: Cond) -> Array:
        h = jnp.zeros((), self.dtype)
        if self.noise_level:
            h = fourier_features(cond["logsnr"], min(self.width, 128))
            h = nn.Dense(self.width, dtype=self.dtype, name="in")(h.astype(self.dtype))
            h = nn.Dense(self.width, dtype=self.dtype, name="out")(nn.silu(h))
        if self.spec.num_classes:
            table = nn.Embed(
                self.spec.num_classes + 1,
                self.width,
                dtype=self.dtype,
                embedding_init=nn.initializers.normal(0.5),
                name="label",
            )
            label = table(cond["label"])
            if "label_noise" in cond:
                is_null = cond["label"] == self.spec.num_classes
                label = cond["label_noise"](label, is_null)
            h = h + label
        for name in self.conditions:
            features = fourier_features(cond[name], min(self.width, 128))
            h = h + nn.Dense(
                self.width,
                kernel_init=nn.initializers.zeros,
                dtype=self.dtype,
                name=f"condition_{name}",
            )(features.astype(self.dtype))
        return nn.silu(h)


class Attention(nn.Module):
    """Self-attention over `[B, L, D]`; queries and keys are RMS-normalised per head.

    With `angles` of `rotary_angles` they are turned by their positions. `causal` lets a
    position see those before it and itself.
    """

    num_heads: int
    dtype: str
    causal: bool = False

    @nn.compact
    def __call__(self, h: Array, angles: Array | None = None) -> Array:
        width = h.shape[-1]
        heads = (self.num_heads, width // self.num_heads)

        def project(name):
            projected = nn.DenseGeneral(
                heads, use_bias=False, dtype=self.dtype, name=name
            )(h)
            return shard(projected, "batch", None, "heads", None)

        query = nn.RMSNorm(dtype=self.dtype, name="query_norm")(project("query"))
        key = nn.RMSNorm(dtype=self.dtype, name="key_norm")(project("key"))
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        attended = jax.nn.dot_product_attention(
            query, key, project("value"), is_causal=self.causal
        )
        return nn.DenseGeneral(
            width,
            axis=(-2, -1),
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            name="out",
        )(attended)


class Mlp(nn.Module):
    """Two dense layers with GELU; dropout on the hidden layer."""

    ratio: int
    dropout: float
    dtype: str

    @nn.compact
    def __call__(self, h: Array, *, train: bool) -> Array:
        width = h.shape[-1]
        h = nn.Dense(width * self.ratio, dtype=self.dtype, name="up")(h)
        h = nn.gelu(shard(h, "batch", None, "mlp"))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        zeros = nn.initializers.zeros
        return nn.Dense(width, kernel_init=zeros, dtype=self.dtype, name="down")(h)


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, shifted, scaled and gated by the embedding, if any.

    Source: adaLN-Zero of Peebles & Xie (2022), arXiv 2212.09748, section 3.2.
    """

    num_heads: int
    mlp_ratio: int
    dropout: float
    dtype: str
    causal: bool = False

    @nn.compact
    def __call__(
        self, h: Array, emb: Array | None, train: bool, angles: Array | None = None
    ) -> Array:
        parts = (0.0,) * 6
        if emb is not None:
            modulation = nn.Dense(
                6 * h.shape[-1],
                kernel_init=nn.initializers.zeros,
                dtype=self.dtype,
                name="modulation",
            )(emb)
            # Not a matter of speed: where 'fsdp' and 'tensor' both divide the kernels,
            # XLA (jax 0.10) mixes up examples if it chooses how this one lies.
            modulation = shard(modulation, "batch", None)[:, None, :]
            parts = jnp.split(modulation, 6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts

        def norm(name):
            return nn.LayerNorm(
                use_bias=False, use_scale=False, dtype=self.dtype, name=name
            )

        # Gates start at 1 and projections at 0: the block is the identity all the same,
        # and the gradient reaches the projections in the first step.
        branch = norm("norm1")(h) * (1 + scale1) + shift1
        attend = Attention(self.num_heads, self.dtype, self.causal, name="attention")
        h = h + (1 + gate1) * attend(branch, angles)
        branch = norm("norm2")(h) * (1 + scale2) + shift2
        mlp = Mlp(self.mlp_ratio, self.dropout, self.dtype, name="mlp")
        return shard(
            h + (1 + gate2) * mlp(branch, train=train), "batch", "length", "embed"
        )


class Transformer(nn.Module):
    """`num_layers` equal blocks as one scan; parameters are stacked along axis 0.

    `unroll` and `remat` change speed and memory, and no number.
    """

    num_layers: int
    num_heads: int
    mlp_ratio: int
    dropout: float
    unroll: bool
    remat: str
    dtype: str
    causal: bool = False

    @nn.compact
    def __call__(
        self,
        h: Array,
        emb: Array | None,
        *,
        train: bool,
        angles: Array | None = None,
    ) -> Array:
        body = TransformerBlock
        if self.remat:
            body = nn.remat(
                body,
                policy=getattr(jax.checkpoint_policies, self.remat),
                static_argnums=(3,),
                prevent_cse=False,
            )
        block = body(
            self.num_heads,
            self.mlp_ratio,
            self.dropout,
            self.dtype,
            self.causal,
            name="block",
        )
        scan = nn.scan(
            lambda block, h, emb, angles: (block(h, emb, train, angles), None),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.num_layers,
            unroll=self.num_layers if self.unroll else 1,
        )
        return scan(block, h, emb, angles)[0]


def check_transformer(module: nn.Module) -> None:
    """Checks the sizes of a network with a transformer; its fields name them.

    Raises:
      ValueError: the width does not divide into heads, a size is below 1, a share is
        none, or the policy is unknown.
    """
    width, num_heads = module.width, module.num_heads
    if width < 1 or num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads: {num_heads} does not divide the width {width}.")
    for name in ("num_layers", "mlp_ratio"):
        if getattr(module, name) < 1:
            raise ValueError(
                f"{name}: must be at least 1, got {getattr(module, name)}."
            )
    dropout = getattr(module, "dropout", 0.0)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: must be in [0, 1), got {dropout}.")
    remat = getattr(module, "remat", "")
    policies = [n for n in dir(jax.checkpoint_policies) if n.endswith("_saveable")]
    if remat and remat not in policies:
        raise ValueError(
            f"remat: unknown policy '{remat}'; known: {', '.join(policies)}, or '' "
            "for none."
        )


def check_images(name: str, spec: DataSpec) -> None:
    """Raises ValueError where data are no images `[H, W, C]`."""
    if len(spec.shape) != 3 or spec.num_tokens:
        kind = "tokens" if spec.num_tokens else "numbers"
        raise ValueError(
            f"name: '{name}' is for images [H, W, C], and the data are {kind} "
            f"{tuple(spec.shape)}."
        )


def patchify(z: Array, p: int) -> Array:
    """`[B, H, W, C] -> [B, H/p, W/p, p p C]`, space to depth."""
    return einops.rearrange(z, "b (h p) (w q) c -> b h w (p q c)", p=p, q=p)


def unpatchify(h: Array, p: int) -> Array:
    """The inverse of `patchify`."""
    return einops.rearrange(h, "b h w (p q c) -> b (h p) (w q) c", p=p, q=p)
