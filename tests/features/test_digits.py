"""The features that need no file: pixels, and a classifier trained on first use."""

import jax
import numpy as np
import pytest

from diffusionlab.data.sources import Digits as Source
from diffusionlab.features import base, digits, pixels
from diffusionlab.types import DataSpec

ROOM = base.Room(base.cache_folder(), None)


def test_the_classifier_knows_the_digits():
    network = digits.Digits().load(ROOM)
    source = Source(split="test")
    batch = source.__getitems__(np.arange(len(source)))
    found = jax.jit(network.apply)(network.params, network.prepare(batch["x"]))
    assert found["features"].shape == (len(source), 64)
    # It has seen them: every one is right but for a rare accident of training.
    assert np.mean(np.argmax(found["logits"], 1) == batch["label"]) > 0.99


def test_it_is_trained_once(tmp_path, monkeypatch):
    room, trained = base.Room(tmp_path, None), []

    def train(file):
        trained.append(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        widths = (64, *digits._WIDTHS, 10)
        shapes = zip(widths[:-1], widths[1:], strict=True)
        arrays = {f"kernel_{i}": np.ones(s, np.float32) for i, s in enumerate(shapes)}
        arrays |= {f"bias_{i}": np.zeros(n) for i, n in enumerate(widths[1:])}
        np.savez(file, **arrays)

    monkeypatch.setattr(digits, "_train", train)
    first, second = (digits.Digits().load(room) for _ in range(2))
    assert len(trained) == 1
    trained[0].write_bytes(trained[0].read_bytes()[:50])
    assert digits.Digits().load(room).fingerprint == first.fingerprint
    assert len(trained) == 2, "a damaged file is made anew"
    assert first.fingerprint == second.fingerprint
    # All ones: relu sums the pixels, then 128 and 64 equal numbers.
    found = first.apply(first.params, np.full((1, 8, 8, 1), 0.5, np.float32))
    np.testing.assert_allclose(found["features"], 32 * 128)
    np.testing.assert_allclose(found["logits"], 32 * 128 * 64)


def test_other_weights_have_another_fingerprint():
    about = {"network": "a", "weights": "1"}
    one, same, other = (
        base.Network({}, None, None, a)
        for a in (about, dict(reversed(about.items())), about | {"weights": "2"})
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_digits_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"'digits' takes images \(8, 8, 1\)"):
        digits.Digits().check(DataSpec((32, 32, 3)))


def test_pixels_are_the_data():
    x = np.arange(24, dtype=np.float32).reshape(2, 2, 2, 3)
    network = pixels.Pixels().load(ROOM)
    found = network.apply(network.params, network.prepare(x))
    np.testing.assert_array_equal(found["features"], x.reshape(2, 12))
    with pytest.raises(ValueError, match="at most 8192 numbers"):
        pixels.Pixels().check(DataSpec((64, 64, 3)))


def test_quantisation_rounds_to_the_nearest_and_clips():
    x = np.float32([-1.2, -1.0, -0.999, 0.0, 1 / 127.5, 1.0, 1.5])
    np.testing.assert_array_equal(base.to_uint8(x), [0, 0, 0, 128, 128, 255, 255])
    every = np.arange(256, dtype=np.uint8)
    scaled = (every / np.float32(127.5) - 1).astype(np.float32)
    np.testing.assert_array_equal(base.to_uint8(scaled), every)


def test_images_and_videos_are_told_apart():
    base.check_images(DataSpec((8, 8, 1)), "inception")
    base.check_images(DataSpec((4, 8, 8, 3)), "i3d", 4)
    with pytest.raises(ValueError, match="'inception' takes images"):
        base.check_images(DataSpec((8, 8, 4)), "inception")
    with pytest.raises(ValueError, match="'i3d' takes videos"):
        base.check_images(DataSpec((8, 8, 3)), "i3d", 4)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFUSIONLAB_CACHE", str(tmp_path))
    assert base.cache_folder() == tmp_path
    monkeypatch.delenv("DIFFUSIONLAB_CACHE")
    assert base.cache_folder().parts[-2:] == (".cache", "diffusionlab")
