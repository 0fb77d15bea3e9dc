"""The Inception network on random weights, against values of torch-fidelity 0.4.0.

The networks here have an eighth of the channels. Their golden values were computed by
torch-fidelity's FeatureExtractorInceptionV3 with every layer replaced by one of the
same kind and an eighth of the channels, in float64, from the state that `random_state`
returns; for 'clean' the picture was resized by clean-fid 0.1.35, and for
'legacy_pytorch' by torch's interpolate.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlab.features import base, inception
from diffusionlab.features.inception import Inception
from diffusionlab.types import DataSpec

SPEC = DataSpec(shape=(32, 32, 3))
THIN = 8

# Block -> its input channels, and branch -> (input: 0 is that of the block; output;
# height and width of the kernel). From the table of the paper and torch-fidelity.
A = {
    "branch1x1": (0, 64, 1, 1),
    "branch5x5_1": (0, 48, 1, 1),
    "branch5x5_2": (48, 64, 5, 5),
    "branch3x3dbl_1": (0, 64, 1, 1),
    "branch3x3dbl_2": (64, 96, 3, 3),
    "branch3x3dbl_3": (96, 96, 3, 3),
}
B = {
    "branch3x3": (0, 384, 3, 3),
    "branch3x3dbl_1": (0, 64, 1, 1),
    "branch3x3dbl_2": (64, 96, 3, 3),
    "branch3x3dbl_3": (96, 96, 3, 3),
}
D = {
    "branch3x3_1": (0, 192, 1, 1),
    "branch3x3_2": (192, 320, 3, 3),
    "branch7x7x3_1": (0, 192, 1, 1),
    "branch7x7x3_2": (192, 192, 1, 7),
    "branch7x7x3_3": (192, 192, 7, 1),
    "branch7x7x3_4": (192, 192, 3, 3),
}
E = {
    "branch1x1": (0, 320, 1, 1),
    "branch3x3_1": (0, 384, 1, 1),
    "branch3x3_2a": (384, 384, 1, 3),
    "branch3x3_2b": (384, 384, 3, 1),
    "branch3x3dbl_1": (0, 448, 1, 1),
    "branch3x3dbl_2": (448, 384, 3, 3),
    "branch3x3dbl_3a": (384, 384, 1, 3),
    "branch3x3dbl_3b": (384, 384, 3, 1),
    "branch_pool": (0, 192, 1, 1),
}


def c(inner):
    return {
        "branch1x1": (0, 192, 1, 1),
        "branch7x7_1": (0, inner, 1, 1),
        "branch7x7_2": (inner, inner, 1, 7),
        "branch7x7_3": (inner, 192, 7, 1),
        "branch7x7dbl_1": (0, inner, 1, 1),
        "branch7x7dbl_2": (inner, inner, 7, 1),
        "branch7x7dbl_3": (inner, inner, 1, 7),
        "branch7x7dbl_4": (inner, inner, 7, 1),
        "branch7x7dbl_5": (inner, 192, 1, 7),
        "branch_pool": (0, 192, 1, 1),
    }


BLOCKS = {
    "Mixed_5b": (192, A | {"branch_pool": (0, 32, 1, 1)}),
    "Mixed_5c": (256, A | {"branch_pool": (0, 64, 1, 1)}),
    "Mixed_5d": (288, A | {"branch_pool": (0, 64, 1, 1)}),
    "Mixed_6a": (288, B),
    "Mixed_6b": (768, c(128)),
    "Mixed_6c": (768, c(160)),
    "Mixed_6d": (768, c(160)),
    "Mixed_6e": (768, c(192)),
    "Mixed_7a": (768, D),
    "Mixed_7b": (1280, E),
    "Mixed_7c": (2048, E),
}
STEM = {
    "Conv2d_1a_3x3": (3, 32, 3, 3),
    "Conv2d_2a_3x3": (32, 32, 3, 3),
    "Conv2d_2b_3x3": (32, 64, 3, 3),
    "Conv2d_3b_1x1": (64, 80, 1, 1),
    "Conv2d_4a_3x3": (80, 192, 3, 3),
}


def shapes():
    """Yields (layer, input, output, height, width) of the whole network."""
    for name, sizes in STEM.items():
        yield name, *sizes
    for block, (width, branches) in BLOCKS.items():
        for branch, (inputs, *rest) in branches.items():
            yield f"{block}.{branch}", inputs or width, *rest


def random_state(divide=THIN):
    """A state dict of torch-fidelity's names, with `divide` times fewer channels."""
    rng = np.random.default_rng(20151205)
    state = {}
    for name, inputs, outputs, *kernel in shapes():
        inputs = 3 if inputs == 3 else inputs // divide
        outputs //= divide
        scale = np.sqrt(2 / (inputs * kernel[0] * kernel[1]))
        kernel = scale * rng.standard_normal((outputs, inputs, *kernel))
        state[f"{name}.conv.weight"] = kernel
        state[f"{name}.bn.weight"] = rng.uniform(0.5, 1.5, outputs)
        state[f"{name}.bn.bias"] = 0.5 + 0.2 * rng.standard_normal(outputs)
        state[f"{name}.bn.running_mean"] = 0.2 * rng.standard_normal(outputs)
        state[f"{name}.bn.running_var"] = rng.uniform(0.5, 1.5, outputs)
    state["fc.weight"] = 0.1 * rng.standard_normal((1008 // divide, 2048 // divide))
    state["fc.bias"] = rng.standard_normal(1008 // divide)
    return {name: np.float32(array) for name, array in state.items()}


def picture(height=40, width=52):
    """uint8 `[1, height, width, 3]`."""
    rng = np.random.default_rng(7)
    return rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8)
