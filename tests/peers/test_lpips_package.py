"""LPIPS against the lpips package, on the seeded weights of tests/features."""

import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "features"))
import seeded

from diffusionlab.metrics import lpips

torch = pytest.importorskip("torch")
lpips_package = pytest.importorskip("lpips")


def loaded(net, trunk, linear):
    """Returns the package's distance with convolutions as thin as the arrays."""
    model = lpips_package.LPIPS(
        net=net, pnet_rand=True, pretrained=False, verbose=False
    )
    for i in range(1, 6):
        layers = getattr(model.net, f"slice{i}")._modules
        for index, old in layers.items():
            if isinstance(old, torch.nn.Conv2d):
                weight, bias = (
                    trunk[f"features.{index}.{k}"] for k in ("weight", "bias")
                )
                out, width, *window = weight.shape
                new = torch.nn.Conv2d(width, out, window, old.stride, old.padding)
                new.weight.data = torch.from_numpy(weight)
                new.bias.data = torch.from_numpy(bias)
                layers[index] = new
    for i, layer in enumerate(model.lins):
        weight = linear[f"lin{i}.model.1.weight"]
        layer.model[1] = torch.nn.Conv2d(weight.shape[1], 1, 1, bias=False)
        layer.model[1].weight.data = torch.from_numpy(weight)
    return model.double().eval()


def nchw(x):
    return torch.from_numpy(x).double().permute(0, 3, 1, 2)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_distance_is_that_of_the_package(net):
    trunk, linear = seeded.trunk(net), seeded.linear(net)
    x, y = np.split(seeded.pictures(4, 40, 48, 3), 2)
    with torch.no_grad():
        theirs = loaded(net, trunk, linear)(nchw(x), nchw(y)).numpy().ravel()
    distance = jax.jit(lpips.distance, static_argnums=1)
    ours = distance(lpips.convert(trunk, linear, net), net, x, y)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_published_linear_weights_and_a_whole_trunk(net, tmp_path):
    linear = pathlib.Path(lpips_package.__file__).parent / f"weights/v0.1/{net}.pth"
    np.savez(tmp_path / "trunk.npz", **seeded.trunk(net, thin=1))
    metric = lpips.Lpips(trunk=str(tmp_path / "trunk.npz"), linear=str(linear), net=net)
    x, y = np.split(seeded.pictures(2, 64, 64, 3), 2)
    ours = metric.prepare(None)(x, y)
    state = torch.load(linear, map_location="cpu", weights_only=True)
    state = {name: array.numpy() for name, array in state.items()}
    with torch.no_grad():
        theirs = loaded(net, seeded.trunk(net, thin=1), state)(nchw(x), nchw(y))
    np.testing.assert_allclose(ours, theirs.numpy().ravel(), rtol=1e-5)
