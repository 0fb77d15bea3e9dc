"""The image tower of CLIP: the features of CMMD.

CMMD takes ViT-L/14 at 336 pixels. As there, a uint8 image becomes float32 in [0, 1], is
resized to the size of the tower, bicubic (Keys, a = -0.5) with antialiasing, without
crop, clipping or a second quantisation, and gets CLIP's mean and deviation; features
are the projected image embedding, L2-normalised.

Source: Radford et al. 2021, arXiv:2103.00020; Jayasumana et al. 2024, arXiv:2401.09603,
whose program calls `jax.image.resize(..., 'bicubic')`, as this one does.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab.features import base, vision_transformer, weights
from diffusionlab.types import DataSpec

ORIGIN = (
    "For CMMD it is model.safetensors of openai/clip-vit-large-patch14-336, at Hugging "
    "Face."
)
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
EPSILON = 1e-5

_HUGGING_FACE = vision_transformer.Names(
    whole={
        "class": "vision_model.embeddings.class_embedding",
        "positions": "vision_model.embeddings.position_embedding.weight",
        "patch.weight": "vision_model.embeddings.patch_embedding.weight",
        # The missing 'e' is in the published names.
        "before.weight": "vision_model.pre_layrnorm.weight",
        "before.bias": "vision_model.pre_layrnorm.bias",
        "after.weight": "vision_model.post_layernorm.weight",
        "after.bias": "vision_model.post_layernorm.bias",
        "projection": "visual_projection.weight",
    },
    layer="vision_model.encoder.layers.{}.",
    linear={
        "norm1": ("layer_norm1.",),
        "qkv": ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
        "out": ("self_attn.out_proj.",),
        "norm2": ("layer_norm2.",),
        "up": ("mlp.fc1.",),
        "down": ("mlp.fc2.",),
    },
)
_OPENAI = vision_transformer.Names(
    whole={
        "class": "visual.class_embedding",
        "positions": "visual.positional_embedding",
        "patch.weight": "visual.conv1.weight",
        "before.weight": "visual.ln_pre.weight",
        "before.bias": "visual.ln_pre.bias",
        "after.weight": "visual.ln_post.weight",
        "after.bias": "visual.ln_post.bias",
        "projection": "visual.proj",
    },
    layer="visual.transformer.resblocks.{}.",
    linear={
        "norm1": ("ln_1.",),
        "qkv": ("attn.in_proj_",),
        "out": ("attn.out_proj.",),
        "norm2": ("ln_2.",),
        "up": ("mlp.c_fc.",),
        "down": ("mlp.c_proj.",),
    },
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """CLIP's image embedding of a vision transformer with the activation of OpenAI.

    Attributes:
      path: file of the weights, under the names of Hugging Face or OpenAI; those of the
        text tower are ignored.
    """

    path: str = ""

    outputs = ("features",)

    def check(self, spec: DataSpec) -> None:
        base.check_images(spec, "clip")
        weights.check_file(self.path, "path", ORIGIN)

    def load(self, room: base.Room) -> base.Network:
        arrays, digest = weights.read(self.path, "path", ORIGIN)
        params = convert(arrays)
        size = vision_transformer.image_size(params)
        return base.Network(
            params=params,
            apply=apply,
            prepare=lambda x: base.to_rgb(base.to_uint8(x)),
            about={
                "network": "clip",
                "weights": digest,
                "resize": f"bicubic (a = -0.5), antialiased, float32, to {size}x{size}",
                "quantization": "round((x+1)*127.5) to uint8",
            },
        )


def convert(arrays: vision_transformer.Weights) -> dict[str, np.ndarray]:
    """Returns the parameters of `embed` from the arrays of a published file.

    Raises:
      ValueError: they are not those of CLIP with a vision transformer.
    """
    params = vision_transformer.convert(
        arrays, (_HUGGING_FACE, _OPENAI), "path", "a vision transformer of CLIP"
    )
    # One has `[out, in]`, the other its transpose; both write what follows the tower
    # as embedding = projection token.
    if _OPENAI.whole["class"] in arrays:
        params["projection"] = params["projection"].T
    return params


def embed(params: vision_transformer.Weights, x: jax.Array) -> jax.Array:
    """Returns the embeddings `[B, E]`, before L2-normalisation; x is normalised."""
    tokens = vision_transformer.tokens(
        params, x, epsilon=EPSILON, activation=lambda h: h * jax.nn.sigmoid(1.702 * h)
    )
    token = vision_transformer.layer_norm(tokens[:, 0], params, "after", EPSILON)
    return token @ params["projection"].T


def apply(params: vision_transformer.Weights, x: jax.Array) -> dict[str, jax.Array]:
    """Returns {'features': `[B, E]` of norm 1}; x is `[B, H, W, 3]` uint8."""
    size = vision_transformer.image_size(params)
    x = x.astype(jnp.float32) / 255.0
    # Left to itself an accelerator multiplies float32 with fewer bits.
    with jax.default_matmul_precision("float32"):
        x = jax.image.resize(x, (len(x), size, size, 3), "bicubic", antialias=True)
        embedding = embed(params, (x - MEAN) / DEVIATION)
    norm = jnp.linalg.norm(embedding, axis=-1, keepdims=True)
    return {"features": embedding / norm}
