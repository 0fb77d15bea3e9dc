"""One number for each noise level: the log of the loss to expect there.

    u(logsnr) = w' features(logsnr) + b                                             (1)

with the features of `layers.fourier_features`. The denoising objective trains it
with `learned_weighting`, and `continuous_consistency` always; it is used for nothing
else.

Source: Karras et al. 2024 (arXiv 2312.02696), equations 14 to 16; theirs are random
features with a linear layer as here.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from diffusionlab.models import layers
from diffusionlab.types import Array, Cond, DataSpec


class Uncertainty(nn.Module):
    """Equation 1, `[B]`; it looks at logsnr alone, and starts at 0: no reweighting.

    It is float32 whatever the compute dtype: exp(-u) multiplies a loss.

    Attributes:
      width: number of features.
    """

    spec: DataSpec
    dtype: str
    width: int = 128

    PARAM_AXES = ()

    @nn.compact
    def __call__(self, z: Array, cond: Cond, *, train: bool) -> Array:
        features = layers.fourier_features(cond["logsnr"], self.width)
        zeros = nn.initializers.zeros
        u = nn.Dense(1, kernel_init=zeros, dtype=jnp.float32, name="out")(features)
        return u[:, 0]
