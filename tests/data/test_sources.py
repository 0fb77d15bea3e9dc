"""Every registered source obeys the protocol; the small ones hold what they should."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffusionlab import registry, types
from diffusionlab.data import REGISTRY, array_record, base, sources
from diffusionlab.evals import arrays


def make_npz(folder):
    path = folder / "data.npz"
    x = np.arange(20 * 2 * 2 * 3, dtype=np.uint8).reshape(20, 2, 2, 3)
    np.savez(path, x=x, label=np.arange(20) % 4)
    return {"path": str(path)}


def make_images(folder):
    for label in ("cat", "dog"):
        (folder / label).mkdir()
        for i in range(4):
            pixels = np.full((5, 6, 3), 20 * i, np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return {"path": str(folder), "size": 4}


def make_array_record(folder):
    spec = types.DataSpec((2, 2, 1), 3, ("a", "b", "c"))
    examples = [
        {"x": np.full((2, 2, 1), i, np.uint8), "label": i % 3} for i in range(7)
    ]
    array_record.write_array_record(folder, "train", examples, spec, shard_size=3)
    array_record.write_array_record(folder, "test", examples[:3], spec)
    return {"path": str(folder)}


def make_text(folder):
    (folder / "a.txt").write_text("a text of some words, held out at its end. " * 9)
    return {"path": str(folder), "length": 8}


MAKE = {
    "array_record": make_array_record,
    "digits": lambda folder: {},
    "generated": lambda folder: {"shape": (8, 8, 3), "size": 32},
    "image_folder": make_images,
    "mixture": lambda folder: {"size": 100},
    "npz": make_npz,
    "photos": lambda folder: {},
    "text": make_text,
}


@pytest.fixture
def make(make_tfds):
    return {**MAKE, "tfds": make_tfds}


@pytest.mark.parametrize("name", sorted(REGISTRY["source"]))
def test_a_source_obeys_the_protocol(name, make, tmp_path):
    block = {"name": name, **make[name](tmp_path)}
    for split in ("train", "test"):
        source = registry.build("source", {**block, "split": split}, "config.source")
        hash(source)
        spec = source.spec
        assert source.spec.num_classes == len(spec.class_names)
        assert len(source) > 0
        batch = arrays.spread(source, 6)
        assert batch["x"].dtype == (np.int32 if spec.num_tokens else np.float32)
        assert batch["x"].shape[1:] == spec.shape
        if spec.num_tokens:
            assert 0 <= batch["x"].min() <= batch["x"].max() < spec.num_tokens
        # Text has no classes.
        label = batch.get("label", np.zeros(len(batch["x"]), np.int32))
        assert label.dtype == np.int32
        if len(spec.shape) == 3:
            assert np.abs(batch["x"]).max() <= 1
        if spec.num_classes:
            assert np.all((label >= 0) & (label < spec.num_classes))
        rows = np.arange(len(batch["x"])) * len(source) // len(batch["x"])
        again = dataclasses.replace(source)
        for row, index in enumerate(rows):
            one = again[int(index)]
            np.testing.assert_array_equal(one["x"], batch["x"][row])
            assert one.get("label", 0) == label[row]
    with pytest.raises(ValueError, match="split: expected 'train' or 'test'"):
        dataclasses.replace(source, split="valid")


def test_digits_hold_out_a_fifth_of_every_class():
    train, test = (sources.Digits(split=split) for split in ("train", "test"))
    assert len(train) + len(test) == 1797
    for label in range(10):
        counts = [
            np.sum(arrays.spread(s, len(s))["label"] == label) for s in (train, test)
        ]
        assert counts[1] / sum(counts) == pytest.approx(0.2, abs=0.01)
    assert not {x.tobytes() for x in train._x} & {x.tobytes() for x in test._x}


def test_photos_are_crops_on_the_grid_and_splits_do_not_overlap():
    from sklearn import datasets

    china, flower = datasets.load_sample_images().images
    train = sources.Photos(size=16, stride=8)
    first, second, last = train[0], train[1], train[len(train) - 1]
    np.testing.assert_array_equal(first["x"], base.unit(china[:16, :16]))
    np.testing.assert_array_equal(second["x"], base.unit(china[:16, 8:24]))
    np.testing.assert_array_equal(last["x"], base.unit(flower[408:424, 496:512]))
    assert (first["label"], last["label"]) == (0, 1)
    test = sources.Photos(size=16, stride=8, split="test")
    np.testing.assert_array_equal(test[0]["x"], base.unit(china[:16, 512:528]))
    with pytest.raises(ValueError, match="size: .* 1 to 128 pixels, got 129"):
        sources.Photos(size=129, split="test")


def test_npz_scales_bytes_takes_floats_and_holds_out_the_end(tmp_path):
    path = make_npz(tmp_path)["path"]
    train, test = sources.Npz(path=path), sources.Npz(path=path, split="test")
    assert (len(train), len(test)) == (18, 2)
    assert train[0]["x"][0, 0, 0] == -1 and train[0]["x"].dtype == np.float32
    assert test[1]["label"] == 3 and test.spec.num_classes == 4
    floats = tmp_path / "floats.npz"
    np.savez(floats, x=np.full((4, 3), 7.5))
    source = sources.Npz(path=str(floats))
    assert source[0].keys() == {"x"} and source.spec == types.DataSpec((3,))
    assert np.all(source[0]["x"] == 7.5)
    both = sources.Npz(path=str(floats), test_path=str(floats), split="test")
    assert len(both) == 4
    with pytest.raises(ValueError, match="test_path: 'x' of .*floats.npz has examples"):
        sources.Npz(path=path, test_path=str(floats))


def test_npz_names_what_is_wrong(tmp_path):
    path = tmp_path / "data.npz"
    with pytest.raises(FileNotFoundError, match="data.npz: no such file; path is an"):
        sources.Npz(path=str(path))
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="path: cannot read .*data.npz"):
        sources.Npz(path=str(path))
    for wrong, message in [
        ({"images": np.zeros((2, 2))}, "no array 'x'; it has images"),
        ({"x": np.zeros((2, 2), np.int32)}, "is int32, not uint8 or float"),
        ({"x": np.zeros(3)}, r"has shape \(3,\)"),
        ({"x": np.zeros((3, 2)), "label": np.zeros(2, int)}, r"not integers \[3\]"),
        ({"x": np.zeros((1, 2)), "label": np.asarray([-1])}, "negative"),
        ({"x": np.zeros((1, 2))}, "too few"),
    ]:
        np.savez(path, **wrong)
        with pytest.raises(ValueError, match=message):
            sources.Npz(path=str(path))


SCRIPT = """
import sys
from diffusionlab import data
assert "jax" not in sys.modules
from diffusionlab import registry
from diffusionlab.data import base, pipeline
blocks = {blocks!r}
for name, block in blocks.items():
    source = registry.build("source", dict(block, name=name), "config.source")
    next(pipeline.Batches(source, batch_size=2, seed=0))
assert "tensorflow" not in sys.modules
"""


def test_reading_never_imports_tensorflow_where_it_is_installed(make, tmp_path):
    (tmp_path / "installed" / "tensorflow").mkdir(parents=True)
    (tmp_path / "installed" / "tensorflow" / "__init__.py").touch()
    blocks = {}
    for name in REGISTRY["source"]:
        (tmp_path / name).mkdir()
        blocks[name] = make[name](tmp_path / name)
    paths = [str(tmp_path / "installed"), *filter(None, sys.path)]
    subprocess.run(
        [sys.executable, "-c", SCRIPT.format(blocks=blocks)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        check=True,
    )
