"""The convolutional trunks of LPIPS, up to their last activation.

Both are chains of 3x3 (AlexNet: 11x11/4, 5x5, 3x3) convolutions, ReLU and maximum pools
without padding, and LPIPS looks at five of the activations:

    alex   relu 1 to 5                                  64 192 384 256 256 channels
    vgg    relu 1_2, 2_2, 3_3, 4_3, 5_3                 64 128 256 512 512 channels

Source: Krizhevsky 2014, arXiv:1404.5997 (the AlexNet of torchvision); Simonyan and
Zisserman 2015, arXiv:1409.1556, configuration D; which activations: Zhang et al. 2018,
arXiv:1801.03924.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax import lax

Params = Mapping[str, jax.Array]


class Convolution(NamedTuple):
    """One convolution with bias and ReLU.

    Attributes:
      name: of its arrays in torchvision's files, up to 'weight' and 'bias'.
      stride: of both axes.
      padding: zeros on every side.
      pool: window of the maximum pool, of stride 2, before it; 0 is none.
      tap: whether LPIPS looks at its activation.
    """

    name: str
    stride: int = 1
    padding: int = 1
    pool: int = 0
    tap: bool = True


def _vgg() -> tuple[Convolution, ...]:
    """Returns blocks of 2, 2, 3, 3, 3; a file counts ReLU and pools as layers too."""
    chain, index = [], 0
    for block, depth in enumerate((2, 2, 3, 3, 3)):
        for i in range(depth):
            pool = 2 if block and i == 0 else 0
            name = f"features.{index}."
            chain.append(Convolution(name, pool=pool, tap=i == depth - 1))
            index += 2
        index += 1
    return tuple(chain)


TRUNKS = {
    "alex": (
        Convolution("features.0.", stride=4, padding=2),
        Convolution("features.3.", padding=2, pool=3),
        Convolution("features.6.", pool=3),
        Convolution("features.8."),
        Convolution("features.10."),
    ),
    "vgg": _vgg(),
}
ORIGINS = {
    "alex": "It is torchvision's alexnet-owt-7be5be79.pth.",
    "vgg": "It is torchvision's vgg16-397923af.pth.",
}


def convert(
    arrays: Mapping[str, np.ndarray], net: str, field: str
) -> dict[str, np.ndarray]:
    """Returns the parameters of `activations`: kernels `[H, W, in, out]` and biases.

    Arguments:
      arrays: of torchvision's file; the classifier is ignored.
      net: 'alex' or 'vgg'.
      field: for messages.

    Raises:
      ValueError: an array is missing.
    """
    params = {}
    for convolution in TRUNKS[net]:
        for kind in ("weight", "bias"):
            name = f"{convolution.name}{kind}"
            if name not in arrays:
                raise ValueError(
                    f"{field}: not a file of the trunk '{net}': '{name}' is missing. "
                    f"{ORIGINS[net]}"
                )
            array = np.asarray(arrays[name], np.float32)
            params[name] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    return params


def smallest(net: str) -> int:
    """Returns the least height and width of which every activation has a pixel."""
    size = 1
    for convolution in reversed(TRUNKS[net]):
        # Of the kernels with a stride there is AlexNet's first, of 11; all others keep
        # the size.
        if convolution.stride > 1:
            size = (size - 1) * convolution.stride + 11 - 2 * convolution.padding
        if convolution.pool:
            size = (size - 1) * 2 + convolution.pool
    return size


def activations(params: Params, net: str, x: jax.Array) -> list[jax.Array]:
    """Returns the five activations `[B, h, w, C]`; x is `[B, H, W, 3]`, normalised."""
    taps = []
    for convolution in TRUNKS[net]:
        if convolution.pool:
            window, stride = (1, convolution.pool, convolution.pool, 1), (1, 2, 2, 1)
            x = lax.reduce_window(x, -np.inf, lax.max, window, stride, "VALID")
        x = lax.conv_general_dilated(
            x,
            params[f"{convolution.name}weight"],
            window_strides=(convolution.stride,) * 2,
            padding=((convolution.padding,) * 2,) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.relu(x + params[f"{convolution.name}bias"])
        if convolution.tap:
            taps.append(x)
    return taps
