"""CLIP and DINOv2 against transformers, on the seeded weights of tests/features."""

import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "features"))
import seeded

from diffusionlab.features import clip, dinov2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_numpy = pytest.importorskip("safetensors.numpy")


def loaded(folder, kind, config, arrays):
    """Returns a model of transformers with all of `arrays`, in float64."""
    safetensors_numpy.save_file(arrays, folder / "model.safetensors")
    config.save_pretrained(folder)
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.double().eval()


def nchw(x):
    return torch.from_numpy(x.astype(np.float64)).permute(0, 3, 1, 2)


def assert_close(ours, theirs):
    theirs = theirs.numpy()
    assert ours.shape == theirs.shape
    assert np.max(np.abs(ours - theirs)) < 1e-5 * np.max(np.abs(theirs))


def test_clip_embeds_as_transformers_does(tmp_path):
    arrays = seeded.clip()
    config = transformers.CLIPVisionConfig(
        hidden_size=seeded.WIDTH,
        intermediate_size=seeded.HIDDEN,
        projection_dim=16,
        num_hidden_layers=seeded.DEPTH,
        num_attention_heads=2,
        image_size=12,
        patch_size=4,
    )
    kind = transformers.CLIPVisionModelWithProjection
    model = loaded(tmp_path, kind, config, arrays)
    x = seeded.normal(2, 12, 12, 3)
    with torch.no_grad():
        theirs = model(nchw(x)).image_embeds
    assert_close(jax.jit(clip.embed)(clip.convert(arrays), x), theirs)


def test_dinov2_embeds_as_transformers_does(tmp_path):
    arrays = seeded.dinov2()
    config = transformers.Dinov2Config(
        hidden_size=seeded.WIDTH,
        mlp_ratio=2,
        num_hidden_layers=seeded.DEPTH,
        num_attention_heads=2,
        image_size=70,
        patch_size=14,
    )
    model = loaded(tmp_path, transformers.Dinov2Model, config, arrays)
    x = seeded.normal(2, 112, 112, 3)
    with torch.no_grad():
        theirs = model(nchw(x)).pooler_output
    params = dinov2.convert(arrays, size=112, offset=0.0)
    assert_close(jax.jit(dinov2.embed)(params, x), theirs)


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_positions_are_those_of_torch_interpolate(offset):
    positions = seeded.normal(1 + 37 * 37, 8)
    square = torch.from_numpy(positions[1:].astype(np.float64)).reshape(1, 37, 37, 8)
    theirs = torch.nn.functional.interpolate(
        square.permute(0, 3, 1, 2),
        scale_factor=((16 + offset) / 37,) * 2,
        mode="bicubic",
    )
    theirs = theirs.permute(0, 2, 3, 1).reshape(256, 8)
    assert_close(dinov2.interpolate(positions, 16, offset)[1:], theirs)


def test_dinov2_resizes_as_torchvision_does():
    transforms = pytest.importorskip("torchvision.transforms")
    from PIL import Image

    x = seeded.pictures(2, 37, 300, 3)
    resize = transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC)
    levels = np.round((x + 1) * 127.5).astype(np.uint8)
    theirs = [np.asarray(resize(Image.fromarray(image))) for image in levels]
    np.testing.assert_array_equal(dinov2.prepare(x), theirs)
