"""I3D, the inflated Inception-v1 that classifies Kinetics-400: the features of FVD.

Frames of a uint8 video are resized to 224 by 224 bilinearly (half-pixel centres, no
antialiasing) and scaled to [-1, 1]; features are the 400 logits, averaged over time.
Every convolution is followed by batch norm and ReLU, and padded like every pool as
TensorFlow's SAME: ceil(n / stride) outputs, of the padding the smaller half in front.

    7x7x7/2 64, pool 1x3x3/2, 1x1x1 64, 3x3x3 192, pool 1x3x3/2, Mixed 3b 3c,
    pool 3x3x3/2, Mixed 4b 4c 4d 4e 4f, pool 2x2x2/2, Mixed 5b 5c,
    mean over 2x7x7 at stride 1, 1x1x1 400, mean over time

A Mixed block concatenates 1x1x1; 1x1x1 - 3x3x3; 1x1x1 - 3x3x3; pool 3x3x3/1 - 1x1x1.

The file says all sizes but one, the epsilon of its batch norms, and two conventions
share one set of names: 1e-5 in the ports that FVD is usually computed with (cd-fvd
0.1.1), 1e-3 in the port of piergiaj and in TensorFlow's graph.

Source: Carreira and Zisserman 2017, arXiv:1705.07750, figure 3; Unterthiner et al.
2018, arXiv:1812.01717.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from diffusionlab.features import base, resize, weights
from diffusionlab.types import DataSpec

ORIGIN = (
    "For FVD it is i3d_pretrained_400.pt, which the projects cd-fvd and TATS publish."
)
SIZE = 224
FRAMES = 10

_STEM = ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3")
_MIXED = {3: "bc", 4: "bcdef", 5: "bc"}
_UNITS = ("b0", "b1a", "b1b", "b2a", "b2b", "b3b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class I3D:
    """The Kinetics-400 logits of I3D, for videos of at least 10 frames.

    Attributes:
      path: file of the weights, under the names of the PyTorch ports.
      epsilon: of the batch norms: 1e-5 for cd-fvd's file, 1e-3 for piergiaj's.
    """

    path: str = ""
    epsilon: float = 1e-5

    outputs = ("features",)

    def check(self, spec: DataSpec) -> None:
        base.check_images(spec, "i3d", 4)
        if spec.shape[0] < FRAMES:
            raise ValueError(
                f"name: the extractor 'i3d' takes videos of at least {FRAMES} frames, "
                f"and the data have {spec.shape[0]}."
            )
        if not self.epsilon > 0:
            raise ValueError(f"epsilon: must be positive, got {self.epsilon}.")
        weights.check_file(self.path, "path", ORIGIN)

    def load(self, room: base.Room) -> base.Network:
        arrays, digest = weights.read(self.path, "path", ORIGIN)
        return base.Network(
            params=convert(arrays, self.epsilon),
            apply=apply,
            prepare=lambda x: base.to_rgb(base.to_uint8(x)),
            about={
                "network": "i3d",
                "weights": digest,
                "epsilon": self.epsilon,
                "resize": f"bilinear, half-pixel, not antialiased, to {SIZE}x{SIZE}",
                "quantization": "round((x+1)*127.5) to uint8",
            },
        )


def convert(arrays: Mapping[str, np.ndarray], epsilon: float) -> dict[str, np.ndarray]:
    """Returns the parameters of `logits`: kernels `[T, H, W, in, out]` and biases.

    Batch norms are folded into the convolutions before them, in float64.

    Raises:
      ValueError: an array is missing.
    """

    def take(name: str) -> np.ndarray:
        if name not in arrays:
            raise ValueError(f"path: not a whole file of I3D: '{name}' is missing.")
        return np.asarray(arrays[name], np.float64)

    mixed = [f"Mixed_{i}{j}.{u}" for i in _MIXED for j in _MIXED[i] for u in _UNITS]
    folded = {}
    for unit in (*_STEM, *mixed):
        norm = {k: take(f"{unit}.bn.{k}") for k in ("weight", "bias")}
        mean, variance = (take(f"{unit}.bn.running_{k}") for k in ("mean", "var"))
        scale = norm["weight"] / np.sqrt(variance + epsilon)
        kernel = take(f"{unit}.conv3d.weight").transpose(2, 3, 4, 1, 0)
        folded[f"{unit}.kernel"] = kernel * scale
        folded[f"{unit}.bias"] = norm["bias"] - mean * scale
    kernel = take("logits.conv3d.weight").transpose(2, 3, 4, 1, 0)
    folded["logits.kernel"] = kernel
    folded["logits.bias"] = take("logits.conv3d.bias")
    return {name: array.astype(np.float32) for name, array in folded.items()}


def logits(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """Returns `[B, K]`, averaged over time.

    Arguments:
      params: from `convert`.
      x: `[B, T, H, W, 3]` float32 in [-1, 1]; T at least 9, H and W any: where the
        published network takes the mean over 7 by 7, this takes it over what is there.
    """
    h = _unit(params, "Conv3d_1a_7x7", x, stride=2)
    h = _pool(h, (1, 3, 3), (1, 2, 2))
    h = _unit(params, "Conv3d_2b_1x1", h)
    h = _unit(params, "Conv3d_2c_3x3", h)
    h = _pool(h, (1, 3, 3), (1, 2, 2))
    for stage, letters in _MIXED.items():
        if stage > 3:
            side = 3 if stage == 4 else 2
            h = _pool(h, (side,) * 3, (2, 2, 2))
        for letter in letters:
            h = _mixed(params, f"Mixed_{stage}{letter}", h)
    h = jnp.mean(h, axis=(2, 3))
    # The mean of two neighbours in time, then of all pairs: the ends count half.
    h = jnp.mean((h[:, 1:] + h[:, :-1]) / 2, axis=1)
    return h @ params["logits.kernel"][0, 0, 0] + params["logits.bias"]


def _unit(params, name: str, x: jax.Array, stride: int = 1) -> jax.Array:
    h = lax.conv_general_dilated(
        x,
        params[f"{name}.kernel"],
        window_strides=(stride,) * 3,
        padding="SAME",
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )
    return jax.nn.relu(h + params[f"{name}.bias"])


def _pool(x: jax.Array, window: tuple[int, ...], stride: tuple[int, ...]) -> jax.Array:
    """Maximum pooling; what is pooled is at least 0, so any padding up to 0 will do."""
    window, stride = (1, *window, 1), (1, *stride, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, stride, "SAME")


def _mixed(params, name: str, x: jax.Array) -> jax.Array:
    branch_0 = _unit(params, f"{name}.b0", x)
    branch_1 = _unit(params, f"{name}.b1b", _unit(params, f"{name}.b1a", x))
    branch_2 = _unit(params, f"{name}.b2b", _unit(params, f"{name}.b2a", x))
    branch_3 = _unit(params, f"{name}.b3b", _pool(x, (3, 3, 3), (1, 1, 1)))
    return jnp.concatenate([branch_0, branch_1, branch_2, branch_3], axis=-1)


def apply(params: Mapping[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
    """Returns {'features': `[B, 400]`}; x is `[B, T, H, W, 3]` uint8."""
    # Left to itself an accelerator multiplies float32 with fewer bits.
    with jax.default_matmul_precision("float32"):
        x = resize.half_pixel_bilinear(x, SIZE, SIZE) * (2.0 / 255.0) - 1.0
        return {"features": logits(params, x)}
