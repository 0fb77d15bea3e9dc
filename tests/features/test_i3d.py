"""The golden numbers are those of the port in cd-fvd 0.1.1, see tests/peers."""

import jax
import numpy as np
import pytest
import seeded

from diffusionlab.features import i3d
from diffusionlab.types import DataSpec

# logits[:, :4] for 19 frames of 40 by 40, by the epsilon of the norms, in float64.
GOLDEN = {
    1e-5: [
        [6.1061399458, 8.5347115354, 3.5216810025, -5.9563263908],
        [6.4846527036, 8.0137923962, 3.2320639818, -6.0483734657],
    ],
    1e-3: [
        [6.0617185579, 8.4617013666, 3.4864115449, -5.8991557478],
        [6.4299089966, 7.9510759768, 3.1936780925, -5.9771441791],
    ],
}
VIDEOS = DataSpec((10, 20, 30, 3))


@pytest.fixture(scope="module")
def arrays():
    return seeded.i3d()


@pytest.fixture(scope="module")
def logits():
    return jax.jit(i3d.logits)


@pytest.mark.parametrize("epsilon", GOLDEN)
def test_logits_are_those_of_the_port(arrays, logits, epsilon):
    x = seeded.pictures(2, 19, 40, 40, 3)
    ours = logits(i3d.convert(arrays, epsilon), x)
    assert ours.shape == (2, 50)
    np.testing.assert_allclose(ours[:, :4], GOLDEN[epsilon], rtol=0, atol=5e-5)


def test_features_are_of_resized_frames(arrays, logits, tmp_path, monkeypatch):
    monkeypatch.setattr(i3d, "SIZE", 40)  # 224 takes 30 times as long
    np.savez(tmp_path / "i3d.npz", **arrays)
    extractor = i3d.I3D(path=str(tmp_path / "i3d.npz"))
    extractor.check(VIDEOS)
    network = extractor.load(None)
    levels = network.prepare(seeded.pictures(2, 19, 20, 30, 1))
    assert levels.dtype == np.uint8
    assert levels.shape == (2, 19, 20, 30, 3)
    x = np.asarray(levels, np.float32) / 127.5 - 1
    # Where nothing shrinks, jax.image has no antialiasing either.
    x = jax.image.resize(x, (2, 19, 40, 40, 3), "linear")
    features = jax.jit(network.apply)(network.params, levels)["features"]
    expected = logits(network.params, x)
    np.testing.assert_allclose(features, expected, rtol=0, atol=5e-5)
    assert network.about["epsilon"] == 1e-5


@pytest.mark.parametrize(
    "shape, words",
    [
        ((9, 8, 8, 3), "name: .*at least 10 frames.* 9"),
        ((8, 8, 3), "name: .*takes videos"),
        ((10, 8, 8, 2), "name: .*takes videos"),
    ],
)
def test_other_data_are_refused(shape, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        i3d.I3D(path="x").check(DataSpec(shape))


def test_other_weights_and_missing_files_are_refused(arrays):
    del (part := dict(arrays))["Mixed_4e.b2b.bn.running_var"]
    with pytest.raises(ValueError, match="^path: .*'Mixed_4e.b2b.bn.running_var'"):
        i3d.convert(part, 1e-5)
    with pytest.raises(FileNotFoundError, match=r"^path: .*i3d_pretrained_400\.pt"):
        i3d.I3D(path="no.pt").check(VIDEOS)
    with pytest.raises(ValueError, match="^epsilon: must be positive, got 0"):
        i3d.I3D(path="x", epsilon=0.0).check(VIDEOS)
