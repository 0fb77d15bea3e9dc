"""U-ViT: a small convolutional U-Net around a transformer at the lowest resolution.

Source: Hoogeboom, Heek & Salimans (2023), simple diffusion, arXiv 2301.11093. Dropout
is in the transformer only; its blocks have no long skips among them.
"""

import jax.numpy as jnp
from flax import linen as nn

from diffusionlab.models import layers
from diffusionlab.types import Array, Cond, DataSpec


class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 conv, twice; the embedding modulates the second norm."""

    channels: int
    dtype: str

    @nn.compact
    def __call__(self, h: Array, emb: Array) -> Array:
        def norm(name, features):
            groups = next(g for g in (32, 16, 8, 4, 2, 1) if features % g == 0)
            return nn.GroupNorm(groups, dtype=self.dtype, name=name)

        branch = nn.silu(norm("norm1", h.shape[-1])(h))
        branch = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv1")(branch)
        modulation = nn.Dense(
            2 * self.channels,
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            name="modulation",
        )(emb)
        modulation = layers.shard(modulation, "batch", None)[:, None, None, :]
        scale, shift = jnp.split(modulation, 2, axis=-1)
        branch = norm("norm2", self.channels)(branch) * (1 + scale) + shift
        branch = nn.Conv(
            self.channels,
            (3, 3),
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            name="conv2",
        )(nn.silu(branch))
        if h.shape[-1] != self.channels:
            h = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name="skip")(h)
        return layers.shard(h + branch, "batch", None, None, "embed")


class UViT(nn.Module):
    """Convolutions at `channels` levels, then a transformer, `[B, H, W, C]` in and out.

    Attributes:
      channels: of each convolutional level, highest resolution first.
      num_blocks: residual blocks per level on the way down; one more on the way up, as
        every block going up consumes one concatenated skip.
      patch_size: reduction of the stem; 1 is a plain convolution.
      width, num_layers, num_heads, mlp_ratio, dropout: of the transformer.
      emb_width: of the embedding of noise level and class.
      unroll, remat: as in `DiT`.
      conditions: names of further numbers it is told; see `layers.Embedding`.
    """

    spec: DataSpec
    dtype: str
    channels: tuple[int, ...] = (64,)
    num_blocks: int = 2
    patch_size: int = 1
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    mlp_ratio: int = 4
    dropout: float = 0.1
    emb_width: int = 256
    unroll: bool = False
    remat: str = ""
    conditions: tuple[str, ...] = ()

    PARAM_AXES = (
        *layers.ATTENTION_AXES,
        (r"conv\d/kernel$", ("conv_in", "conv_out")),
        (r"modulation/kernel$", ("embed", "mlp")),
    )

    def __post_init__(self):
        super().__post_init__()
        layers.check_transformer(self)
        layers.check_images("uvit", self.spec)
        reduction = self.patch_size * 2 ** len(self.channels)
        if reduction < 1 or any(side % reduction for side in self.spec.shape[:2]):
            raise ValueError(
                f"channels, patch_size: reduce the image {reduction} times, which does "
                f"not divide its sides {self.spec.shape[:2]}."
            )

    @nn.compact
    def __call__(self, z: Array, cond: Cond, *, train: bool) -> Array:
        emb = layers.Embedding(
            self.spec, self.emb_width, self.dtype, self.conditions, name="embedding"
        )(cond)
        patches = layers.patchify(z, self.patch_size)
        h = self._conv(self.channels[0], 3, "stem")(patches)
        skips = [h]
        for i, channels in enumerate(self.channels):
            for j in range(self.num_blocks):
                h = ResBlock(channels, self.dtype, name=f"down_{i}_{j}")(h, emb)
                skips.append(h)
            below = (*self.channels, self.width)[i + 1]
            h = nn.avg_pool(h, (2, 2), (2, 2))
            h = self._conv(below, 1, f"pool_{i}")(h)
            if i + 1 < len(self.channels):
                skips.append(h)
        h = self._middle(h, emb, train)
        for i, channels in reversed(list(enumerate(self.channels))):
            h = self._conv(channels, 1, f"unpool_{i}")(h)
            h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)
            for j in range(self.num_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = ResBlock(channels, self.dtype, name=f"up_{i}_{j}")(h, emb)
        h = nn.silu(nn.GroupNorm(num_groups=1, dtype=self.dtype, name="norm")(h))
        h = nn.Conv(
            patches.shape[-1],
            (3, 3),
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            name="head",
        )(h)
        return layers.unpatchify(h, self.patch_size)

    def _conv(self, features: int, size: int, name: str) -> nn.Conv:
        return nn.Conv(features, (size, size), dtype=self.dtype, name=name)

    def _middle(self, h: Array, emb: Array, train: bool) -> Array:
        batch, rows, columns, width = h.shape
        position = self.param(
            "position", nn.initializers.normal(0.02), (rows * columns, width)
        )
        h = h.reshape(batch, rows * columns, width) + position.astype(h.dtype)
        h = layers.Transformer(
            self.num_layers,
            self.num_heads,
            self.mlp_ratio,
            self.dropout,
            self.unroll,
            self.remat,
            self.dtype,
            name="transformer",
        )(h, emb, train=train)
        self.sow("intermediates", "features", h.mean(axis=1))
        return h.reshape(batch, rows, columns, width)
