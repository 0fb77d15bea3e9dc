"""The FID network of torch-fidelity against ours, at full size on random weights.

Needs torch-fidelity, torch and clean-fid; a minute. Ours differs from theirs by the
order of float32 sums alone: 1e-4 of the largest entry, of which 1e-6 was seen.
"""

import pathlib
from unittest import mock

import jax
import numpy as np
import pytest

from diffusionlab.features import base, inception, resize, weights

torch = pytest.importorskip("torch")
pytest.importorskip("torch_fidelity")

from torch_fidelity import feature_extractor_inceptionv3 as peer  # noqa: E402
from torch_fidelity import interpolate_compat_tensorflow as peer_resize  # noqa: E402

SIZES = [(32, 32), (64, 80), (299, 299), (513, 300)]


def random_network():
    """torch-fidelity's extractor, every parameter and statistic random."""
    with (
        mock.patch.object(torch, "load", lambda *a, **k: {}),
        mock.patch.object(torch.nn.Module, "load_state_dict", lambda *a, **k: None),
    ):
        network = peer.FeatureExtractorInceptionV3(
            "random", ["2048", "logits_unbiased"], feature_extractor_weights_path="-"
        )
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith(("bn.weight", "running_var")):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif value.ndim == 4:
            value.copy_(noise * (2 / value[0].numel()) ** 0.5)
        elif name.endswith("bn.bias"):
            value.copy_(0.3 + 0.2 * noise)
        else:
            value.copy_(0.1 * noise)
    return network


@pytest.fixture(scope="module")
def network():
    return random_network()


@pytest.fixture(scope="module")
def path(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


def images(height, width):
    rng = np.random.default_rng(height)
    coarse = rng.integers(0, 256, (2, height // 8 + 1, width // 8 + 1, 3))
    x = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    return np.clip(x + rng.integers(-9, 9, x.shape), 0, 255).astype(np.uint8)


def theirs(network, x):
    """Outputs of torch-fidelity for uint8 `[B, H, W, 3]`."""
    kept = {}
    branch = network.Mixed_6d.branch1x1
    hook = branch.register_forward_hook(lambda _, __, out: kept.update(spatial=out))
    features, logits = network(torch.tensor(x.transpose(0, 3, 1, 2).copy()))
    hook.remove()
    spatial = kept["spatial"][:, :7].permute(0, 2, 3, 1).reshape(len(x), -1)
    return {"features": features, "logits": logits, "spatial": spatial}


def body(network, z):
    """Outputs of torch-fidelity after its resize, for `[B, 3, 299, 299]` in [-1, 1]."""
    name = "interpolate_bilinear_2d_like_tensorflow1x"
    with mock.patch.object(peer, name, lambda x, **_: z * 128 + 128):
        return theirs(network, np.zeros((len(z), 1, 1, 3), np.uint8))


def agree(ours, theirs):
    for name in ("features", "logits", "spatial"):
        expected = theirs[name].numpy()
        assert expected.std() > 0
        tolerance = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=tolerance)


def load(path, tmp_path, **keywords):
    room = base.Room(pathlib.Path(tmp_path), None)
    return inception.Inception(path=str(path), **keywords).load(room)


@pytest.mark.parametrize("zipped", [True, False])
def test_state_files_are_read_exactly(network, tmp_path, zipped):
    path = tmp_path / "state.pth"
    state = network.state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    arrays, _ = weights.read(str(path))
    assert arrays.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(arrays[name], value.numpy(), err_msg=name)


def test_features_are_those_of_torch_fidelity(path, network, tmp_path):
    ours = load(path, tmp_path)
    apply = jax.jit(ours.apply)
    for size in SIZES:
        x = images(*size)
        prepared = ours.prepare(x / np.float32(127.5) - 1)
        np.testing.assert_array_equal(prepared, x)
        agree(apply(ours.params, prepared), theirs(network, x))


def test_clean_features_are_those_after_the_resize_of_clean_fid(
    network, path, tmp_path
):
    clean_fid = pytest.importorskip("cleanfid.resize")
    resizer = clean_fid.make_resizer("PIL", False, "bicubic", (299, 299))
    ours = load(path, tmp_path, resize="clean")
    for size in SIZES:
        x = images(*size)
        resized = np.stack([resizer(one) for one in x])
        prepared = ours.prepare(x / np.float32(127.5) - 1)
        np.testing.assert_allclose(prepared, resized, rtol=1e-6)
    z = torch.tensor(resized.transpose(0, 3, 1, 2).copy())
    agree(jax.jit(ours.apply)(ours.params, prepared), body(network, (z - 128) / 128))


def test_legacy_pytorch_features_are_those_of_pytorch_fid(network, path, tmp_path):
    """It divides by 255, resizes with torch's interpolate, and doubles minus one."""
    ours = load(path, tmp_path, resize="legacy_pytorch")
    x = images(64, 80)
    z = torch.tensor(x.transpose(0, 3, 1, 2).copy()).float() / 255
    z = torch.nn.functional.interpolate(z, size=(299, 299), mode="bilinear")
    agree(jax.jit(ours.apply)(ours.params, x), body(network, 2 * z - 1))


def test_network_of_pytorch_fid_is_the_same(network, path, tmp_path):
    pytorch_fid = pytest.importorskip("pytorch_fid.inception")
    with mock.patch.object(
        pytorch_fid, "load_state_dict_from_url", lambda *_, **__: network.state_dict()
    ):
        peer_network = pytorch_fid.InceptionV3().eval()
    ours = load(path, tmp_path, resize="legacy_pytorch")
    x = images(64, 80)
    z = torch.tensor(x.transpose(0, 3, 1, 2).copy()).float() / 255
    with torch.no_grad():
        expected = peer_network(z)[0][..., 0, 0].numpy()
    found = jax.jit(ours.apply)(ours.params, x)["features"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * expected.max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("out", [(299, 299), (224, 200)])
def test_bilinear_resizes_are_those_of_the_peers(size, out):
    x = images(*size)
    z = torch.tensor(x.transpose(0, 3, 1, 2).copy()).float()
    tf1 = peer_resize.interpolate_bilinear_2d_like_tensorflow1x
    expected = tf1(z, size=out, align_corners=False).permute(0, 2, 3, 1).numpy()
    # A few roundings of values up to 255, each of at most 1.5e-5; 5e-5 was seen.
    np.testing.assert_allclose(resize.tf1_bilinear(x, *out), expected, atol=2e-4)
    expected = torch.nn.functional.interpolate(z, size=out, mode="bilinear")
    expected = expected.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(resize.half_pixel_bilinear(x, *out), expected, atol=2e-4)
