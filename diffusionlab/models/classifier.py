"""A transformer that classifies noisy images or vectors.

Source: the blocks of Peebles & Xie (2022), arXiv 2212.09748, with one mean over tokens
and one dense layer in the place of their last.
"""

from flax import linen as nn

from diffusionlab.models import layers
from diffusionlab.types import Array, Cond, DataSpec


class Classifier(nn.Module):
    """Tokens -> transformer -> mean -> logits `[B, num_classes]`.

    An image `[B, H, W, C]` gives a token per patch, a vector `[B, D]` is one token. The
    logits start at 0, every class as likely as any other. It sees the noise level, and
    no label.

    Attributes:
      patch_size: side of a patch of an image; vectors take 1.
      width: of a token.
      num_layers, num_heads, mlp_ratio: of the transformer.
      dropout: on the hidden layer of each MLP.

    Raises:
      ValueError: the data have no classes or another shape, or patches do not fit.
    """

    spec: DataSpec
    dtype: str
    patch_size: int = 1
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    mlp_ratio: int = 4
    dropout: float = 0.0

    PARAM_AXES = (
        *layers.ATTENTION_AXES,
        (r"modulation/kernel$", ("embed", "mlp")),
    )

    def __post_init__(self):
        super().__post_init__()
        layers.check_transformer(self)
        shape, size = self.spec.shape, self.patch_size
        if not self.spec.num_classes:
            raise ValueError("name: 'classifier' needs data with classes.")
        if len(shape) not in (1, 3):
            raise ValueError(f"name: 'classifier' takes no data of shape {shape}.")
        sides = shape[:2] if len(shape) == 3 else (1,)
        if size < 1 or any(side % size for side in sides):
            raise ValueError(f"patch_size: {size} does not divide the sides {sides}.")

    @nn.compact
    def __call__(self, z: Array, cond: Cond, *, train: bool) -> Array:
        spec = self.spec._replace(num_classes=0)
        emb = layers.Embedding(spec, self.width, self.dtype, name="embedding")(cond)
        if z.ndim == 4:
            z = layers.patchify(z, self.patch_size)
        h = z.reshape(z.shape[0], -1, z.shape[-1])
        h = nn.Dense(self.width, dtype=self.dtype, name="stem")(h)
        position = self.param(
            "position", nn.initializers.normal(0.02), (h.shape[1], self.width)
        )
        h = layers.shard(h + position.astype(h.dtype), "batch", "length", "embed")
        h = layers.Transformer(
            self.num_layers,
            self.num_heads,
            self.mlp_ratio,
            self.dropout,
            False,
            "",
            self.dtype,
            name="transformer",
        )(h, emb, train=train)
        h = nn.LayerNorm(dtype=self.dtype, name="norm")(h).mean(axis=1)
        self.sow("intermediates", "features", h)
        zeros = nn.initializers.zeros
        return nn.Dense(
            self.spec.num_classes, kernel_init=zeros, dtype=self.dtype, name="head"
        )(h)
