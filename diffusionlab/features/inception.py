"""The Inception network behind FID: 2,048 features, 1,008 logits, 2,023 spatial ones.

It is the ImageNet classifier that was published with TensorFlow on 5 December 2015,
whose weights every report of an FID uses. It departs from the Inception-v3 of the paper
in that average pools leave padding out of the count, and in that the last block has a
maximum instead of an average. Every layer is a convolution without bias, batch
normalisation and ReLU; the normalisation is folded into the convolution,

    kernel = w gamma / sqrt(var + 1e-3),    bias = beta - mean gamma / sqrt(var + 1e-3)

Weights are read by the names of the torch versions (torch-fidelity, pytorch-fid), and
by those of the graph itself, classify_image_graph_def.pb. The first are tested against
torch-fidelity, with random weights. Of the second, the names are those that its
converter looks for, and like it we multiply by gamma; the file itself was not at hand.

Source: Szegedy et al. 2016 (arXiv 1512.00567), table 1, for the network; Heusel et al.
2017 (arXiv 1706.08500) for the features, Nash et al. 2021 (arXiv 2103.03841) for the
spatial ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.features import base, resize, weights
from diffusionlab.types import Array, DataSpec

Params = Mapping[str, Array]

_SIZE = 299
_VERSION = "inception-1"
_ORIGIN = (
    "FID's Inception is published as weights-inception-2015-12-05-6726825d.pth with "
    "torch-fidelity, as pt_inception-2015-12-05-6726825d.pth with pytorch-fid, and as "
    "classify_image_graph_def.pb in TensorFlow's inception-2015-12-05.tgz."
)
_EPSILON = 1e-3
_SPATIAL = 7  # channels of mixed_6/conv that are spatial features

_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1")
_STEM += ("Conv2d_4a_3x3",)
# Branches of each kind of block: the name in the torch versions, and in the graph.
_TOWERS = {
    "A": {
        "branch1x1": "conv",
        "branch5x5_1": "tower/conv",
        "branch5x5_2": "tower/conv_1",
        "branch3x3dbl_1": "tower_1/conv",
        "branch3x3dbl_2": "tower_1/conv_1",
        "branch3x3dbl_3": "tower_1/conv_2",
        "branch_pool": "tower_2/conv",
    },
    "B": {
        "branch3x3": "conv",
        "branch3x3dbl_1": "tower/conv",
        "branch3x3dbl_2": "tower/conv_1",
        "branch3x3dbl_3": "tower/conv_2",
    },
    "C": {
        "branch1x1": "conv",
        "branch7x7_1": "tower/conv",
        "branch7x7_2": "tower/conv_1",
        "branch7x7_3": "tower/conv_2",
        "branch7x7dbl_1": "tower_1/conv",
        "branch7x7dbl_2": "tower_1/conv_1",
        "branch7x7dbl_3": "tower_1/conv_2",
        "branch7x7dbl_4": "tower_1/conv_3",
        "branch7x7dbl_5": "tower_1/conv_4",
        "branch_pool": "tower_2/conv",
    },
    "D": {
        "branch3x3_1": "tower/conv",
        "branch3x3_2": "tower/conv_1",
        "branch7x7x3_1": "tower_1/conv",
        "branch7x7x3_2": "tower_1/conv_1",
        "branch7x7x3_3": "tower_1/conv_2",
        "branch7x7x3_4": "tower_1/conv_3",
    },
    "E": {
        "branch1x1": "conv",
        "branch3x3_1": "tower/conv",
        "branch3x3_2a": "tower/mixed/conv",
        "branch3x3_2b": "tower/mixed/conv_1",
        "branch3x3dbl_1": "tower_1/conv",
        "branch3x3dbl_2": "tower_1/conv_1",
        "branch3x3dbl_3a": "tower_1/mixed/conv",
        "branch3x3dbl_3b": "tower_1/mixed/conv_1",
        "branch_pool": "tower_2/conv",
    },
}
_BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
_KINDS = "AAABCCCCDEE"


def layers() -> dict[str, str]:
    """Returns the name of each convolution in the torch versions -> in the graph."""
    names = {name: f"conv_{i}" if i else "conv" for i, name in enumerate(_STEM)}
    for i, (block, kind) in enumerate(zip(_BLOCKS, _KINDS, strict=True)):
        mixed = f"mixed_{i}" if i else "mixed"
        for branch, tower in _TOWERS[kind].items():
            names[f"Mixed_{block}.{branch}"] = f"{mixed}/{tower}"
    return names


def convert(arrays: weights.Arrays) -> weights.Arrays:
    """Returns `<layer>.kernel` `[h, w, in, out]` and `.bias` `[out]`, and 'fc.kernel'.

    Layers are named as in the torch versions; `arrays` by their names or the graph's.

    Raises:
      KeyError: one is missing.
      ValueError: these are torchvision's weights, for which all names are the same.
    """
    if "fc.weight" in arrays and len(arrays["fc.weight"]) == 1000:
        raise ValueError(
            "it is torchvision's Inception, of 1000 classes instead of 1008"
        )
    read = _from_graph if "conv/conv2d_params" in arrays else _from_torch
    params = {}
    for name, graph_name in layers().items():
        kernel, gamma, beta, mean, variance = (
            np.asarray(a, np.float64) for a in read(arrays, name, graph_name)
        )
        scale = gamma / np.sqrt(variance + _EPSILON)
        params[f"{name}.kernel"] = np.float32(kernel * scale)
        params[f"{name}.bias"] = np.float32(beta - mean * scale)
    if read is _from_graph:
        params["fc.kernel"] = np.float32(arrays["softmax/weights"])
    else:
        params["fc.kernel"] = np.float32(arrays["fc.weight"].T)
    return params


def _from_torch(arrays: weights.Arrays, name: str, graph_name: str) -> tuple:
    stats = ("weight", "bias", "running_mean", "running_var")
    kernel = arrays[f"{name}.conv.weight"].transpose(2, 3, 1, 0)
    return kernel, *(arrays[f"{name}.bn.{stat}"] for stat in stats)


def _from_graph(arrays: weights.Arrays, name: str, graph_name: str) -> tuple:
    stats = ("gamma", "beta", "moving_mean", "moving_variance")
    kernel = arrays[f"{graph_name}/conv2d_params"]
    return kernel, *(arrays[f"{graph_name}/batchnorm/{stat}"] for stat in stats)


def apply(params: Params, x: Array) -> dict[str, Array]:
    """Returns the outputs for images `[B, 299, 299, 3]` of about [-1, 1].

    'features' `[B, 2048]`: the last activations, averaged over positions. 'logits'
    `[B, 1008]`: without their bias, as the reported Inception scores are. 'spatial'
    `[B, 2023]`: 17 x 17 positions of 7 channels of block 6d, row by row.
    """
    conv = functools.partial(_conv, params)
    x = conv("Conv2d_1a_3x3", x, stride=2)
    x = conv("Conv2d_2a_3x3", x, padding="VALID")
    x = _max_pool(conv("Conv2d_2b_3x3", x), stride=2)
    x = conv("Conv2d_3b_1x1", x)
    x = _max_pool(conv("Conv2d_4a_3x3", x, padding="VALID"), stride=2)
    for block, kind in zip(_BLOCKS, _KINDS, strict=True):
        prefix = f"Mixed_{block}."
        inside = {k: v for k, v in params.items() if k.startswith(prefix)}
        inside = {k.removeprefix(prefix): v for k, v in inside.items()}
        branches = _FUNCTIONS[kind](inside, x, maximum=block == "7c")
        if block == "6d":
            spatial = branches[0][..., :_SPATIAL]
        x = jnp.concatenate(branches, axis=-1)
    features = x.mean(axis=(1, 2))
    logits = jnp.matmul(features, params["fc.kernel"], precision=_EXACT)
    spatial = spatial.reshape(len(spatial), -1)
    return {"features": features, "logits": logits, "spatial": spatial}


# The same features on every machine: an accelerator may round products otherwise.
_EXACT = jax.lax.Precision.HIGHEST


def _linear(kernel: Array, x: Array, stride: int, padding: str) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_EXACT,
    )


def _conv(
    params: Params, name: str, x: Array, stride: int = 1, padding: str = "SAME"
) -> Array:
    """A layer; with stride 2 there is no padding."""
    padding = "VALID" if stride == 2 else padding
    out = _linear(params[f"{name}.kernel"], x, stride, padding)
    return jax.nn.relu(out + params[f"{name}.bias"])


def _chain(params: Params, x: Array, *names: str, last_stride: int = 1) -> Array:
    """Layers one after the other."""
    for name in names[:-1]:
        x = _conv(params, name, x)
    return _conv(params, names[-1], x, stride=last_stride)


def _fan(params: Params, x: Array, *names: str) -> list[Array]:
    """1 x 1 layers of one input, as one product.

    A 'branch_pool' among them averages its input first; since both are linear, it is
    the smaller product that is averaged.
    """
    kernels = [params[f"{name}.kernel"] for name in names]
    product = _linear(jnp.concatenate(kernels, axis=-1), x, 1, "VALID")
    ends = np.cumsum([kernel.shape[-1] for kernel in kernels])
    parts = jnp.split(product, ends[:-1], axis=-1)
    return [
        jax.nn.relu(
            (_average_pool(part) if name == "branch_pool" else part)
            + params[f"{name}.bias"]
        )
        for name, part in zip(names, parts, strict=True)
    ]


def _max_pool(x: Array, stride: int) -> Array:
    """The maximum of 3 x 3; with stride 2 there is no padding."""
    padding = "VALID" if stride == 2 else "SAME"
    window, strides = (1, 3, 3, 1), (1, stride, stride, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)


def _average_pool(x: Array) -> Array:
    """The mean of those of 3 x 3 that are inside."""
    window, strides = (1, 3, 3, 1), (1, 1, 1, 1)
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, strides, "SAME")
    rows, columns = (np.r_[2, np.full(n - 2, 3), 2] for n in x.shape[1:3])
    count = np.outer(rows, columns).astype(np.float32)
    return total / count[..., None]


def _block_a(params: Params, x: Array, maximum: bool) -> list[Array]:
    names = ("branch1x1", "branch5x5_1", "branch3x3dbl_1", "branch_pool")
    one, five, three, pool = _fan(params, x, *names)
    five = _chain(params, five, "branch5x5_2")
    three = _chain(params, three, "branch3x3dbl_2", "branch3x3dbl_3")
    return [one, five, three, pool]


def _block_b(params: Params, x: Array, maximum: bool) -> list[Array]:
    single = _conv(params, "branch3x3", x, stride=2)
    names = ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
    double = _chain(params, x, *names, last_stride=2)
    return [single, double, _max_pool(x, stride=2)]


def _block_c(params: Params, x: Array, maximum: bool) -> list[Array]:
    names = ("branch1x1", "branch7x7_1", "branch7x7dbl_1", "branch_pool")
    one, single, double, pool = _fan(params, x, *names)
    single = _chain(params, single, "branch7x7_2", "branch7x7_3")
    double = _chain(params, double, *(f"branch7x7dbl_{i}" for i in (2, 3, 4, 5)))
    return [one, single, double, pool]


def _block_d(params: Params, x: Array, maximum: bool) -> list[Array]:
    three, seven = _fan(params, x, "branch3x3_1", "branch7x7x3_1")
    three = _chain(params, three, "branch3x3_2", last_stride=2)
    names = (f"branch7x7x3_{i}" for i in (2, 3, 4))
    seven = _chain(params, seven, *names, last_stride=2)
    return [three, seven, _max_pool(x, stride=2)]


def _block_e(params: Params, x: Array, maximum: bool) -> list[Array]:
    names = ("branch1x1", "branch3x3_1", "branch3x3dbl_1")
    if maximum:
        one, single, double = _fan(params, x, *names)
        pool = _conv(params, "branch_pool", _max_pool(x, stride=1))
    else:
        one, single, double, pool = _fan(params, x, *names, "branch_pool")
    double = _chain(params, double, "branch3x3dbl_2")
    single = [_conv(params, f"branch3x3_2{i}", single) for i in "ab"]
    double = [_conv(params, f"branch3x3dbl_3{i}", double) for i in "ab"]
    return [one, *single, *double, pool]


_FUNCTIONS = {
    "A": _block_a,
    "B": _block_b,
    "C": _block_c,
    "D": _block_d,
    "E": _block_e,
}


def one_by_one(function: Callable[[Params, Array], Any]) -> Callable:
    """Returns the same function of a batch, which takes one image after another."""

    def run(params: Params, x: Array):
        found = jax.lax.map(lambda image: function(params, image[None]), x)
        return jax.tree.map(lambda rows: rows[:, 0], found)

    return run


def _suited(function: Callable[[Params, Array], Any]) -> Callable:
    """On a CPU by itself one image at a time is half again as fast, and needs less.

    The activations of one stay in its caches. Several devices share a batch instead.
    """

    def run(params: Params, x: Array):
        alone = jax.default_backend() == "cpu" and jax.device_count() == 1
        return (one_by_one(function) if alone else function)(params, x)

    return run


@_suited
def _legacy_tf(params: Params, x: Array) -> dict[str, Array]:
    return apply(params, (resize.tf1_bilinear(x, _SIZE, _SIZE) - 128) / 128)


@_suited
def _clean(params: Params, x: Array) -> dict[str, Array]:
    return apply(params, (x - 128) / 128)


@_suited
def _legacy_pytorch(params: Params, x: Array) -> dict[str, Array]:
    # pytorch-fid, and clean-fid in this mode, scale to [-1, 1] exactly.
    return apply(params, resize.half_pixel_bilinear(x, _SIZE, _SIZE) / 127.5 - 1)


# From uint8 (clean: float32) RGB in [0, 255] to the outputs, by the word of `resize`.
APPLY: dict[str, Callable[[Params, Array], dict[str, Array]]] = {
    "legacy_tf": _legacy_tf,
    "clean": _clean,
    "legacy_pytorch": _legacy_pytorch,
}


def _prepare(x: np.ndarray) -> np.ndarray:
    """Returns uint8 RGB at the size the images have."""
    return np.ascontiguousarray(base.to_rgb(base.to_uint8(x)))


def _prepare_clean(x: np.ndarray) -> np.ndarray:
    """Returns float32 RGB in [0, 255], already resized."""
    small = resize.pil_bicubic(base.to_uint8(x), _SIZE, _SIZE)
    return np.ascontiguousarray(base.to_rgb(small))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inception:
    """Inception features of grey or RGB images of any size.

    Attributes:
      path: the file of weights.
      resize: to 299 x 299. 'legacy_tf' as TensorFlow 1 did, in most reports (ADM, EDM,
        torch-fidelity); 'clean' as clean-fid does, with Pillow's bicubic kernel;
        'legacy_pytorch' as pytorch-fid does. Numbers of two of them do not compare.
    """

    path: str = ""
    resize: str = "legacy_tf"

    outputs = ("features", "logits", "spatial")

    def __post_init__(self):
        if self.resize not in APPLY:
            raise ValueError(
                f"resize: must be one of {', '.join(APPLY)}, got '{self.resize}'."
            )

    def check(self, spec: DataSpec) -> None:
        base.check_images(spec, "inception")
        weights.check_file(self.path, "path", _ORIGIN)

    def load(self, room: base.Room) -> base.Network:
        params, digest = weights.converted(
            self.path, "path", convert, _VERSION, room.cache, _ORIGIN
        )
        about = {
            "network": "inception-v3-fid",
            "weights": digest,
            "resize": self.resize,
            "quantization": "round((x+1)*127.5) to uint8",
        }
        prepare = _prepare_clean if self.resize == "clean" else _prepare
        return base.Network(params, APPLY[self.resize], prepare, about)
