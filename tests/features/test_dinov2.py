"""The golden numbers are those of transformers 5.23 and torch, see tests/peers."""

import jax
import numpy as np
import pytest
import seeded

from diffusionlab.features import dinov2
from diffusionlab.types import DataSpec

# pooler_output[:, :4] of Dinov2Model for images of 112 by 112, in float64.
GOLDEN = [
    [0.2293908588, 0.7898769692, -0.2063940839, -0.6445755081],
    [-0.3126352677, 0.4169036831, 0.2863325482, 0.6009510804],
]
# Rows 0, 100 and 255 of torch's interpolate from 37 by 37 to 16 by 16, by offset.
POSITIONS = {
    0.0: [0.7042562537, -0.8919038214, -1.9654423005],
    0.1: [0.7208467365, -1.0836154123, -2.3983556857],
}


@pytest.fixture(scope="module")
def arrays():
    return seeded.dinov2()


def original(arrays):
    """Returns the arrays under the names, and in the shapes, of the authors' files."""
    patch = "embeddings.patch_embeddings.projection"
    named = {
        "cls_token": arrays["embeddings.cls_token"],
        "pos_embed": arrays["embeddings.position_embeddings"],
        "mask_token": arrays["embeddings.mask_token"],
    }
    for i in range(seeded.DEPTH):
        for j in (1, 2):
            gamma = arrays[f"encoder.layer.{i}.layer_scale{j}.lambda1"]
            named[f"blocks.{i}.ls{j}.gamma"] = gamma
    for kind in ("weight", "bias"):
        named[f"patch_embed.proj.{kind}"] = arrays[f"{patch}.{kind}"]
        named[f"norm.{kind}"] = arrays[f"layernorm.{kind}"]
        for i in range(seeded.DEPTH):
            theirs = f"encoder.layer.{i}."
            heads = [f"attention.attention.{x}" for x in ("query", "key", "value")]
            named[f"blocks.{i}.attn.qkv.{kind}"] = np.concatenate(
                [arrays[f"{theirs}{x}.{kind}"] for x in heads]
            )
            out = arrays[f"{theirs}attention.output.dense.{kind}"]
            named[f"blocks.{i}.attn.proj.{kind}"] = out
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                named[f"blocks.{i}.{part}.{kind}"] = arrays[f"{theirs}{part}.{kind}"]
    return named


def test_class_tokens_are_those_of_transformers(arrays):
    params = dinov2.convert(arrays, size=112, offset=0.0)
    ours = jax.jit(dinov2.embed)(params, seeded.normal(2, 112, 112, 3))
    assert ours.shape == (2, seeded.WIDTH)
    np.testing.assert_allclose(ours[:, :4], GOLDEN, rtol=0, atol=1e-5)


@pytest.mark.parametrize("offset", POSITIONS)
def test_positions_are_interpolated_as_torch_does(offset):
    new = dinov2.interpolate(seeded.normal(1 + 37 * 37, 8), 16, offset)
    assert new.shape == (257, 8)
    np.testing.assert_allclose(new[[1, 101, 256], 0], POSITIONS[offset], atol=1e-6)


def test_positions_are_those_of_the_authors_program(arrays):
    params = dinov2.convert(arrays)
    expected = dinov2.interpolate(arrays["embeddings.position_embeddings"][0], 16, 0.1)
    np.testing.assert_array_equal(params["positions"], expected)
    np.testing.assert_array_equal(
        expected[0], arrays["embeddings.position_embeddings"][0, 0]
    )


def test_positions_of_the_same_grid_stay():
    positions = seeded.normal(257, 3)
    assert dinov2.interpolate(positions, 16, 0.1) is positions


def test_both_dialects_are_the_same_network(arrays):
    one, other = dinov2.convert(arrays), dinov2.convert(original(arrays))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_features_are_of_normalised_images_of_224(arrays, tmp_path):
    np.savez(tmp_path / "dinov2.npz", **original(arrays))
    extractor = dinov2.DinoV2(path=str(tmp_path / "dinov2.npz"))
    extractor.check(DataSpec((32, 32, 3)))
    network = extractor.load(None)
    levels = network.prepare(seeded.pictures(1, 224, 224, 3))
    mean, deviation = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    normal = ((levels / 255 - mean) / deviation).astype(np.float32)
    expected = jax.jit(dinov2.embed)(network.params, normal)
    features = jax.jit(network.apply)(network.params, levels)["features"]
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5)
    assert network.about["positions"].endswith("offset 0.1")
    assert len(network.about["weights"]) == 64


def test_prepare_keeps_images_of_224_and_repeats_grey():
    x = seeded.pictures(1, 224, 224, 1)
    levels = np.round((x + 1) * 127.5).astype(np.uint8)
    np.testing.assert_array_equal(dinov2.prepare(x), np.repeat(levels, 3, axis=-1))


def test_prepare_resizes_with_antialiasing_and_rounds():
    from PIL import Image

    x = seeded.pictures(1, 500, 300, 3)
    levels = np.round((x[0] + 1) * 127.5).astype(np.uint8)
    expected = Image.fromarray(levels).resize((224, 224), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(dinov2.prepare(x)[0], np.asarray(expected))


@pytest.mark.parametrize(
    "name, words",
    [
        ("register_tokens", "has register tokens"),
        ("embeddings.register_tokens", "has register tokens"),
        ("blocks.0.mlp.w12.weight", "has a SwiGLU mlp"),
        ("encoder.layer.0.mlp.weights_in.weight", "has a SwiGLU mlp"),
    ],
)
def test_other_variants_are_refused(arrays, name, words):
    with pytest.raises(ValueError, match=f"^path: .*{words}"):
        dinov2.convert({**arrays, name: np.zeros(1)})


def test_other_weights_and_missing_files_are_refused():
    with pytest.raises(ValueError, match="^path: not a file of DINOv2.* a.b, "):
        dinov2.convert({"a.b": np.zeros(1)})
    with pytest.raises(
        FileNotFoundError, match=r"^path: .*dinov2_vitl14_pretrain\.pth"
    ):
        dinov2.DinoV2(path="no.pth").check(DataSpec((8, 8, 1)))
