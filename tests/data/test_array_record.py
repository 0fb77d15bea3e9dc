"""Shards are written and read without TensorFlow, and an incomplete folder is found."""

import os

import numpy as np
import pytest

from diffusionlab import types
from diffusionlab.data import array_record

SPEC = types.DataSpec((2, 3, 1), 2, ("a", "b"))


def examples(num):
    for i in range(num):
        yield {"x": np.full((2, 3, 1), 50 * i, np.uint8), "label": i % 2}


@pytest.fixture
def folder(tmp_path):
    array_record.write_array_record(tmp_path, "train", examples(5), SPEC, shard_size=2)
    return tmp_path


def test_a_record_gives_back_its_arrays():
    example = {"x": np.random.default_rng(0).random((2, 3)), "label": np.int32(4)}
    again = array_record.decode(array_record.encode(example))
    for name, value in example.items():
        np.testing.assert_array_equal(again[name], value)
        assert again[name].dtype == value.dtype


def test_examples_keep_their_order_over_shards(folder):
    assert len(list((folder / "train").iterdir())) == 3
    source = array_record.ArrayRecord(path=str(folder))
    assert source.spec == SPEC and len(source) == 5
    batch = source.__getitems__([4, 0, 3])
    np.testing.assert_allclose(
        batch["x"][:, 0, 0, 0], [200 / 127.5 - 1, -1, 3 / 17], rtol=1e-6
    )
    assert batch["label"].tolist() == [0, 0, 1]


def test_floats_without_labels_are_taken_as_they_are(tmp_path):
    spec = types.DataSpec((2,))
    rows = [{"x": np.asarray([7.0, i], np.float32)} for i in range(2)]
    array_record.write_array_record(tmp_path, "train", rows, spec)
    source = array_record.ArrayRecord(path=str(tmp_path))
    assert source[1].keys() == {"x"} and source[1]["x"].tolist() == [7, 1]


@pytest.mark.parametrize(
    "example, message",
    [
        ({"x": np.zeros((2, 3, 1), np.uint8)}, r"number 0 has \['x'\], not"),
        ({"x": np.zeros((2, 3), np.uint8), "label": 0}, r"uint8\[2, 3\]"),
        ({"x": np.zeros((2, 3, 1), np.uint8), "label": 2}, "'label' .* is 2"),
    ],
)
def test_an_example_that_does_not_fit_is_refused(tmp_path, example, message):
    with pytest.raises(ValueError, match=message):
        array_record.write_array_record(tmp_path, "train", [example], SPEC)


def test_a_split_is_not_written_twice_nor_with_another_spec(folder):
    with pytest.raises(FileExistsError, match="train: not empty"):
        array_record.write_array_record(folder, "train", examples(1), SPEC)
    with pytest.raises(ValueError, match="spec: "):
        array_record.write_array_record(
            folder, "test", examples(1), SPEC._replace(class_names=("c", "d"))
        )


def test_version_changes_with_the_shards(folder):
    version = array_record.ArrayRecord(path=str(folder)).version
    assert array_record.ArrayRecord(path=str(folder)).version == version != ""
    shard = folder / "train" / "00002.array_record"
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    assert array_record.ArrayRecord(path=str(folder)).version != version


def test_a_missing_or_incomplete_folder_is_named(folder):
    with pytest.raises(FileNotFoundError, match="nowhere.*spec.json: no such file"):
        array_record.ArrayRecord(path="nowhere")
    with pytest.raises(FileNotFoundError, match="no finished shards of split 'test'"):
        array_record.ArrayRecord(path=str(folder), split="test")
    (folder / "train" / "00001.array_record").unlink()
    with pytest.raises(FileNotFoundError, match="has 3 examples in 2 shards.* says 5"):
        array_record.ArrayRecord(path=str(folder))
