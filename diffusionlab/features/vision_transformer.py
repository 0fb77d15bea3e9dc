"""The pre-norm vision transformer that CLIP and DINOv2 share, a pure function.

    h = [class; patches(x) W + b] + positions                                       (1)
    h <- h + a attention(norm(h)),   h <- h + c mlp(norm(h))   in every layer        (2)

a and c, one number per channel, are DINOv2's layer scale; CLIP has none, and CLIP
normalises h once before the first layer. All sizes come from the weights: width, depth
and patch from their shapes, and heads are 64 wide, as in every published tower of both.

Weights are a flat dictionary in the layout of the published files, `[out, in]`, those
of the layers stacked along a first axis, so that one compiled layer serves all.

Source: Dosovitskiy et al. 2021, arXiv:2010.11929, equations 1 to 4; for the layer scale
Touvron et al. 2021, arXiv:2103.17239, equation 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HEAD = 64

Weights = Mapping[str, np.ndarray]


class Names(NamedTuple):
    """What one kind of published file calls the parts of the tower.

    Attributes:
      whole: our name -> theirs, of what there is once.
      layer: what the names of a layer begin with, '{}' is its number.
      linear: our name -> theirs of linear maps and norms within a layer, up to 'weight'
        and 'bias'; several are concatenated along the output.
      scale: our name -> theirs of the layer scale.
    """

    whole: Mapping[str, str]
    layer: str
    linear: Mapping[str, tuple[str, ...]]
    scale: Mapping[str, str] = {}


def convert(
    weights: Weights, dialects: Sequence[Names], field: str, what: str
) -> dict[str, np.ndarray]:
    """Returns the parameters of `tokens` from a published file, in float32.

    Arguments:
      weights: the arrays of the file; others than the tower's are ignored.
      dialects: names it may use; the one whose class token is there decides.
      field: for messages.
      what: for messages: 'the image tower of CLIP'.

    Raises:
      ValueError: no dialect fits, an array is missing, or heads are not 64 wide.
    """
    for names in dialects:
        if names.whole["class"] in weights:
            break
    else:
        known = " nor ".join(f"'{names.whole['class']}'" for names in dialects)
        some = ", ".join(sorted(weights)[:3])
        raise ValueError(
            f"{field}: not a file of {what}: it has neither {known}, but {some}, ..."
        )

    def take(name: str) -> np.ndarray:
        if name not in weights:
            raise ValueError(
                f"{field}: not a whole file of {what}: '{name}' is missing."
            )
        return np.asarray(weights[name], np.float32)

    params = {ours: take(theirs) for ours, theirs in names.whole.items()}
    width = params["patch.weight"].shape[0]
    if width % HEAD:
        raise ValueError(
            f"{field}: the width {width} of {what} is no multiple of {HEAD}, the width "
            f"of a head."
        )
    params["class"] = params["class"].reshape(width)
    params["positions"] = params["positions"].reshape(-1, width)
    norm = f"{names.linear['norm1'][0]}weight"
    depth = 0
    while f"{names.layer.format(depth)}{norm}" in weights:
        depth += 1
    starts = [names.layer.format(i) for i in range(max(depth, 1))]
    for ours, theirs in names.linear.items():
        for kind in ("weight", "bias"):
            rows = [
                np.concatenate([take(f"{s}{t}{kind}") for t in theirs]) for s in starts
            ]
            params[f"layers.{ours}.{kind}"] = np.stack(rows)
    for ours, theirs in names.scale.items():
        params[f"layers.{ours}"] = np.stack([take(f"{s}{theirs}") for s in starts])
    return params


def patch_size(params: Weights) -> int:
    """Returns the side of a patch in pixels."""
    return params["patch.weight"].shape[-1]


def image_size(params: Weights) -> int:
    """Returns the side in pixels of the square images that the positions are for."""
    return round((len(params["positions"]) - 1) ** 0.5) * patch_size(params)


def layer_norm(x: jax.Array, params: Weights, name: str, epsilon: float) -> jax.Array:
    """Returns x `[..., D]` normalised along D, with the scale and shift of `name`."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    normal = (x - mean) * jax.lax.rsqrt(variance + epsilon)
    return normal * params[f"{name}.weight"] + params[f"{name}.bias"]


def tokens(
    params: Weights,
    x: jax.Array,
    *,
    epsilon: float,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Returns what the last layer says, `[B, 1 + N, D]`, the class token first.

    Arguments:
      params: from `convert`.
      x: `[B, S, S, 3]` float32, normalised; S is `image_size(params)`.
      epsilon: of the norms, added to the variance.
      activation: of the hidden layer of the mlp.
    """
    h = _embed(params, x)
    if "before.weight" in params:
        h = layer_norm(h, params, "before", epsilon)
    start = "layers."
    layers = {
        k.removeprefix(start): v for k, v in params.items() if k.startswith(start)
    }

    def layer(h, params):
        a = _attention(layer_norm(h, params, "norm1", epsilon), params)
        h = h + a * params.get("scale1", 1.0)
        c = activation(_linear(layer_norm(h, params, "norm2", epsilon), params, "up"))
        return h + _linear(c, params, "down") * params.get("scale2", 1.0), None

    return jax.lax.scan(layer, h, layers)[0]


def _linear(x: jax.Array, params: Weights, name: str) -> jax.Array:
    return x @ jnp.swapaxes(params[f"{name}.weight"], -1, -2) + params[f"{name}.bias"]


def _embed(params: Weights, x: jax.Array) -> jax.Array:
    """Equation 1. A convolution whose stride is its width is a product of patches."""
    size = patch_size(params)
    batch, height, width, _ = x.shape
    grid = x.reshape(batch, height // size, size, width // size, size, 3)
    h = jnp.einsum("biyjxc,dcyx->bijd", grid, params["patch.weight"])
    h = h.reshape(batch, -1, h.shape[-1]) + params.get("patch.bias", 0.0)
    first = jnp.broadcast_to(params["class"], (batch, 1, h.shape[-1]))
    return jnp.concatenate([first, h], axis=1) + params["positions"]


def _attention(x: jax.Array, params: Weights) -> jax.Array:
    heads = _linear(x, params, "qkv").reshape(*x.shape[:2], 3, -1, HEAD)
    q, k, v = heads[:, :, 0], heads[:, :, 1], heads[:, :, 2]
    y = jax.nn.dot_product_attention(q, k, v)
    return _linear(y.reshape(x.shape), params, "out")
