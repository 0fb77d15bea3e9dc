"""A residual multi-layer perceptron for vectors `[B, D]`."""

from flax import linen as nn

from diffusionlab.models import layers
from diffusionlab.types import Array, Cond, DataSpec


class MLP(nn.Module):
    """Residual blocks of two dense layers, modulated by noise level and class.

    Attributes:
      width: of the hidden layers.
      num_layers: number of residual blocks.
      conditions: names of further numbers it is told; see `layers.Embedding`.
    """

    spec: DataSpec
    dtype: str
    width: int = 128
    num_layers: int = 3
    conditions: tuple[str, ...] = ()

    PARAM_AXES = (
        (r"up/kernel$", ("embed", "mlp")),
        (r"down/kernel$", ("mlp", "embed")),
    )

    @nn.compact
    def __call__(self, z: Array, cond: Cond, *, train: bool) -> Array:
        emb = layers.Embedding(
            self.spec, self.width, self.dtype, self.conditions, name="embedding"
        )(cond)
        zeros = nn.initializers.zeros
        h = nn.Dense(self.width, dtype=self.dtype, name="in")(z)
        for i in range(self.num_layers):
            branch = nn.LayerNorm(dtype=self.dtype, name=f"norm_{i}")(h)
            branch = nn.Dense(self.width, dtype=self.dtype, name=f"block_{i}_up")(
                branch
            )
            shift = nn.Dense(self.width, dtype=self.dtype, name=f"block_{i}_emb")(emb)
            branch = nn.Dense(
                self.width,
                kernel_init=zeros,
                dtype=self.dtype,
                name=f"block_{i}_down",
            )(nn.gelu(branch + shift))
            h = layers.shard(h + branch, "batch", "embed")
        h = nn.LayerNorm(dtype=self.dtype, name="norm")(h)
        self.sow("intermediates", "features", h)
        return nn.Dense(
            z.shape[-1], kernel_init=zeros, dtype=self.dtype, name="raw_out"
        )(h)
