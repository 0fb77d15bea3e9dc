"""The DiT of its paper in NumPy, float64, by the names of its published weights.

`loaded` is our network with the same weights.
"""

import math

import jax
import numpy as np

from diffusionlab import import_weights
from diffusionlab.models import network
from diffusionlab.models.imports import peebles_dit as names
from diffusionlab.models.peebles_dit import PeeblesDiT
from diffusionlab.types import DataSpec, path_name

SIZES = dict(patch_size=2, width=32, num_layers=2, num_heads=4, mlp_ratio=4)
SHAPE, CLASSES = (6, 8, 4), 5


def state(seed=0, shape=SHAPE, classes=CLASSES, variance=True, **sizes):
    """Random weights, name -> float32 array, as a checkpoint has them."""
    size = {**SIZES, **sizes}
    p, d, r = size["patch_size"], size["width"], size["mlp_ratio"]
    height, width, channels = shape
    out = p * p * channels * (2 if variance else 1)
    found = {
        "x_embedder.proj": (d, channels, p, p),
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
        "final_layer.linear": (out, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    for i in range(size["num_layers"]):
        found |= {
            f"blocks.{i}.attn.qkv": (3 * d, d),
            f"blocks.{i}.attn.proj": (d, d),
            f"blocks.{i}.mlp.fc1": (r * d, d),
            f"blocks.{i}.mlp.fc2": (d, r * d),
            f"blocks.{i}.adaLN_modulation.1": (6 * d, d),
        }
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, weight in found.items():
        scale = 1 / math.sqrt(math.prod(weight[1:]))
        arrays[f"{name}.weight"] = scale * rng.normal(size=weight)
        arrays[f"{name}.bias"] = 0.2 * rng.normal(size=weight[0])
    if classes:
        table = rng.normal(size=(classes + 1, d))
        arrays["y_embedder.embedding_table.weight"] = table
    arrays["pos_embed"] = position(d, height // p, width // p)[None]
    return {name: np.float32(array) for name, array in arrays.items()}


def position(d, rows, columns):
    """Column by column of the width, straight from the definition."""
    table = np.zeros((rows * columns, d))
    for row in range(rows):
        for column in range(columns):
            for half, place in ((0, column), (1, row)):
                for k in range(d // 4):
                    angle = place / 10_000 ** (k / (d // 4))
                    token = table[row * columns + column, half * d // 2 :]
                    token[k], token[d // 4 + k] = math.sin(angle), math.cos(angle)
    return table


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def forward(arrays, image, step, label, **sizes):
    """Returns eps `[C, H, W]` of one image `[C, H, W]`, at a step of the chain."""
    size = {**SIZES, **sizes}
    p, heads = size["patch_size"], size["num_heads"]
    w = {name: np.float64(array) for name, array in arrays.items()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    channels, height, width = image.shape
    tokens = []
    for i in range(height // p):
        for j in range(width // p):
            patch = image[:, i * p : i * p + p, j * p : j * p + p]
            kernel = w["x_embedder.proj.weight"]
            tokens.append((kernel * patch).sum((1, 2, 3)) + w["x_embedder.proj.bias"])
    h = np.stack(tokens) + w["pos_embed"][0]
    angle = step * np.exp(-math.log(10_000) * np.arange(128) / 128)
    c = np.concatenate([np.cos(angle), np.sin(angle)])
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", c)))
    if "y_embedder.embedding_table.weight" in w:
        c = c + w["y_embedder.embedding_table.weight"][label]
    for i in range(size["num_layers"]):
        name = f"blocks.{i}"
        modulation = linear(f"{name}.adaLN_modulation.1", silu(c))
        shift1, scale1, gate1, shift2, scale2, gate2 = np.split(modulation, 6)
        x = linear(f"{name}.attn.qkv", norm(h) * (1 + scale1) + shift1)
        query, key, value = np.split(x, 3, axis=1)
        mixed = []
        for q, k, v in zip(
            *(np.split(a, heads, axis=1) for a in (query, key, value)), strict=True
        ):
            score = q @ k.T / math.sqrt(q.shape[1])
            share = np.exp(score - score.max(1, keepdims=True))
            mixed.append(share / share.sum(1, keepdims=True) @ v)
        h = h + gate1 * linear(f"{name}.attn.proj", np.concatenate(mixed, axis=1))
        x = gelu(linear(f"{name}.mlp.fc1", norm(h) * (1 + scale2) + shift2))
        h = h + gate2 * linear(f"{name}.mlp.fc2", x)
    shift, scale = np.split(linear("final_layer.adaLN_modulation.1", silu(c)), 2)
    answer = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    out = np.zeros((answer.shape[1] // p**2, height, width))
    for token, row in enumerate(answer):
        i, j = divmod(token, width // p)
        patch = row.reshape(p, p, -1).transpose(2, 0, 1)
        out[:, i * p : i * p + p, j * p : j * p + p] = patch
    return out[:channels]


def loaded(arrays, shape=SHAPE, classes=CLASSES):
    """Returns our network and its parameters out of `arrays`."""
    spec = DataSpec(shape, classes)
    module = PeeblesDiT(spec=spec, dtype="float32", **SIZES)
    net = network.as_network(module, spec)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    wanted = {path_name(path): leaf.shape for path, leaf in leaves}
    entries = names.entries(SIZES, spec, {n: a.shape for n, a in arrays.items()})
    import_weights.check(arrays, entries, "file")
    found = import_weights.convert(arrays, entries, wanted)
    return net, jax.tree_util.tree_map_with_path(
        lambda path, leaf: found[path_name(path)], shapes
    )
