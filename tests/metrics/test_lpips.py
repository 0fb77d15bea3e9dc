"""The golden numbers are those of the package lpips 0.1.4, see tests/peers."""

import functools
import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "features"))
import seeded

from diffusionlab.features import perceptual
from diffusionlab.metrics import lpips
from diffusionlab.types import DataSpec

# Distances of two pairs of noise of 40 by 48, in float64.
GOLDEN = {
    "alex": [0.6792808475, 0.6385077611],
    "vgg": [0.5444494718, 0.5448969088],
}


distance = jax.jit(lpips.distance, static_argnums=1)


@functools.cache
def files(net):
    return seeded.trunk(net), seeded.linear(net)


@pytest.fixture
def metric(tmp_path):
    """The function of LPIPS with AlexNet, and how it is built."""
    trunk, linear = files("alex")
    np.savez(tmp_path / "trunk.npz", **trunk)
    np.savez(tmp_path / "linear.npz", **linear)
    paths = {k: str(tmp_path / f"{k}.npz") for k in ("trunk", "linear")}
    made = lpips.Lpips(**paths)
    made.check(DataSpec((40, 48, 3)))
    return made.prepare(None)


@pytest.mark.parametrize("net", GOLDEN)
def test_distance_is_that_of_the_package(net):
    x, y = np.split(seeded.pictures(4, 40, 48, 3), 2)
    ours = distance(lpips.convert(*files(net), net), net, x, y)
    np.testing.assert_allclose(ours, GOLDEN[net], rtol=1e-5)


def test_function_is_of_files_symmetric_and_zero_for_equal_images(metric):
    x, y = np.split(seeded.pictures(4, 40, 48, 3), 2)
    there, back = metric(x, y), metric(y, x)
    assert there.dtype == np.float64
    np.testing.assert_allclose(there, GOLDEN["alex"], rtol=1e-5)
    np.testing.assert_allclose(there, back, rtol=1e-6)
    np.testing.assert_array_equal(metric(x, x), [0.0, 0.0])


def test_grey_is_three_times_grey(metric):
    x, y = np.split(seeded.pictures(4, 40, 48, 1), 2)
    wide = (np.repeat(z, 3, axis=-1) for z in (x, y))
    np.testing.assert_array_equal(metric(x, y), metric(*wide))


def test_layers_without_weight_count_nothing():
    trunk, linear = files("alex")
    nothing = {name: np.zeros_like(array) for name, array in linear.items()}
    x, y = np.split(seeded.pictures(4, 40, 48, 3), 2)
    params = lpips.convert(trunk, nothing, "alex")
    np.testing.assert_array_equal(distance(params, "alex", x, y), [0.0, 0.0])


@pytest.mark.parametrize("net, size", [("alex", 31), ("vgg", 16)])
def test_smallest_image_leaves_one_pixel(net, size):
    assert perceptual.smallest(net) == size
    params = perceptual.convert(files(net)[0], net, "trunk")

    def last(size):
        x = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
        return jax.eval_shape(lambda x: perceptual.activations(params, net, x), x)[-1]

    assert last(size).shape[1:3] == (1, 1)
    assert 0 in last(size - 1).shape


def test_activations_are_after_the_published_layers():
    channels = [64, 128, 256, 512, 512]
    names = [c.name for c in perceptual.TRUNKS["vgg"] if c.tap]
    assert names == [f"features.{i}." for i in (2, 7, 14, 21, 28)]
    trunk = files("vgg")[0]
    assert [8 * len(trunk[f"{name}bias"]) for name in names] == channels


def test_wrong_choices_and_data_are_refused():
    with pytest.raises(
        ValueError, match="^net: must be 'alex' or 'vgg', got 'squeeze'"
    ):
        lpips.Lpips(net="squeeze")
    with pytest.raises(ValueError, match="^net: 'alex' takes images of at least 31x31"):
        lpips.Lpips().check(DataSpec((30, 64, 3)))
    with pytest.raises(ValueError, match="^name: .*'lpips' takes images"):
        lpips.Lpips().check(DataSpec((64,)))


def test_missing_files_say_where_they_come_from(tmp_path):
    spec = DataSpec((64, 64, 3))
    with pytest.raises(ValueError, match=r"^trunk: .*vgg16-397923af\.pth"):
        lpips.Lpips(net="vgg").check(spec)
    with pytest.raises(FileNotFoundError, match=r"^trunk: .*alexnet-owt-7be5be79\.pth"):
        lpips.Lpips(trunk="no.pth").check(spec)
    (tmp_path / "trunk.pth").touch()
    with pytest.raises(ValueError, match=r"^linear: .*weights/v0\.1/alex\.pth"):
        lpips.Lpips(trunk=str(tmp_path / "trunk.pth")).check(spec)


def test_files_of_something_else_are_refused():
    trunk, linear = files("alex")
    with pytest.raises(ValueError, match=r"^trunk: .*'features\.3\.weight' is missing"):
        lpips.convert(files("vgg")[0], linear, "alex")
    with pytest.raises(ValueError, match=r"^linear: .*'lin0\.model\.1\.weight' is mis"):
        lpips.convert(trunk, {}, "alex")
    with pytest.raises(
        ValueError, match="^linear: .*has 16 .* layer 1 .*'alex' has 24"
    ):
        lpips.convert(trunk, seeded.linear("vgg"), "alex")
    negative = linear | {"lin2.model.1.weight": -linear["lin2.model.1.weight"]}
    with pytest.raises(
        ValueError, match="^linear: 'lin2.model.1.weight' has a negative"
    ):
        lpips.convert(trunk, negative, "alex")
