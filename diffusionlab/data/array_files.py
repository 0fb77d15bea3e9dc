"""Arrays in .npy and .npz files, read row by row instead of whole.

A member of an .npz file that is stored as it is (`np.savez`) is mapped into memory in
place, which `np.load` does for .npy files only. A compressed one
(`np.savez_compressed`) is decompressed as it is read, from its beginning to the last
row asked for.
"""

from __future__ import annotations

import math
import pathlib
import struct
import threading
import zipfile
import zlib
from typing import Any, NamedTuple

import numpy as np

_LOCAL_HEADER = 30  # bytes before the name of a member, by the zip format
_SKIPPED_BYTES = 2**18
_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, struct.error)


class Header(NamedTuple):
    """What an array is, by the header of the .npy format."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def members(path: pathlib.Path) -> dict[str, str]:
    """Returns the arrays of a file by name, each with what tells it from a changed one.

    A .npy file has one, named ''.

    Raises:
      ValueError: the file is no .npy or .npz file, or is cut short.
    """
    if path.suffix == ".npy":
        stat = path.stat()
        return {"": f"{stat.st_size} {stat.st_mtime_ns}"}
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                info.filename.removesuffix(".npy"): f"{info.file_size} {info.CRC}"
                for info in archive.infolist()
            }
    except _UNREADABLE as error:
        raise ValueError(_message(path, error)) from None


def open_array(path: pathlib.Path, name: str) -> Any:
    """Returns an array of a file, which reads what it is indexed with.

    Args:
      path: of an .npy or .npz file.
      name: one of `members(path)`.

    Returns:
      A `np.memmap`, or an object with `shape`, `dtype`, `len` and the same indexing of
      rows.

    Raises:
      ValueError: the file is damaged or cut short, or its objects are no numbers.
    """
    try:
        if path.suffix == ".npy":
            return _mapped(path, 0, path.stat().st_size)
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{name}.npy")
        if info.compress_type == zipfile.ZIP_STORED:
            return _mapped(path, _start(path, info), info.file_size)
        rows = _Compressed(path, info)
        if rows.header.fortran_order:  # its rows do not lie one after another
            with np.load(path) as arrays:
                return arrays[name]
        return rows
    except (*_UNREADABLE, ValueError) as error:
        raise ValueError(_message(path, error)) from None


def _message(path: pathlib.Path, error: Exception) -> str:
    return (
        f"cannot read {path}: {str(error).rstrip('.')}; it is no {path.suffix} file of "
        "numbers, or is damaged or cut short."
    )


def _start(path: pathlib.Path, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored member begin.

    The local header is not as long as the entry of the directory says: writers pad it.
    """
    with path.open("rb") as file:
        file.seek(info.header_offset)
        local = file.read(_LOCAL_HEADER)
    lengths = struct.unpack("<HH", local[26:])
    return info.header_offset + _LOCAL_HEADER + sum(lengths)


def _read_header(file) -> Header:
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"version {version} of the .npy format")
    header = Header(*readers[version](file))
    if header.dtype.hasobject:
        raise ValueError("it holds Python objects")
    return header


def _mapped(path: pathlib.Path, start: int, size: int) -> np.ndarray:
    with path.open("rb") as file:
        file.seek(start)
        header = _read_header(file)
        offset = file.tell()
    there = start + size - offset
    if there < header.num_bytes:
        raise ValueError(f"{header.num_bytes} bytes of numbers expected, {there} there")
    if not header.num_bytes:  # nothing to map
        return np.empty(header.shape, header.dtype)
    order = "F" if header.fortran_order else "C"
    return np.memmap(path, header.dtype, "r", offset, header.shape, order)


class _Compressed:
    """The rows of a compressed member; they are read in the order in which they lie."""

    def __init__(self, path: pathlib.Path, info: zipfile.ZipInfo):
        self._path, self._lock = path, threading.Lock()
        self._file = zipfile.ZipFile(path).open(info)  # noqa: SIM115, as a map is
        self.header = _read_header(self._file)
        self._offset = self._file.tell()
        if info.file_size < self._offset + self.header.num_bytes:
            raise ValueError("its compressed numbers end early")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.header.shape

    @property
    def dtype(self) -> np.dtype:
        return self.header.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which) -> np.ndarray:
        indices = np.arange(len(self))[which]
        if indices.ndim == 0:
            return self[indices[None]][0]
        rows = np.empty((len(indices), *self.shape[1:]), self.dtype)
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        with self._lock:
            for i in np.argsort(indices, kind="stable"):
                try:
                    self._skip_to(self._offset + int(indices[i]) * size)
                    content = self._file.read(size)
                    if len(content) < size:
                        raise EOFError(f"row {indices[i]} ends early")
                except _UNREADABLE as error:
                    raise ValueError(_message(self._path, error)) from None
                rows[i] = np.frombuffer(content, self.dtype).reshape(rows.shape[1:])
        return rows

    def _skip_to(self, position: int) -> None:
        if position < self._file.tell():
            self._file.seek(0)
        # `seek` would decompress 16 MB at a time.
        while (left := position - self._file.tell()) > 0:
            if not self._file.read(min(left, _SKIPPED_BYTES)):
                raise EOFError(f"it ends {left} bytes early")
