"""Names in the published checkpoints of DiT, and where they go in `PeeblesDiT`.

Of the output channels the second half is the learned variance; it is left out, with
its rows of the last layer. Linear layers of that program have `[out, in]`.

Source: the state dictionary of facebookresearch/DiT, models.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusionlab.models.imports import Entry
from diffusionlab.models.peebles_dit import FREQUENCIES, positions
from diffusionlab.types import DataSpec


def entries(
    block: Mapping[str, Any], spec: DataSpec, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Entry]:
    """Returns name -> where it goes; see `imports`.

    Args:
      block: of the network in the config, with every key.
      spec: of the data, `[H, W, C]`.
      shapes: of the file's arrays, to see whether it has the variance.
    """
    height, width, channels = spec.shape
    size, patch = block["width"], block["patch_size"]
    rows, columns = height // patch, width // patch
    whole = {
        **_linear("t_embedder.mlp.0", "step_in", FREQUENCIES, size),
        **_linear("t_embedder.mlp.2", "step_out", size, size),
        **_linear("final_layer.adaLN_modulation.1", "modulation", size, 2 * size),
        "x_embedder.proj.weight": Entry(
            (size, channels, patch, patch),
            # A convolution [D, C, p, q] of patches [p q C].
            {"stem/kernel": lambda w: w.transpose(2, 3, 1, 0).reshape(-1, size)},
        ),
        "x_embedder.proj.bias": Entry((size,), {"stem/bias": _same}),
        "pos_embed": Entry(
            (1, rows * columns, size),
            equals=positions(size, rows, columns)[None],
            optional=True,
        ),
    }
    if spec.num_classes:
        whole["y_embedder.embedding_table.weight"] = Entry(
            (spec.num_classes + 1, size), {"label/embedding": _same}
        )
    whole |= _head(size, patch, channels, shapes)
    for layer in range(block["num_layers"]):
        whole |= _block(f"blocks.{layer}", layer, size, block)
    return whole


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _linear(name: str, path: str, size: int, out: int, layer=None) -> dict[str, Entry]:
    return {
        f"{name}.weight": Entry((out, size), {f"{path}/kernel": np.transpose}, layer),
        f"{name}.bias": Entry((out,), {f"{path}/bias": _same}, layer),
    }


def _head(size: int, patch: int, channels: int, shapes) -> dict[str, Entry]:
    """The last layer answers `[p, q, 2 C]` per patch, with the variance."""
    plain = patch * patch * channels
    given = shapes.get("final_layer.linear.bias", (2 * plain,))
    out = plain if tuple(given) == (plain,) else 2 * plain

    def eps(array):
        parts = array.reshape(patch * patch, -1, *array.shape[1:])[:, :channels]
        return parts.reshape(plain, *array.shape[1:])

    return {
        "final_layer.linear.weight": Entry(
            (out, size), {"head/kernel": lambda w: eps(w).T}
        ),
        "final_layer.linear.bias": Entry((out,), {"head/bias": eps}),
    }


def _block(name: str, layer: int, size: int, block) -> dict[str, Entry]:
    heads = (block["num_heads"], size // block["num_heads"])
    hidden = block["mlp_ratio"] * size
    parts = {"query": 0, "key": 1, "value": 2}

    def kernel(part):
        return lambda w: w.reshape(3, size, size)[part].T.reshape(size, *heads)

    def bias(part):
        return lambda b: b.reshape(3, *heads)[part]

    attention = "block/attention"
    return {
        f"{name}.attn.qkv.weight": Entry(
            (3 * size, size),
            {f"{attention}/{n}/kernel": kernel(part) for n, part in parts.items()},
            layer,
        ),
        f"{name}.attn.qkv.bias": Entry(
            (3 * size,),
            {f"{attention}/{n}/bias": bias(part) for n, part in parts.items()},
            layer,
        ),
        f"{name}.attn.proj.weight": Entry(
            (size, size),
            {f"{attention}/out/kernel": lambda w: w.T.reshape(*heads, size)},
            layer,
        ),
        f"{name}.attn.proj.bias": Entry(
            (size,), {f"{attention}/out/bias": _same}, layer
        ),
        **_linear(f"{name}.mlp.fc1", "block/mlp/up", size, hidden, layer),
        **_linear(f"{name}.mlp.fc2", "block/mlp/down", hidden, size, layer),
        **_linear(
            f"{name}.adaLN_modulation.1", "block/modulation", size, 6 * size, layer
        ),
    }
