"""A folder of images becomes a labelled source; damaged images are named."""

import logging
import os

import numpy as np
import pytest
from PIL import Image

from diffusionlab.data import image_folder, images
from diffusionlab.evals import arrays
from diffusionlab.types import DataSpec


def save(path, value, shape=(6, 8, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    for label, value in (("dog", 200), ("cat", 100)):
        for i in range(10):
            save(tmp_path / label / f"{i}.png", value)
    save(tmp_path / "dog" / "deep" / "gray.png", 200, (9, 9))
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def damage(folder):
    path = folder / "dog" / "deep" / "gray.png"
    path.write_bytes(path.read_bytes()[:-20])
    return path


def options(folder, **changes):
    return {"path": str(folder), "size": 4, "test_fraction": 0.3, **changes}


def both(folder, **changes):
    return [
        image_folder.ImageFolder(**options(folder, split=split, **changes))
        for split in ("train", "test")
    ]


def test_classes_are_the_sorted_sub_folders(folder):
    train, test = both(folder)
    assert train.spec == test.spec == DataSpec((4, 4, 3), 2, ("cat", "dog"))
    assert len(train) + len(test) == 21 and len(test) > 0
    for source in (train, test):
        batch = arrays.spread(source, len(source))
        value = np.where(batch["label"] == 0, 100, 200) / 127.5 - 1
        np.testing.assert_allclose(batch["x"][:, 3, 0, 2], value, rtol=1e-6)


def test_an_image_stays_in_its_split_when_others_are_added(folder):
    before = set(both(folder)[1]._files)
    for i in range(10, 20):
        save(folder / "cat" / f"{i}.png", 100)
    after = both(folder)[1]._files
    added = {f"cat/{i}.png" for i in range(10, 20)}
    assert set(after) - added == before


def test_two_images_make_two_splits(tmp_path):
    for i in range(2):
        save(tmp_path / f"{i}.jpg", 0)
    train, test = both(tmp_path)
    assert (len(train), len(test)) == (1, 1)
    assert train.spec.num_classes == 0 and train[0].keys() == {"x"}


def test_the_central_square_is_averaged_over_areas(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:2, 2:4] = 200
    pixels[:, :2] = pixels[:, 6:] = 255
    for i in range(2):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    source = image_folder.ImageFolder(path=str(tmp_path), size=2)
    x = (source[0]["x"][..., 0] + 1) * 127.5
    np.testing.assert_allclose(x, [[200, 0], [0, 0]], atol=1e-4)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_an_image_that_is_cut_short_or_is_none_is_named(tmp_path, suffix):
    path = tmp_path / f"image{suffix}"
    save(path, 50, (64, 64, 3))
    images.check(str(path))
    for content in (path.read_bytes()[:-20], b"no image", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read the image {path}: "):
            images.check(str(path))


def test_a_damaged_image_is_named(folder):
    path = damage(folder)
    with pytest.raises(ValueError, match=f"path: cannot read the image {path}: "):
        both(folder)


def test_damaged_images_are_skipped_counted_and_named(folder, caplog):
    path = damage(folder)
    with caplog.at_level(logging.WARNING):
        train, test = both(folder, on_error="skip")
    assert train.skipped + test.skipped == (str(path),)
    assert len(train) + len(test) == 20
    assert "skipped 1 of" in caplog.text and str(path) in caplog.text


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; expected a"):
        both("nowhere")
    with pytest.raises(FileNotFoundError, match="0 images found; expected a folder"):
        both(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="cat is a class without images"):
        both(tmp_path)
    save(tmp_path / "loose.png", 0)
    with pytest.raises(ValueError, match="both images .* and sub-folders"):
        both(tmp_path)


def test_version_changes_with_the_files_of_the_split_alone(folder):
    def versions():
        return [source.version for source in both(folder)]

    train, test = versions()
    assert train != test and "" not in (train, test) and versions() == [train, test]
    path = folder / both(folder)[0]._files[0]
    content, time = path.read_bytes(), path.stat().st_mtime_ns
    os.utime(path, ns=(0, time + 1))
    assert versions()[0] != train and versions()[1] == test
    path.write_bytes(content + b"0")
    os.utime(path, ns=(0, time))
    assert versions()[0] != train
    path.write_bytes(content)
    os.utime(path, ns=(0, time))
    assert versions() == [train, test]
    folder = folder.rename(folder.with_name("moved"))
    assert versions() == [train, test]


def test_wrong_options_are_refused(folder):
    for change in ({"size": 0}, {"on_error": "ignore"}, {"test_fraction": 1.0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            image_folder.ImageFolder(**options(folder, **change))
