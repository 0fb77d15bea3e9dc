"""A head on the features of another network: does it see data or samples?

Source: Yin et al. 2024, DMD2 (arXiv 2405.14867), section 4.3, whose head is a few
convolutions on the bottleneck of a U-Net; this one sees the mean over its positions.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from diffusionlab.models import layers
from diffusionlab.types import Array, Cond, DataSpec


class Discriminator(nn.Module):
    """Features `[B, features]`, noise level, class -> logit `[B]`, positive for data.

    It starts at 0, where data and samples are equally likely. It is float32 whatever
    the compute dtype: exp of the logit is a ratio of densities.

    Attributes:
      features: how many numbers the other network has as features: its `width`.
      width: of the hidden layers.
      num_layers: how many.

    Raises:
      ValueError: on the first call, for another number of features; num_layers is
        below 1.
    """

    spec: DataSpec
    dtype: str
    features: int
    width: int = 128
    num_layers: int = 2

    PARAM_AXES = (
        (r"up_\d+/kernel$", ("embed", "mlp")),
        (r"up_\d+/bias$", ("mlp",)),
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("features", "width", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1.")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """What it sees in the place of data."""
        return (self.features,)

    @nn.compact
    def __call__(self, z: Array, cond: Cond, *, train: bool) -> Array:
        if z.shape[1:] != self.input_shape:
            raise ValueError(
                f"config.networks.discriminator.features: is {self.features}, but the "
                f"network it looks into has {z.shape[-1]}; give that number."
            )
        h = nn.LayerNorm(dtype=jnp.float32, name="norm")(z)
        emb = layers.Embedding(self.spec, self.width, "float32", name="embedding")(cond)
        for i in range(self.num_layers):
            told = nn.Dense(self.width, name=f"emb_{i}")(emb)
            h = nn.silu(nn.Dense(self.width, name=f"up_{i}")(h) + told)
        zeros = nn.initializers.zeros
        return nn.Dense(1, kernel_init=zeros, name="out")(h)[:, 0]
