"""A data set in the layout of tensorflow-datasets is read, or the error says how."""

import os

import numpy as np
import pytest

from diffusionlab.data import tfds
from diffusionlab.evals import arrays
from diffusionlab.types import DataSpec


@pytest.fixture(scope="module")
def arguments(make_tfds, tmp_path_factory):
    return make_tfds(tmp_path_factory.mktemp("tfds"))


def test_images_labels_and_class_names_are_read(arguments):
    train = tfds.Tfds(**arguments)
    assert train.spec == DataSpec((8, 8, 3), 2, ("cat", "dog"))
    batch = arrays.spread(train, 6)
    np.testing.assert_allclose(
        batch["x"][:, 0, 0, 0], np.arange(6) * 10 / 127.5 - 1, rtol=1e-6
    )
    assert batch["label"].tolist() == [0, 1, 0, 1, 0, 1]
    assert len(tfds.Tfds(**arguments, split="test")) == 3


def test_splits_and_keys_can_be_chosen(arguments):
    source = tfds.Tfds(
        **arguments, split="test", test_split="train[4:]", label_key=None
    )
    assert len(source) == 2 and source.spec.num_classes == 0
    assert source[0].keys() == {"x"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_key": "photo"}, "image_key: .* no feature 'photo'; it has image, la"),
        ({"image_key": "label"}, "image_key: 'label' .* is not a uint8 image"),
        ({"label_key": "image"}, "label_key: 'image' .* is not a class label"),
        ({"size": None}, "size: images of 'tiny_images' have shape .* state a size"),
        ({"train_split": "validation"}, "train_split: Unknown split 'validation'"),
        ({"dataset": "no_such_data"}, "dataset: .* knows no 'no_such_data'"),
    ],
)
def test_wrong_options_are_named(arguments, change, message):
    with pytest.raises(ValueError, match=message):
        tfds.Tfds(**{**arguments, **change})


def test_version_changes_with_the_prepared_files(arguments):
    source = tfds.Tfds(**arguments)
    version = source.version
    assert tfds.Tfds(**arguments).version == version != ""
    shard = next(source._folder.glob("*.array_record*"))
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    assert source.version != version


def test_a_data_set_that_is_not_prepared_says_how_to_prepare_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        tfds.Tfds(dataset="cifar10", data_dir=str(tmp_path))
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path / "cifar10") in message
    assert "pip install 'diffusionlab[tf]'" in message
    code = message.split('python -c "')[1].split('"')[0]
    compile(code, "message", "exec")
    assert f"'cifar10', data_dir='{tmp_path}', file_format='array_record'" in code


def test_a_data_set_in_another_format_asks_for_another_folder(make_tfds, tmp_path):
    arguments = make_tfds(tmp_path)
    info = tmp_path / "tiny_images" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(FileNotFoundError, match="only as tfrecord; choose another"):
        tfds.Tfds(**arguments)
