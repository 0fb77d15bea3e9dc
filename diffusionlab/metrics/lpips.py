"""LPIPS, version 0.1: how far apart two images look.

With f_l the activation of layer l of the trunk, u = f / (|f| + 1e-10) its direction at
each pixel, and w_l >= 0 one learned number per channel,

    d(x, y) = sum_l mean_pixels sum_c w_lc (u_l(x) - u_l(y))_c²                     (1)

Images in [-1, 1] are shifted and scaled to the statistics of ImageNet first; version
0.0 did not do that, and its numbers are others.

Source: Zhang et al. 2018, arXiv:1801.03924, equation 1; the constants are those of the
`lpips` package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.features import base, perceptual, weights
from diffusionlab.types import DataSpec

SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
EPSILON = 1e-10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lpips:
    """Learned perceptual distance of pairs of images; 0 for equal ones.

    Attributes:
      trunk: file of the trunk, as torchvision publishes it.
      linear: file of the weights per channel: weights/v0.1/<net>.pth of the `lpips`
        package.
      net: 'alex', which the authors recommend for measuring, or 'vgg'.
    """

    trunk: str = ""
    linear: str = ""
    net: str = "alex"

    def __post_init__(self):
        if self.net not in perceptual.TRUNKS:
            known = " or ".join(f"'{name}'" for name in perceptual.TRUNKS)
            raise ValueError(f"net: must be {known}, got '{self.net}'.")

    def check(self, spec: DataSpec) -> None:
        """Raises ValueError or FileNotFoundError where it cannot work."""
        if len(spec.shape) != 3 or spec.shape[-1] not in (1, 3):
            raise ValueError(
                f"name: the paired metric 'lpips' takes images [H, W, 1 or 3], and the "
                f"data have shape {spec.shape}."
            )
        least = perceptual.smallest(self.net)
        if min(spec.shape[:2]) < least:
            raise ValueError(
                f"net: '{self.net}' takes images of at least {least}x{least}, and the "
                f"data have shape {spec.shape}."
            )
        weights.check_file(self.trunk, "trunk", perceptual.ORIGINS[self.net])
        weights.check_file(self.linear, "linear", self._linear_origin())

    def prepare(self, room: base.Room) -> Callable[..., np.ndarray]:
        """Returns `f(x, y) -> [B] float64`; both are float32 `[B, H, W, C]` in [-1, 1].

        Images of one channel are taken as grey.
        """
        trunk, _ = weights.read(self.trunk, "trunk", perceptual.ORIGINS[self.net])
        linear, _ = weights.read(self.linear, "linear", self._linear_origin())
        params = jax.device_put(convert(trunk, linear, self.net))
        compiled = jax.jit(distance, static_argnums=1)

        def function(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            pair = (base.to_rgb(np.asarray(z, np.float32)) for z in (x, y))
            return np.asarray(compiled(params, self.net, *pair), np.float64)

        return function

    def _linear_origin(self) -> str:
        return f"It is weights/v0.1/{self.net}.pth in the lpips package."


def convert(
    trunk: Mapping[str, np.ndarray], linear: Mapping[str, np.ndarray], net: str
) -> dict[str, np.ndarray]:
    """Returns the parameters of `distance` from the arrays of both files.

    Raises:
      ValueError: an array is missing, negative or of another trunk.
    """
    params = perceptual.convert(trunk, net, "trunk")
    taps = [c.name for c in perceptual.TRUNKS[net] if c.tap]
    for index, tap in enumerate(taps):
        name = f"lin{index}.model.1.weight"
        if name not in linear:
            raise ValueError(f"linear: not a file of LPIPS 0.1: '{name}' is missing.")
        row = np.asarray(linear[name], np.float32).ravel()
        channels = len(params[f"{tap}bias"])
        if len(row) != channels:
            raise ValueError(
                f"linear: '{name}' has {len(row)} channels, and layer {index} of the "
                f"trunk '{net}' has {channels}; is it of another trunk?"
            )
        if row.min() < 0:
            raise ValueError(f"linear: '{name}' has a negative weight.")
        params[f"linear.{index}"] = row
    return params


def distance(
    params: Mapping[str, jax.Array], net: str, x: jax.Array, y: jax.Array
) -> jax.Array:
    """Returns equation 1, `[B]`; x and y are `[B, H, W, 3]` in [-1, 1]."""
    both = (jnp.concatenate([x, y]) - SHIFT) / SCALE
    # Left to itself an accelerator multiplies float32 with fewer bits.
    with jax.default_matmul_precision("float32"):
        total = 0.0
        for index, f in enumerate(perceptual.activations(params, net, both)):
            norm = jnp.sqrt(jnp.sum(jnp.square(f), axis=-1, keepdims=True))
            of_x, of_y = jnp.split(f / (norm + EPSILON), 2)
            square = jnp.square(of_x - of_y) @ params[f"linear.{index}"]
            total += jnp.mean(square, axis=(1, 2))
    return total
