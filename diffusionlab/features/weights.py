"""Files of weights: to arrays by name, and to a network's own arrays, kept in a cache.

A file is known by its ending: .safetensors, .npz, .pth, .pt or .bin (torch), .pb
(TensorFlow). What it is is told by the SHA-256 of its bytes, computed whenever it is
read, so that a file that has changed is never taken for the old one.

Every error is one line that begins with the field of the config that named the file.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import uuid
import zipfile
import zlib
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from diffusionlab.features import graph_def, torch_file

Arrays = dict[str, np.ndarray]


def check_file(path: str, field: str = "path", origin: str = "") -> None:
    """Raises where there is no such file, or its ending is not known.

    `origin` is a sentence that says where such files usually come from.

    Raises:
      FileNotFoundError: there is no file.
      ValueError: the path is empty, or ends otherwise.
    """
    origin = f" {origin}" if origin else ""
    if not path:
        raise ValueError(f"{field}: name a local file of weights.{origin}")
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{field}: there is no file {path}.{origin}")
    if pathlib.Path(path).suffix not in _READERS:
        raise ValueError(
            f"{field}: {path} does not end in one of {', '.join(_READERS)}.{origin}"
        )


def sha256(path: str) -> str:
    """Returns the SHA-256 of the bytes of a file, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: str, field: str = "path", origin: str = "") -> tuple[Arrays, str]:
    """Returns the arrays of a file by name, and its SHA-256.

    bfloat16 comes as float32, which holds it exactly; other types as they are stored.

    Raises:
      FileNotFoundError, ValueError: see `check_file`; or the file is damaged, or is
        not what its ending says.
    """
    check_file(path, field, origin)
    try:
        arrays = _READERS[pathlib.Path(path).suffix](pathlib.Path(path))
    except ValueError as error:
        raise ValueError(f"{field}: {path} cannot be read: {error}.") from error
    if not arrays:
        raise ValueError(f"{field}: {path} cannot be read: it holds no arrays.")
    return {name: _standard(array) for name, array in arrays.items()}, sha256(path)


def converted(
    path: str,
    field: str,
    convert: Callable[[Arrays], Mapping[str, np.ndarray]],
    version: str,
    cache: pathlib.Path,
    origin: str = "",
) -> tuple[Arrays, str]:
    """Returns `convert(arrays)` of a file, computed once, and the file's SHA-256.

    What was computed is kept as `<sha256>-<version>.npz` in the folder `cache`; a
    damaged one is made anew.

    Args:
      path: the file of weights.
      field: of the config that named it.
      convert: from arrays by name to arrays by name; a KeyError or ValueError of it
        becomes one line.
      version: of the conversion, with the name of the network: 'inception-1'.
      cache: a folder, made when it is not there.
      origin: see `check_file`.

    Raises:
      FileNotFoundError, ValueError: see `read`; or these are no weights of the network.
    """
    check_file(path, field, origin)
    digest = sha256(path)
    kept = pathlib.Path(cache) / f"{digest}-{version}.npz"
    if kept.is_file():
        try:
            return _read_npz(kept), digest
        except ValueError:
            pass  # cut short by a full disk, say; written over below
    arrays, _ = read(path, field, origin)
    try:
        params = dict(convert(arrays))
    except KeyError as error:
        problem = f"there is no array {error} among its {len(arrays)}"
        raise ValueError(_foreign(field, path, problem, origin)) from error
    except ValueError as error:
        raise ValueError(_foreign(field, path, str(error), origin)) from error
    _write_npz(kept, params)
    return params, digest


def _foreign(field: str, path: str, problem: str, origin: str) -> str:
    origin = f" {origin}" if origin else ""
    text = f"{field}: {path} has no weights of this network: {problem.rstrip('.')}."
    return text + origin


def _standard(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array


def _read_safetensors(path: pathlib.Path) -> Arrays:
    import safetensors
    from safetensors import numpy as safetensors_numpy

    try:
        return safetensors_numpy.load_file(path)
    except safetensors.SafetensorError as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"not a safetensors file, or damaged ({reason})") from None


def _read_npz(path: pathlib.Path) -> Arrays:
    try:
        # `load` would also take a single array, .npy.
        with open(path, "rb") as file, np.lib.npyio.NpzFile(file) as arrays:
            return dict(arrays)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
        raise ValueError("not an .npz file of plain arrays, or damaged") from None


def _write_npz(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a file whole: others see the old one, or none, until it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "xb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


_READERS: dict[str, Callable[[pathlib.Path], Arrays]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pth": torch_file.read,
    ".pt": torch_file.read,
    ".bin": torch_file.read,
    ".pb": graph_def.read,
}
