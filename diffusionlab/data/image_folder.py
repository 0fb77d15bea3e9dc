"""A folder of a user's images, one sub-folder per class."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import pathlib
from concurrent import futures

import numpy as np

from diffusionlab import types
from diffusionlab.data import base, images

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Images below `path`, cropped to the central square and scaled, in RGB.

    The classes are the sub-folders of `path`, sorted; images may lie deeper in them.
    Without sub-folders, the images of `path` itself are read, without labels. Other
    files and hidden folders are ignored. Every image of the split is decoded once at
    construction, which takes about as long as one epoch, so that a damaged one is
    found before training; `skipped` has the paths of those left out.

    Attributes:
      path: the folder.
      size: of an image, in pixels.
      split: 'train' or 'test'.
      test_fraction: of the images, chosen by a hash of the path below `path`, so that
        an image stays in its split when others are added. Both splits get at least one.
      on_error: 'raise' ends with the first damaged image, 'skip' leaves them out.
    """

    path: str
    size: int
    split: str = "train"
    test_fraction: float = 0.1
    on_error: str = "raise"

    def __post_init__(self):
        base.check_split(self.split)
        base.check_fraction(self.test_fraction)
        if self.size < 1:
            raise ValueError(f"size: must be at least 1, got {self.size}.")
        if self.on_error not in ("raise", "skip"):
            raise ValueError(
                f"on_error: expected 'raise' or 'skip', got {self.on_error!r}."
            )
        classes, files = _scan(pathlib.Path(self.path))
        members = _members(files, self.split, self.test_fraction)
        good, skipped = self._check(members)
        object.__setattr__(self, "_classes", classes)
        object.__setattr__(self, "_files", good)
        object.__setattr__(self, "skipped", skipped)

    def _check(self, files: list[str]) -> tuple[list[str], tuple[str, ...]]:
        """Returns the images that can be decoded, and the full paths of the others."""
        errors = {}
        with futures.ThreadPoolExecutor() as pool:
            for file, error in zip(files, pool.map(self._error, files), strict=True):
                if error and self.on_error == "raise":
                    pool.shutdown(cancel_futures=True)
                    raise ValueError(f"path: {error}; on_error='skip' leaves it out.")
                if error:
                    errors[file] = error
        good = [file for file in files if file not in errors]
        if errors:
            logging.getLogger(__name__).warning(
                "%s: skipped %d of %d images of split '%s':\n%s",
                self.path,
                len(errors),
                len(files),
                self.split,
                "\n".join(errors.values()),
            )
        if not good:
            raise ValueError(
                f"path: no image of {self.path} in split '{self.split}' can be read."
            )
        return good, tuple(self._full(file) for file in errors)

    def _full(self, file: str) -> str:
        return str(pathlib.Path(self.path).absolute() / file)

    def _error(self, file: str) -> str | None:
        try:
            images.check(self._full(file))
        except ValueError as error:
            return str(error)
        return None

    @property
    def spec(self) -> types.DataSpec:
        shape = (self.size, self.size, 3)
        return types.DataSpec(shape, len(self._classes), self._classes)

    @property
    def version(self) -> str:
        """Changes with the files of the split, as the directory describes them."""
        root = pathlib.Path(self.path)
        return base.files_version(root, [root / file for file in self._files])

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> base.Example:
        file = self._files[index]
        example = {"x": base.unit(images.read(self._full(file), self.size))}
        if self._classes:
            label = self._classes.index(file.split("/")[0])
            example["label"] = np.int32(label)
        return example


def _is_image(path: pathlib.Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _scan(root: pathlib.Path) -> tuple[tuple[str, ...], list[str]]:
    """Returns the classes, and the sorted image paths relative to `root`."""
    expected = (
        f"expected a folder with one sub-folder of images per class "
        f"({', '.join(suffix[1:] for suffix in SUFFIXES)}), or with images"
    )
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; {expected}.")
    folders = sorted(
        item for item in root.iterdir() if item.is_dir() and item.name[0] != "."
    )
    loose = [item for item in root.iterdir() if item.is_file() and _is_image(item)]
    if folders and loose:
        raise ValueError(
            f"path: {root} has both images ({loose[0].name}) and sub-folders "
            f"({folders[0].name}); {expected}."
        )
    found = loose
    for folder in folders:
        inside = [item for item in folder.rglob("*") if _is_image(item)]
        if not inside:
            raise ValueError(f"path: {folder} is a class without images.")
        found += inside
    if len(found) < 2:
        raise FileNotFoundError(f"{root}: {len(found)} images found; {expected}.")
    files = sorted(item.relative_to(root).as_posix() for item in found)
    return tuple(folder.name for folder in folders), files


def _members(files: list[str], split: str, test_fraction: float) -> list[str]:
    """Returns the files of a split, in order."""
    ranks = {
        file: int.from_bytes(hashlib.sha256(file.encode()).digest()[:8]) / 2**64
        for file in files
    }
    test = {file for file in files if ranks[file] < test_fraction}
    test.add(min(files, key=ranks.get))
    if len(test) == len(files):
        test.remove(max(files, key=ranks.get))
    return [file for file in files if (file in test) == (split == "test")]
