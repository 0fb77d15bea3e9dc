"""The Inception network on random weights, against values of torch-fidelity 0.4.0.

The networks here have an eighth of the channels. Their golden values were computed by
torch-fidelity's FeatureExtractorInceptionV3 with every layer replaced by one of the
same kind and an eighth of the channels, in float64, from the state that `random_state`
returns; for 'clean' the picture was resized by clean-fid 0.1.35, and for
'legacy_pytorch' by torch's interpolate.
"""

import functools
import hashlib
import json
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


# Resize -> output -> entries 0, 1, the middle one, the third last and the last, and the
# sum of entry i times cos i.
GOLDEN = {
    "legacy_tf": {
        "features": ([11.08086, 0.1279093, 0.0, 0.009900557, 0.0], 99.8547297),
        "logits": ([49.74598, -6.90156, 21.88367, -14.28677, 32.99379], -44.9245866),
        "spatial": ([0.0, 0.0, 1.060287, 9.090493, 0.09672106], 90.4136465),
    },
    "clean": {
        "features": ([11.69076, 0.09472644, 0.0, 0.0, 0.0], 104.276505),
        "logits": ([52.25032, -7.495061, 22.99335, -14.87442, 35.30397], -49.2609805),
        "spatial": ([0.0, 0.0, 0.0, 9.69919, 0.9143365], 56.5059652),
    },
    "legacy_pytorch": {
        "features": ([11.0839, 0.1207702, 0.0, 0.0, 0.0], 97.9837332),
        "logits": ([49.43013, -6.949661, 21.74042, -14.32227, 33.1405], -44.6515665),
        "spatial": ([0.0, 0.0, 0.4726991, 9.321977, 0.74779], 65.8661614),
    },
}


@pytest.fixture(scope="module")
def state():
    return random_state()


@pytest.fixture(scope="module")
def load(tmp_path_factory, state):
    """`load(**keywords)`: the network of an `Inception` on the random state."""
    folder = tmp_path_factory.mktemp("inception")
    path = folder / "weights.npz"
    np.savez(path, **state)

    def loaded(**keywords):
        room = base.Room(folder / "cache", None)
        return Inception(path=str(path), **keywords).load(room)

    return loaded


@functools.cache
def compiled(apply):
    return jax.jit(apply)


@pytest.mark.parametrize("resize", GOLDEN)
def test_outputs_are_those_of_torch_fidelity(load, resize):
    """Golden values have seven digits; 94 layers in float32 were seen to lose 3e-6."""
    network = load(resize=resize)
    x = network.prepare(picture() / np.float32(127.5) - 1)
    out = compiled(network.apply)(network.params, x)
    assert set(out) == set(Inception.outputs)
    for name, (entries, total) in GOLDEN[resize].items():
        found = np.asarray(out[name])[0].astype(np.float64)
        scale = np.linalg.norm(found)
        assert found.dtype == np.float64 and out[name].dtype == jnp.float32
        few = found[[0, 1, len(found) // 2, -3, -1]]
        np.testing.assert_allclose(few, entries, rtol=1e-5, atol=1e-6 * scale)
        cosines = np.cos(np.arange(len(found)))
        np.testing.assert_allclose(found @ cosines, total, atol=1e-5 * scale)


def test_layers_are_those_of_the_table_by_both_names():
    names = [name for name, *_ in shapes()]
    assert len(names) == len(set(names)) == 94
    layers = inception.layers()
    assert set(layers) == set(names) and len(set(layers.values())) == 94
    for name, graph_name in {
        "Conv2d_1a_3x3": "conv",
        "Conv2d_4a_3x3": "conv_4",
        "Mixed_5b.branch5x5_2": "mixed/tower/conv_1",
        "Mixed_5c.branch_pool": "mixed_1/tower_2/conv",
        "Mixed_5d.branch3x3dbl_3": "mixed_2/tower_1/conv_2",
        "Mixed_6a.branch3x3": "mixed_3/conv",
        "Mixed_6a.branch3x3dbl_3": "mixed_3/tower/conv_2",
        "Mixed_6d.branch7x7_3": "mixed_6/tower/conv_2",
        "Mixed_6e.branch7x7dbl_5": "mixed_7/tower_1/conv_4",
        "Mixed_7a.branch3x3_2": "mixed_8/tower/conv_1",
        "Mixed_7a.branch7x7x3_4": "mixed_8/tower_1/conv_3",
        "Mixed_7b.branch3x3_2b": "mixed_9/tower/mixed/conv_1",
        "Mixed_7c.branch3x3dbl_2": "mixed_10/tower_1/conv_1",
        "Mixed_7c.branch3x3dbl_3a": "mixed_10/tower_1/mixed/conv",
    }.items():
        assert layers[name] == graph_name
    # All 94 were compared with those of torch-fidelity's converter.
    text = json.dumps(layers, sort_keys=True).encode()
    assert hashlib.sha256(text).hexdigest()[:16] == "1faf468f003021b8"


def test_full_size_outputs_have_the_published_shapes():
    params = {"fc.kernel": (2048, 1008)}
    for name, inputs, outputs, *kernel in shapes():
        params[f"{name}.kernel"] = (*kernel, inputs, outputs)
        params[f"{name}.bias"] = (outputs,)
    params = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in params.items()}
    x = jax.ShapeDtypeStruct((2, 299, 299, 3), jnp.float32)
    out = jax.eval_shape(inception.apply, params, x)
    assert {name: array.shape for name, array in out.items()} == {
        "features": (2, 2048),
        "logits": (2, 1008),
        "spatial": (2, 2023),
    }


def test_names_of_the_graph_give_the_same_parameters(state):
    stats = {
        "weight": "gamma",
        "bias": "beta",
        "running_mean": "moving_mean",
        "running_var": "moving_variance",
    }
    graph = {
        "softmax/weights": state["fc.weight"].T,
        "softmax/biases": state["fc.bias"],
    }
    for name, graph_name in inception.layers().items():
        kernel = state[f"{name}.conv.weight"].transpose(2, 3, 1, 0)
        graph[f"{graph_name}/conv2d_params"] = kernel
        for ours, theirs in stats.items():
            graph[f"{graph_name}/batchnorm/{theirs}"] = state[f"{name}.bn.{ours}"]
    found, expected = inception.convert(graph), inception.convert(state)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_batch_normalisation_is_folded():
    """kernel 2, gamma 3, variance 0.249: 2 * 3 / 0.5 = 12; 1 - 5 * 6 = -29."""
    state = {name: np.ones_like(array) for name, array in random_state(16).items()}
    layer = "Mixed_6a.branch3x3"
    state[f"{layer}.conv.weight"] *= 2
    state[f"{layer}.bn.weight"] *= 3
    state[f"{layer}.bn.running_mean"] *= 5
    state[f"{layer}.bn.running_var"] *= 0.249
    params = inception.convert(state)
    np.testing.assert_allclose(params[f"{layer}.kernel"], 12, rtol=1e-6)
    np.testing.assert_allclose(params[f"{layer}.bias"], -29, rtol=1e-6)


def test_images_are_prepared_on_the_host(load):
    grey = np.array([-1.0, -0.5, 0.0, 1.5], np.float32).reshape(1, 2, 2, 1)
    prepared = load().prepare(grey)
    assert prepared.dtype == np.uint8 and prepared.shape == (1, 2, 2, 3)
    assert prepared[0, ..., 2].ravel().tolist() == [0, 64, 128, 255]
    prepared = load(resize="clean").prepare(grey)
    assert prepared.dtype == np.float32 and prepared.shape == (1, 299, 299, 3)
    assert (prepared[..., 0] == prepared[..., 2]).all()
    assert prepared.min() == 0 and prepared.max() == 255


def test_networks_say_what_decides_their_features(load):
    about = load().about
    assert about["network"] == "inception-v3-fid"
    assert about["resize"] == "legacy_tf"
    assert about["quantization"] == "round((x+1)*127.5) to uint8"
    assert len(about["weights"]) == 64
    fingerprints = {load(resize=resize).fingerprint for resize in GOLDEN}
    assert len(fingerprints) == 3
    # One function per way of resizing, so that loading again compiles nothing.
    assert load().apply is load().apply


def test_unknown_resize_is_refused():
    with pytest.raises(ValueError, match=r"^resize: must be one of legacy_tf, clean,"):
        Inception(resize="bilinear")


@pytest.mark.parametrize(
    ("path", "spec", "error", "words"),
    [
        ("", SPEC, ValueError, "path: name a local file"),
        ("no.pth", SPEC, FileNotFoundError, "path: there is no file no.pth."),
        ("no.pth", DataSpec(shape=(2,)), ValueError, "name: the extractor 'inception'"),
    ],
)
def test_what_cannot_work_is_said_before_loading(path, spec, error, words):
    with pytest.raises(error) as caught:
        Inception(path=path).check(spec)
    message = str(caught.value)
    assert message.startswith(words) and "\n" not in message
    if path and error is FileNotFoundError:
        assert "6726825d" in message and "torch-fidelity" in message


def test_weights_of_another_network_are_refused(tmp_path, state):
    path = pathlib.Path(tmp_path / "other.npz")
    wrong = {k: v for k, v in state.items() if k != "Mixed_7c.branch_pool.bn.bias"}
    np.savez(path, **wrong)
    with pytest.raises(ValueError) as caught:
        Inception(path=str(path)).load(base.Room(tmp_path / "cache", None))
    message = str(caught.value)
    assert message.startswith("path: ") and "\n" not in message
    assert "'Mixed_7c.branch_pool.bn.bias'" in message


def test_weights_of_torchvision_are_refused(state):
    """Every name is the same, and the scores would be others."""
    wrong = state | {"fc.weight": np.zeros((1000, 256), np.float32)}
    with pytest.raises(ValueError, match="torchvision's Inception"):
        inception.convert(wrong)


def test_one_image_after_another_gives_what_the_batch_gives():
    x = np.arange(24, dtype=np.float32).reshape(3, 2, 2, 2)
    function = lambda params, x: {"a": (params * x).sum((1, 2)), "b": x[:, 0, 0]}  # noqa: E731
    found, whole = inception.one_by_one(function)(2.0, x), function(2.0, x)
    for name in whole:
        np.testing.assert_array_equal(found[name], whole[name])
