"""I3D against the PyTorch port of cd-fvd, on the seeded weights of tests/features."""

import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "features"))
import seeded

from diffusionlab.features import i3d

torch = pytest.importorskip("torch")
port = pytest.importorskip("cdfvd.third_party.i3d.utils")
pytorch_i3d = pytest.importorskip("cdfvd.third_party.i3d.pytorch_i3d")


def loaded(arrays, epsilon):
    """Returns the port with convolutions as thin as `arrays`, in float64."""
    model = pytorch_i3d.InceptionI3d()
    for name, array in arrays.items():
        if name.endswith(".conv3d.weight"):
            unit = model.get_submodule(name.removesuffix(".conv3d.weight"))
            out, width, *window = array.shape
            bias = unit._use_bias
            unit.conv3d = torch.nn.Conv3d(width, out, window, unit._stride, bias=bias)
            if unit._use_batch_norm:
                unit.bn = torch.nn.BatchNorm3d(out, eps=epsilon)
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return model.double().eval()


@pytest.mark.parametrize("epsilon", [1e-5, 1e-3])
def test_logits_are_those_of_the_port(epsilon):
    arrays = seeded.i3d()
    model = loaded(arrays, epsilon)
    # Frames of 40 by 40 leave 2 by 2 where frames of 224 by 224 leave 7 by 7.
    model.avg_pool = torch.nn.AvgPool3d((2, 2, 2), stride=1)
    x = seeded.pictures(2, 19, 40, 40, 3)
    with torch.no_grad():
        theirs = model(torch.from_numpy(x).double().permute(0, 4, 1, 2, 3)).numpy()
    ours = jax.jit(i3d.logits)(i3d.convert(arrays, epsilon), x)
    assert np.max(np.abs(ours - theirs)) < 1e-5 * np.max(np.abs(theirs))


def test_features_of_the_whole_network_are_those_of_the_port():
    arrays = seeded.i3d(thin=1)
    model = loaded(arrays, 1e-5).float()
    x = seeded.pictures(1, 10, 60, 80, 3)
    levels = np.round((x + 1) * 127.5).astype(np.uint8)
    with torch.no_grad():
        theirs = model(port.preprocess_i3d(levels)).numpy()
    ours = jax.jit(i3d.apply)(i3d.convert(arrays, 1e-5), levels)["features"]
    assert ours.shape == (1, 400)
    assert np.max(np.abs(ours - theirs)) < 1e-4 * np.max(np.abs(theirs))
