"""DINOv2's class token: the features of FD-DINOv2.

As in dgm-eval, whose numbers are quoted: a uint8 image is resized to 224 by 224 by
Pillow (bicubic, antialiased, rounded to uint8 again), divided by 255, and gets
ImageNet's mean and deviation. Features are the class token after the last norm.

The positions were learned on a grid of n by n (37) patches and are interpolated to 16
by 16 bicubically (Keys, a = -0.75, no antialiasing, borders repeated): row i of the new
grid lies at

    (i + 1/2) n / (16 + o) - 1/2                                                     (1)

of the old one, where the offset o = 0.1 is in the published program, and with it in the
quoted numbers. Other ports have o = 0, which is another network.

Source: Oquab et al. 2023, arXiv:2304.07193; Stein et al. 2023, arXiv:2306.04675.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.features import base, vision_transformer, weights
from diffusionlab.types import DataSpec

ORIGIN = (
    "For FD-DINOv2 it is dinov2_vitl14_pretrain.pth of the project "
    "facebookresearch/dinov2, or model.safetensors of facebook/dinov2-large, at "
    "Hugging Face."
)
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
EPSILON = 1e-6
SIZE = 224
OFFSET = 0.1

_HUGGING_FACE = vision_transformer.Names(
    whole={
        "class": "embeddings.cls_token",
        "positions": "embeddings.position_embeddings",
        "patch.weight": "embeddings.patch_embeddings.projection.weight",
        "patch.bias": "embeddings.patch_embeddings.projection.bias",
        "after.weight": "layernorm.weight",
        "after.bias": "layernorm.bias",
    },
    layer="encoder.layer.{}.",
    linear={
        "norm1": ("norm1.",),
        "qkv": tuple(f"attention.attention.{x}." for x in ("query", "key", "value")),
        "out": ("attention.output.dense.",),
        "norm2": ("norm2.",),
        "up": ("mlp.fc1.",),
        "down": ("mlp.fc2.",),
    },
    scale={"scale1": "layer_scale1.lambda1", "scale2": "layer_scale2.lambda1"},
)
_ORIGINAL = vision_transformer.Names(
    whole={
        "class": "cls_token",
        "positions": "pos_embed",
        "patch.weight": "patch_embed.proj.weight",
        "patch.bias": "patch_embed.proj.bias",
        "after.weight": "norm.weight",
        "after.bias": "norm.bias",
    },
    layer="blocks.{}.",
    linear={
        "norm1": ("norm1.",),
        "qkv": ("attn.qkv.",),
        "out": ("attn.proj.",),
        "norm2": ("norm2.",),
        "up": ("mlp.fc1.",),
        "down": ("mlp.fc2.",),
    },
    scale={"scale1": "ls1.gamma", "scale2": "ls2.gamma"},
)
_REFUSED = {
    "register_tokens": "register tokens",
    "mlp.w12.weight": "a SwiGLU mlp (ViT-g)",
    "mlp.weights_in.weight": "a SwiGLU mlp (ViT-g)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DinoV2:
    """The class token of DINOv2: ViT-S, B or L, without registers.

    Attributes:
      path: file of the weights, under the names of the authors or Hugging Face.
    """

    path: str = ""

    outputs = ("features",)

    def check(self, spec: DataSpec) -> None:
        base.check_images(spec, "dinov2")
        weights.check_file(self.path, "path", ORIGIN)

    def load(self, room: base.Room) -> base.Network:
        arrays, digest = weights.read(self.path, "path", ORIGIN)
        return base.Network(
            params=convert(arrays),
            apply=apply,
            prepare=prepare,
            about={
                "network": "dinov2",
                "weights": digest,
                "resize": f"Pillow bicubic, uint8, to {SIZE}x{SIZE}",
                "positions": f"bicubic (a = -0.75), offset {OFFSET}",
                "quantization": "round((x+1)*127.5) to uint8",
            },
        )


def convert(
    arrays: vision_transformer.Weights, size: int = SIZE, offset: float = OFFSET
) -> dict[str, np.ndarray]:
    """Returns the parameters of `embed` for images of `size`, from a published file.

    Raises:
      ValueError: they are not those of a DINOv2 that this program knows.
    """
    for end, what in _REFUSED.items():
        if any(name.endswith(end) for name in arrays):
            raise ValueError(
                f"path: this DINOv2 has {what}; ViT-S, B and L without registers work."
            )
    params = vision_transformer.convert(
        arrays, (_HUGGING_FACE, _ORIGINAL), "path", "DINOv2"
    )
    grid = size // vision_transformer.patch_size(params)
    params["positions"] = interpolate(params["positions"], grid, offset)
    return params


def interpolate(positions: np.ndarray, grid: int, offset: float) -> np.ndarray:
    """Returns positions `[1 + n n, D]` at `[1 + grid grid, D]`; equation 1."""
    old = round((len(positions) - 1) ** 0.5)
    if old == grid:
        return positions
    to = _cubic(old, grid, offset)
    square = positions[1:].reshape(old, old, -1).astype(np.float64)
    new = np.einsum("ia,jb,abd->ijd", to, to, square, optimize=True)
    new = new.reshape(grid * grid, -1).astype(np.float32)
    return np.concatenate([positions[:1], new])


def _cubic(old: int, new: int, offset: float) -> np.ndarray:
    """Returns the matrix `[new, old]` of cubic interpolation along one axis.

    Source: Keys 1981, equation 4, with a = -3/4 in place of -1/2.
    """
    a = -0.75
    at = (np.arange(new) + 0.5) * old / (new + offset) - 0.5
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        index = np.floor(at).astype(int) + tap
        d = np.abs(at - index)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * (d**3 - 5 * d**2 + 8 * d - 4)
        weight = np.where(d <= 1, near, far)
        np.add.at(matrix, (np.arange(new), np.clip(index, 0, old - 1)), weight)
    return matrix


def prepare(x: np.ndarray) -> np.ndarray:
    """Returns `[B, 224, 224, 3]` uint8 from `[B, H, W, 1 or 3]` in [-1, 1]."""
    from PIL import Image

    def resized(image):
        image = Image.fromarray(np.ascontiguousarray(image))
        return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))

    return np.stack([resized(image) for image in base.to_rgb(base.to_uint8(x))])


def embed(params: vision_transformer.Weights, x: jax.Array) -> jax.Array:
    """Returns class tokens `[B, D]`; x `[B, S, S, 3]` is normalised."""
    tokens = vision_transformer.tokens(
        params,
        x,
        epsilon=EPSILON,
        activation=functools.partial(jax.nn.gelu, approximate=False),
    )
    return vision_transformer.layer_norm(tokens[:, 0], params, "after", EPSILON)


def apply(params: vision_transformer.Weights, x: jax.Array) -> dict[str, jax.Array]:
    """Returns {'features': `[B, D]`}; x is what `prepare` returned."""
    x = (x.astype(jnp.float32) / 255.0 - MEAN) / DEVIATION
    # Left to itself an accelerator multiplies float32 with fewer bits.
    with jax.default_matmul_precision("float32"):
        return {"features": embed(params, x)}
