"""The golden numbers are those of transformers 5.23, see tests/peers."""

import types

import jax
import numpy as np
import pytest
import seeded

from diffusionlab.features import clip, vision_transformer
from diffusionlab.types import DataSpec

# image_embeds[:, :4] of CLIPVisionModelWithProjection, in float64.
GOLDEN = [
    [-1.1836236690, -0.2629421772, -1.9232102481, 0.6361864942],
    [-2.3067153243, 0.3517307413, -1.4462916618, 1.3352298018],
]
IMAGES = DataSpec((20, 30, 3))


@pytest.fixture(scope="module")
def arrays():
    return seeded.clip()


def openai(arrays):
    """Returns the arrays under the names, and in the shapes, of OpenAI's files."""
    start = "vision_model."
    heads = ("q_proj", "k_proj", "v_proj")
    named = {
        "visual.class_embedding": arrays[f"{start}embeddings.class_embedding"],
        "visual.conv1.weight": arrays[f"{start}embeddings.patch_embedding.weight"],
        "visual.positional_embedding": arrays[
            f"{start}embeddings.position_embedding.weight"
        ],
        "visual.proj": arrays["visual_projection.weight"].T,
        "token_embedding.weight": np.zeros((5, 4), np.float32),
        "logit_scale": np.zeros((), np.float32),
    }
    for kind in ("weight", "bias"):
        named[f"visual.ln_pre.{kind}"] = arrays[f"{start}pre_layrnorm.{kind}"]
        named[f"visual.ln_post.{kind}"] = arrays[f"{start}post_layernorm.{kind}"]
        for i in range(seeded.DEPTH):
            theirs = f"{start}encoder.layers.{i}."
            ours = f"visual.transformer.resblocks.{i}."
            parts = [arrays[f"{theirs}self_attn.{x}.{kind}"] for x in heads]
            named[f"{ours}attn.in_proj_{kind}"] = np.concatenate(parts)
            for a, b in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                named[f"{ours}{a}.{kind}"] = arrays[f"{theirs}{b}.{kind}"]
    return named


def test_embeddings_are_those_of_transformers(arrays):
    params = clip.convert(arrays)
    assert vision_transformer.image_size(params) == 12
    ours = jax.jit(clip.embed)(params, seeded.normal(2, 12, 12, 3))
    assert ours.shape == (2, 16)
    np.testing.assert_allclose(ours[:, :4], GOLDEN, rtol=0, atol=2e-5)


def test_both_dialects_are_the_same_network(arrays):
    one, other = clip.convert(arrays), clip.convert(openai(arrays))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_half_precision_weights_are_computed_with_in_float32(arrays):
    halves = {name: array.astype(np.float16) for name, array in arrays.items()}
    assert {x.dtype for x in clip.convert(halves).values()} == {np.dtype(np.float32)}


def test_features_are_of_images_resized_as_pillow_resizes_floats(arrays, tmp_path):
    from PIL import Image

    np.savez(tmp_path / "clip.npz", **arrays)
    extractor = clip.Clip(path=str(tmp_path / "clip.npz"))
    extractor.check(IMAGES)
    network = extractor.load(None)
    x = seeded.pictures(2, 20, 30, 3)
    levels = network.prepare(x)
    assert levels.dtype == np.uint8
    assert levels.shape == (2, 20, 30, 3)
    small = np.empty((2, 12, 12, 3), np.float32)
    for i, c in np.ndindex(2, 3):
        channel = Image.fromarray(levels[i, :, :, c].astype(np.float32))
        small[i, :, :, c] = channel.resize((12, 12), Image.Resampling.BICUBIC)
    mean = [0.48145466, 0.4578275, 0.40821073]
    deviation = [0.26862954, 0.26130258, 0.27577711]
    normal = ((small / 255 - mean) / deviation).astype(np.float32)
    expected = np.asarray(jax.jit(clip.embed)(network.params, normal))
    expected = expected / np.linalg.norm(expected, axis=-1, keepdims=True)
    features = jax.jit(network.apply)(network.params, levels)["features"]
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1.0, rtol=1e-6)
    assert network.about["resize"].endswith("to 12x12")
    assert len(network.about["weights"]) == 64


def test_grey_is_three_times_grey(arrays, tmp_path):
    np.savez(tmp_path / "clip.npz", **arrays)
    prepare = clip.Clip(path=str(tmp_path / "clip.npz")).load(None).prepare
    x = seeded.pictures(2, 5, 5, 1)
    np.testing.assert_array_equal(prepare(x), prepare(np.repeat(x, 3, axis=-1)))


@pytest.mark.parametrize(
    "path, error, words",
    [
        ("", ValueError, r"path: .*openai/clip-vit-large-patch14-336"),
        ("no.npz", FileNotFoundError, r"path: .*no\.npz.*clip-vit-large-patch14-336"),
    ],
)
def test_missing_file_is_one_line(path, error, words):
    with pytest.raises(error, match=f"^{words}") as caught:
        clip.Clip(path=path).check(IMAGES)
    assert "\n" not in str(caught.value)


def test_videos_are_refused():
    with pytest.raises(ValueError, match="'clip' takes images"):
        clip.Clip(path="x").check(DataSpec((4, 8, 8, 3)))


def without(name):
    return lambda arrays: {k: v for k, v in arrays.items() if k != name}


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda arrays: {"fc.weight": np.zeros(3)},
            "path: not a file of .*, but fc.we",
        ),
        (
            lambda arrays: {"visual.layer1.0.conv1.weight": np.zeros(3)},
            "path: not a file of a vision transformer of CLIP",
        ),
        (
            without("vision_model.encoder.layers.1.mlp.fc2.bias"),
            "path: .*'vision_model.encoder.layers.1.mlp.fc2.bias' is missing",
        ),
        (
            without("vision_model.encoder.layers.0.layer_norm1.weight"),
            "path: .*'vision_model.encoder.layers.0.layer_norm1.weight' is missing",
        ),
        (
            lambda arrays: {
                **arrays,
                "vision_model.embeddings.patch_embedding.weight": np.zeros(
                    (96, 3, 4, 4)
                ),
            },
            "path: the width 96 .* no multiple of 64",
        ),
    ],
)
def test_other_weights_are_refused(arrays, change, words):
    with pytest.raises(ValueError, match=f"^{words}") as caught:
        clip.convert(change(arrays))
    assert "\n" not in str(caught.value)


def test_layer_norm_is_of_mean_0_and_variance_1():
    x = 3 * seeded.normal(4, 64) + 2
    params = types.MappingProxyType({"n.weight": 2.0, "n.bias": 1.0})
    y = (np.asarray(vision_transformer.layer_norm(x, params, "n", 0.0)) - 1) / 2
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(y.var(-1), 1, rtol=1e-5)
