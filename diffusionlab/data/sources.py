"""Sources that fit in memory: scikit-learn's digits and photographs, and .npz files."""

from __future__ import annotations

import dataclasses
import pathlib
import zipfile

import numpy as np

from diffusionlab import types
from diffusionlab.data import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits:
    """The 1797 handwritten digits of scikit-learn: `[8, 8, 1]`, ten classes.

    The held-out examples of every class are spread evenly over its examples, and are
    always the same.

    Attributes:
      split: 'train' or 'test'.
      test_fraction: of every class.
    """

    split: str = "train"
    test_fraction: float = 0.2

    def __post_init__(self):
        base.check_split(self.split)
        base.check_fraction(self.test_fraction)
        from sklearn import datasets

        digits = datasets.load_digits()
        test = np.zeros(len(digits.target), bool)
        for label in range(10):
            (members,) = np.nonzero(digits.target == label)
            count = np.floor(np.arange(len(members) + 1) * self.test_fraction)
            test[members] = np.diff(count) > 0
        keep = test if self.split == "test" else ~test
        x = (digits.images[keep, :, :, None] / 8 - 1).astype(np.float32)
        object.__setattr__(self, "_x", x)
        object.__setattr__(self, "_label", digits.target[keep].astype(np.int32))

    @property
    def spec(self) -> types.DataSpec:
        return types.DataSpec((8, 8, 1), 10, tuple("0123456789"))

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, index: int) -> base.Example:
        return {"x": self._x[index], "label": self._label[index]}

    def __getitems__(self, indices) -> base.Example:
        return {"x": self._x[indices], "label": self._label[indices]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Photos:
    """Square crops of scikit-learn's two photographs, labelled by the photograph.

    The left four fifths of the columns are for training and the rest is held out; no
    crop crosses the line.

    Attributes:
      split: 'train' or 'test'.
      size: of a crop, in pixels.
      stride: between the top-left corners of crops, in pixels.
    """

    split: str = "train"
    size: int = 32
    stride: int = 4

    def __post_init__(self):
        base.check_split(self.split)
        if self.stride < 1:
            raise ValueError(f"stride: must be at least 1, got {self.stride}.")
        from sklearn import datasets

        photos = np.stack(datasets.load_sample_images().images)
        line = photos.shape[2] * 4 // 5
        photos = photos[:, :, line:] if self.split == "test" else photos[:, :, :line]
        largest = min(photos.shape[1:3])
        if not 1 <= self.size <= largest:
            raise ValueError(
                f"size: crops of split '{self.split}' have 1 to {largest} pixels, got "
                f"{self.size}."
            )
        windows = np.lib.stride_tricks.sliding_window_view(
            photos, (self.size, self.size), axis=(1, 2)
        )[:, :: self.stride, :: self.stride]
        object.__setattr__(self, "_windows", np.moveaxis(windows, 3, 5))

    @property
    def spec(self) -> types.DataSpec:
        return types.DataSpec((self.size, self.size, 3), 2, ("china", "flower"))

    def __len__(self) -> int:
        return int(np.prod(self._windows.shape[:3]))

    def __getitem__(self, index: int) -> base.Example:
        batch = self.__getitems__(np.asarray([index]))
        return {key: value[0] for key, value in batch.items()}

    def __getitems__(self, indices) -> base.Example:
        photo, row, column = np.unravel_index(indices, self._windows.shape[:3])
        x = base.unit(self._windows[photo, row, column])
        return {"x": x, "label": photo.astype(np.int32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Npz:
    """The arrays 'x' and, where present, 'label' of an .npz file.

    'x' is `[N, ...]`: uint8 is scaled to [-1, 1], floats are taken as they are.
    'label' is `[N]`, integers from 0.

    Attributes:
      path: of the .npz file.
      split: 'train' or 'test'.
      test_path: an .npz file of held-out examples; without one, the last
        `test_fraction` of `path` is held out.
      test_fraction: of the examples; not used where there is a `test_path`.
    """

    path: str
    split: str = "train"
    test_path: str | None = None
    test_fraction: float = 0.1

    def __post_init__(self):
        base.check_split(self.split)
        base.check_fraction(self.test_fraction)
        x, label = _read_npz("path", self.path)
        num_classes = 0 if label is None else int(label.max()) + 1
        if self.test_path is not None:
            held_x, held_label = _read_npz("test_path", self.test_path)
            _check_same(self, x, held_x, num_classes, held_label)
            if self.split == "test":
                x, label = held_x, held_label
        else:
            line = len(x) - max(1, round(len(x) * self.test_fraction))
            if line < 1:
                raise ValueError(f"path: {self.path} has too few examples to split.")
            part = slice(line, None) if self.split == "test" else slice(line)
            x, label = x[part], None if label is None else label[part]
        object.__setattr__(self, "_x", x)
        object.__setattr__(self, "_label", label)
        object.__setattr__(self, "_num_classes", num_classes)

    @property
    def spec(self) -> types.DataSpec:
        names = tuple(str(label) for label in range(self._num_classes))
        return types.DataSpec(self._x.shape[1:], self._num_classes, names)

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, index: int) -> base.Example:
        return self.__getitems__(index)

    def __getitems__(self, indices) -> base.Example:
        batch = {"x": base.unit(self._x[indices])}
        if self._label is not None:
            batch["label"] = self._label[indices]
        return batch


def _read_npz(field: str, path: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns x and the int32 labels of a file, or None for the labels."""
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: no such file; {field} is an .npz file with the array 'x' and "
            "optionally 'label'."
        )
    try:
        with np.load(path) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (zipfile.BadZipFile, AttributeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{field}: cannot read {path} as .npz: {error}.") from error
    if "x" not in found:
        names = ", ".join(sorted(found)) or "nothing"
        raise ValueError(f"{field}: {path} has no array 'x'; it has {names}.")
    x, label = found["x"], found.get("label")
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"{field}: 'x' of {path} is {x.dtype}, not uint8 or float.")
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"{field}: 'x' of {path} has shape {x.shape}, not [N, ...].")
    if label is None:
        return x, None
    if label.shape != x.shape[:1] or not np.issubdtype(label.dtype, np.integer):
        raise ValueError(
            f"{field}: 'label' of {path} is {label.dtype}{list(label.shape)}, not "
            f"integers [{len(x)}]."
        )
    if label.min() < 0:
        raise ValueError(f"{field}: 'label' of {path} has negative values.")
    return x, label.astype(np.int32)


def _check_same(source: Npz, x, held_x, num_classes: int, held_label) -> None:
    """Raises ValueError unless the two files hold the same kind of examples."""
    if x.shape[1:] != held_x.shape[1:]:
        raise ValueError(
            f"test_path: 'x' of {source.test_path} has examples {held_x.shape[1:]}, "
            f"that of {source.path} {x.shape[1:]}."
        )
    if (held_label is None) != (num_classes == 0):
        raise ValueError(
            f"test_path: only one of {source.path} and {source.test_path} has 'label'."
        )
    if held_label is not None and held_label.max() >= num_classes:
        raise ValueError(
            f"test_path: {source.test_path} has label {held_label.max()}; training "
            f"labels end at {num_classes - 1}."
        )
