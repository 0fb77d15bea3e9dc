"""A transformer over patches of an image.

Source: Peebles & Xie (2022), arXiv 2212.09748, with queries and keys normalised.
"""

from flax import linen as nn

from diffusionlab.models import layers
from diffusionlab.types import Array, Cond, DataSpec


class DiT(nn.Module):
    """Patches -> tokens -> transformer -> patches, `[B, H, W, C]` in and out.

    Attributes:
      patch_size: side of a patch; tokens are (H / patch_size)(W / patch_size).
      width: of a token.
      num_layers, num_heads, mlp_ratio: of the transformer.
      dropout: on the hidden layer of each MLP.
      unroll: unroll the scan over layers.
      remat: name of a policy in `jax.checkpoint_policies`, or '' to keep activations.
      conditions: names of further numbers it is told; see `layers.Embedding`.
    """

    spec: DataSpec
    dtype: str
    patch_size: int = 2
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    mlp_ratio: int = 4
    dropout: float = 0.0
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
        layers.check_images("dit", self.spec)
        height, width = self.spec.shape[0], self.spec.shape[1]
        if self.patch_size < 1 or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"patch_size: {self.patch_size} does not divide images of "
                f"{height} by {width}."
            )

    @nn.compact
    def __call__(self, z: Array, cond: Cond, *, train: bool) -> Array:
        emb = layers.Embedding(
            self.spec, self.width, self.dtype, self.conditions, name="embedding"
        )(cond)
        patches = layers.patchify(z, self.patch_size)
        batch, rows, columns, features = patches.shape
        h = nn.Dense(self.width, dtype=self.dtype, name="stem")(patches)
        h = h.reshape(batch, rows * columns, self.width)
        position = self.param(
            "position", nn.initializers.normal(0.02), (rows * columns, self.width)
        )
        h = layers.shard(h + position.astype(h.dtype), "batch", "length", "embed")
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
        modulation = nn.Dense(
            2 * self.width,
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            name="modulation",
        )(emb)
        modulation = layers.shard(modulation, "batch", None)[:, None, :]
        shift, scale = modulation[..., : self.width], modulation[..., self.width :]
        h = nn.LayerNorm(use_bias=False, use_scale=False, dtype=self.dtype)(h)
        h = nn.Dense(
            features,
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            name="head",
        )(h * (1 + scale) + shift)
        return layers.unpatchify(
            h.reshape(batch, rows, columns, features), self.patch_size
        )
