"""Examples in a file or folder that any program may have written.

Nothing is cropped, resized or guessed: what does not say clearly how its numbers are to
be read is refused with a line that says how to write it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from concurrent import futures

import numpy as np

from diffusionlab import types
from diffusionlab.data import array_files, base, image_folder, images

_TOLERANCE = 1e-3  # by which floats may leave [-1, 1]: of rounding, or half precision
_BLOCK_BYTES = 2**24
_FIRST_BYTES = 2**18  # at a time, where the first of them mostly tell
_PAIRS = {"x": "label", "arr_0": "arr_1", "": None}
_GREY, _COLOUR = ("1", "L"), ("RGB", "P")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleFiles:
    """The examples of an .npz or .npy file, or of a folder of images.

    An .npz file has the array `x` or `arr_0`, `[N, H, W, 1 or 3]` images,
    `[N, T, H, W, 1 or 3]` videos or `[N, D]` points, and may have the integers `label`
    or `arr_1`, `[N]`. uint8 is [0, 255]; floats of images and videos are in [-1, 1].
    The array `range` may say that black and white of floats are other numbers, or that
    they are -1 and 1 although some go beyond, which stay as they are, or although none
    is dark enough to show it.

    A folder has images of one size in it and in all folders below it, in the order of
    their paths; where all lie in two or more sub-folders, those are the classes. Pixels
    are taken as they are stored: orientation tags are not heeded. Images are grey if
    all of them are.

    Examples are read when they are asked for, but floats are looked through once, and
    uint8 up to the first value that is neither 0 nor 1.

    Attributes:
      path: of the file or folder.
      version: set here from the contents as the directory entries describe them: it
        changes with them. What is given is not used.
    """

    path: str
    version: str = ""

    def __post_init__(self):
        path = pathlib.Path(self.path)
        if path.is_dir():
            found = _Folder(path)
        elif not path.exists():
            raise FileNotFoundError(f"path: there is no file or folder '{path}'.")
        elif path.suffix in (".npz", ".npy"):
            found = _File(path)
        else:
            raise ValueError(
                f"path: '{path}' is no .npz or .npy file and no folder of images."
            )
        object.__setattr__(self, "_found", found)
        object.__setattr__(self, "version", found.version)

    @property
    def spec(self) -> types.DataSpec:
        return self._found.spec

    def __len__(self) -> int:
        return self._found.num

    def __getitem__(self, index: int) -> base.Example:
        batch = self.__getitems__([index])
        return {key: value[0] for key, value in batch.items()}

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> base.Example:
        indices = np.asarray(indices)
        example = {"x": self._found.read(indices)}
        if self._found.label is not None:
            example["label"] = self._found.label[indices]
        return example


class _File:
    """An .npz or .npy file."""

    def __init__(self, path: pathlib.Path):
        try:
            members = array_files.members(path)
            name = next((name for name in _PAIRS if name in members), None)
            if name is None:
                raise ValueError(_no_examples(path, members))
            self._x = array_files.open_array(path, name)
            _check_array(self._x, name, path)
            kept = _PAIRS[name] if _PAIRS[name] in members else None
            self.label = None
            if kept:
                label = array_files.open_array(path, kept)
                self.label = _checked_label(label, kept, len(self._x), path)
            self._range = _checked_range(path, members, self._x)
            _check_values(self._x, path, self._range is not None)
        except ValueError as error:
            raise ValueError(f"path: {error}") from None
        used = [n for n in (name, kept, "range") if n in members]
        self.version = base.short_hash([(n, members[n]) for n in used])
        self.num = len(self._x)
        classes = 0 if self.label is None else int(self.label.max()) + 1
        self.spec = types.DataSpec(tuple(self._x.shape[1:]), classes)

    def read(self, indices: np.ndarray) -> np.ndarray:
        x = base.unit(np.asarray(self._x[indices]))
        if self._range not in (None, (-1.0, 1.0)):
            low, high = self._range
            x = (x - low) * (2 / (high - low)) - 1
        return x.astype(np.float32)


def _no_examples(path: pathlib.Path, members) -> str:
    there = ", ".join(sorted(members)) or "nothing"
    if {"mu", "sigma"} <= set(members):
        there += "; these are statistics, which can be a reference only"
    return f"{path} has no array 'x' or 'arr_0'; it has {there}."


def _checked_label(label, name: str, num: int, path: pathlib.Path) -> np.ndarray:
    if label.shape != (num,) or not np.issubdtype(label.dtype, np.integer):
        raise ValueError(
            f"'{name}' of {path} is {label.dtype}{list(label.shape)}, not integers "
            f"[{num}]: the class of every example."
        )
    label = np.asarray(label[:])
    if num and label.min() < 0:
        raise ValueError(f"'{name}' of {path} has negative classes.")
    return label.astype(np.int32)


def _checked_range(path: pathlib.Path, members, x) -> tuple[float, float] | None:
    if "range" not in members:
        return None
    found = array_files.open_array(path, "range")
    pair = (
        found[:].tolist() if found.shape == (2,) and found.dtype.kind in "fiu" else []
    )
    if not pair or not np.isfinite(pair).all() or pair[0] >= pair[1]:
        raise ValueError(
            f"'range' of {path} is {pair or 'no pair'}, expected [black, white], two "
            "increasing numbers."
        )
    if x.dtype == np.uint8:
        raise ValueError(
            f"'range' of {path} is for floats, and the examples are uint8."
        )
    return float(pair[0]), float(pair[1])


def _check_array(x, name: str, path: pathlib.Path) -> None:
    """Raises ValueError unless shape and type are those of examples."""
    what = f"'{name}' of {path}" if name else str(path)
    shape = list(x.shape)
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise ValueError(
            f"{what} is {x.dtype}; write uint8 in [0, 255], or floats in [-1, 1]."
        )
    if len(shape) == 2 and x.dtype != np.uint8 and 0 not in shape:
        return
    accepted = "[N, H, W, 1 or 3], [N, T, H, W, 1 or 3] or, of floats, [N, D]"
    if 0 in shape:
        raise ValueError(f"{what} is empty: its shape is {shape}.")
    if len(shape) not in (4, 5):
        raise ValueError(f"{what} has shape {shape}, expected {accepted}.")
    if shape[-1] in (1, 3):
        return
    for axis, place in ((1, "second"), (2, "third"))[: len(shape) - 3]:
        if shape[axis] in (1, 3):
            order = [i for i in range(len(shape)) if i != axis] + [axis]
            raise ValueError(
                f"{what} has shape {shape}: its channels come {place}, and last "
                f"here; write x.transpose({', '.join(map(str, order))})."
            )
    raise ValueError(
        f"{what} has {shape[-1]} channels (shape {shape}), expected {accepted}."
    )


def _blocks(x, num_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (index of the first row, `[R, values of a row]`) of about that size."""
    size = int(np.prod(x.shape[1:]))
    rows = max(1, num_bytes // (x.dtype.itemsize * size))
    for start in range(0, len(x), rows):
        yield start, np.asarray(x[start : start + rows]).reshape(-1, size)


def _check_values(x, path: pathlib.Path, has_range: bool) -> None:
    """Raises ValueError for values that are not finite, or not clearly of the range."""
    if x.dtype == np.uint8:
        if not any(block.max() > 1 for _, block in _blocks(x, _FIRST_BYTES)):
            raise ValueError(
                f"the pixels in {path} are uint8 and none is above 1, and white is "
                "255; of pixels that are 0 or 1 write 255 * x."
            )
        return
    low, high, bad, first = np.inf, -np.inf, 0, 0
    for start, block in _blocks(x, _BLOCK_BYTES):
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            first = first if bad else start + int(np.argmin(finite))
            bad += int(np.sum(~finite))
            block = block[finite]
        low = min(low, float(block.min(initial=np.inf)))
        high = max(high, float(block.max(initial=-np.inf)))
    if bad:
        raise ValueError(
            f"{bad} of the {len(x)} examples in {path} have values that are NaN "
            f"or infinite, the first is example {first}; leave them out."
        )
    if len(x.shape) == 2 or has_range:  # points may lie anywhere
        return
    lie = f"the values in {path} lie in [{low:.4g}, {high:.4g}]"
    if low < -1 - _TOLERANCE or high > 1 + _TOLERANCE:
        raise ValueError(
            f"{lie}, and floats have to be in [-1, 1]; of pixels in [0, 255] write "
            "x.round().astype('uint8'), and of others the array range=[black, white] "
            "beside them."
        )
    # What a filter or a network wrote in [0, 1] may go below 0, so one negative value
    # does not make it [-1, 1].
    from_zero = low >= -_TOLERANCE and low < high
    if from_zero or (low > -0.5 and high > 0.5):
        raise ValueError(
            f"{lie}, so black may be 0 or -1; write the array range=[0, 1] or [-1, 1] "
            "beside them, or uint8: of pixels in [0, 1] (255 * x.clip(0, 1)).round()"
            ".astype('uint8')."
        )


class _Folder:
    """A folder of images."""

    def __init__(self, root: pathlib.Path):
        files = sorted(
            (path.relative_to(root).as_posix(), path)
            for path in root.rglob("*")
            if path.suffix.lower() in image_folder.SUFFIXES
            and not any(part[0] == "." for part in path.relative_to(root).parts)
        )
        if not files:
            raise FileNotFoundError(
                f"path: the folder {root} has no images; looked for "
                f"{', '.join(suffix[1:] for suffix in image_folder.SUFFIXES)}."
            )
        self._paths = [path for _, path in files]
        self.num = len(files)
        shape = _common_shape(self._paths)
        self._mode = "L" if shape[-1] == 1 else "RGB"
        tops = [name.split("/")[0] if "/" in name else "" for name, _ in files]
        classes = tuple(sorted(set(tops)))
        self.label = None
        if "" in classes or len(classes) < 2:
            classes = ()
        else:
            self.label = np.asarray([classes.index(top) for top in tops], np.int32)
        self.spec = types.DataSpec(shape, len(classes), classes)
        self.version = base.files_version(root, self._paths)

    def read(self, indices: np.ndarray) -> np.ndarray:
        with futures.ThreadPoolExecutor() as pool:
            found = list(pool.map(self._decode, indices.tolist()))
        return base.unit(np.stack(found).reshape(len(found), *self.spec.shape))

    def _decode(self, index: int) -> np.ndarray:
        from PIL import Image

        path = self._paths[index]
        with images._naming(str(path)), Image.open(path) as image:
            return np.asarray(image.convert(self._mode))


def _common_shape(paths: list[pathlib.Path]) -> tuple[int, int, int]:
    """Returns (height, width, channels) of images that all have one size.

    Raises:
      ValueError: names the first that differs, or that is neither grey nor RGB.
    """
    with futures.ThreadPoolExecutor() as pool:
        found = list(pool.map(_size_and_mode, paths))
    width, height = found[0][0]
    for path, (size, mode) in zip(paths, found, strict=True):
        if size != (width, height):
            raise ValueError(
                f"path: {path} has {size[0]} x {size[1]} pixels, and {paths[0]} "
                f"{width} x {height}: all need one size; nothing is resized here."
            )
        if mode not in (*_GREY, *_COLOUR):
            raise ValueError(
                f"path: {path} is an image of the kind {mode}, expected 8-bit grey or "
                "RGB without transparency."
            )
    grey = all(mode in _GREY for _, mode in found)
    return height, width, 1 if grey else 3


def _size_and_mode(path: pathlib.Path) -> tuple[tuple[int, int], str]:
    from PIL import Image

    with images._naming(str(path)), Image.open(path) as image:
        clear = "transparency" in image.info
        return image.size, f"{image.mode} with transparency" if clear else image.mode
