"""Reads the arrays of files that torch wrote, without torch and without running them.

Such a file is a pickle, and a pickle may call whatever it names. Here it may name
tensors, storages, ordered dictionaries and the modules of a TorchScript archive, none
of which does more than note what it was given; any other name is refused.

Two formats exist. Since torch 1.6 a file is a zip archive: the pickle is
`<folder>/data.pkl`, and storage k is the raw bytes of `<folder>/data/<k>`. Before, it
was five pickles in a row (a magic number, a version, the machine, the objects, the keys
of the storages), then for each key its number of elements as int64, and its raw bytes.
TorchScript archives are zip files too, of modules instead of dictionaries.

Source: torch/serialization.py and torch/_utils.py of torch 2 for the formats.
"""

from __future__ import annotations

import collections
import functools
import io
import pathlib
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C
_NESTED = ("state_dict", "model_state_dict", "model", "module")
# What a damaged pickle or zip file may raise besides ValueError.
_DAMAGED = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
_DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "bool": np.dtype(np.bool_),
}
_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}


class _Storage(NamedTuple):
    """Where bytes are: the key of the storage, and what its elements are."""

    key: str
    dtype: np.dtype


class _Tensor(NamedTuple):
    """A view of a storage, in elements; `dtype` None is that of the storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: np.dtype | None = None


class _Module:
    """A TorchScript module; unpickling fills its attributes."""


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file by their dotted names.

    Where the dictionary has an entry 'state_dict', 'model_state_dict', 'model' or
    'module', only that one is read; a 'module.' before every name is dropped.

    Raises:
      ValueError: the file is not torch's, is damaged, or holds other objects.
    """
    with open(path, "rb") as file:
        try:
            if file.peek(4)[:4] == b"PK\x03\x04":
                objects, raw = _read_zip(file)
            else:
                objects, raw = _read_legacy(file)
            # Tensors may be many parts of one large storage.
            raw = functools.lru_cache(maxsize=1)(raw)
            tensors = dict(_named(_state(objects)))
            arrays = {name: _array(tensor, raw) for name, tensor in tensors.items()}
        except _DAMAGED as error:
            kind = type(error).__name__
            raise ValueError(f"not a file of torch, or damaged ({kind})") from error
    if arrays and all(name.startswith("module.") for name in arrays):
        arrays = {name.removeprefix("module."): a for name, a in arrays.items()}
    return arrays


class _Unpickler(pickle.Unpickler):
    """Admits the names of `_ADMITTED`, and those of TorchScript modules.

    `storages` has the type of each storage that was mentioned.
    """

    def __init__(self, file: io.BufferedIOBase):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, np.dtype] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ADMITTED:
            return _ADMITTED[module, name]
        if module.partition(".")[0] == "__torch__":
            return _Module
        raise ValueError(
            f"it holds a '{module}.{name}', and only tensors in dictionaries are read; "
            "save model.state_dict() alone"
        )

    def persistent_load(self, pid: tuple) -> _Storage:
        # ('storage', type, key, device, elements), and for the old format a view,
        # which torch itself has not written since 0.4.
        kind, dtype, key, *rest = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise ValueError(f"it holds a stored '{kind}', which is not known")
        if len(rest) > 2 and rest[2] is not None:
            raise ValueError("its storages are views of each other")
        self.storages[str(key)] = dtype
        return _Storage(str(key), dtype)


def _tensor(storage, offset, size, stride, *_) -> _Tensor:
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _tensor_with_dtype(storage, offset, size, stride, grad, hooks, dtype, *_):
    return _Tensor(storage, offset, tuple(size), tuple(stride), dtype)


def _first(value, *_):
    return value


_ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_with_dtype,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch.jit._pickle", "restore_type_tag"): _first,
    **{
        ("torch.jit._pickle", f"build_{kind}list"): list
        for kind in ("int", "double", "bool", "tensor")
    },
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    **{("torch", name): _DTYPES[dtype] for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): _DTYPES["uint8"],
}


def _read_zip(file: io.BufferedReader) -> tuple[Any, Callable[[str], bytes]]:
    archive = zipfile.ZipFile(file)
    members = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(members) != 1:
        raise ValueError("not a file of torch: the archive has no single data.pkl")
    folder = members[0].removesuffix("data.pkl")
    order = f"{folder}byteorder"
    if order in archive.namelist() and archive.read(order) != sys.byteorder.encode():
        raise ValueError(f"its bytes are not {sys.byteorder}-endian")
    objects = _Unpickler(io.BytesIO(archive.read(members[0]))).load()
    return objects, lambda key: archive.read(f"{folder}data/{key}")


def _read_legacy(file: io.BufferedReader) -> tuple[Any, Callable[[str], bytes]]:
    if _Unpickler(file).load() != _MAGIC:
        raise ValueError("not a file of torch")
    _version, machine = (_Unpickler(file).load() for _ in range(2))
    if machine.get("little_endian", True) != (sys.byteorder == "little"):
        raise ValueError(f"its bytes are not {sys.byteorder}-endian")
    unpickler = _Unpickler(file)
    objects = unpickler.load()
    data = {}
    for key in map(str, _Unpickler(file).load()):
        (num,) = struct.unpack("<q", file.read(8))
        size = num * unpickler.storages[key].itemsize
        data[key] = file.read(size)
        if len(data[key]) != size:
            raise ValueError("damaged: the file ends early")
    return objects, data.__getitem__


def _state(objects: Any) -> Mapping[str, Any]:
    """Returns the dictionary of tensors among what was saved."""
    if isinstance(objects, _Module):
        return vars(objects)
    while isinstance(objects, Mapping):
        inner = [objects[k] for k in _NESTED if isinstance(objects.get(k), Mapping)]
        if not inner:
            return objects
        objects = inner[0]
    kind = type(objects).__name__.strip("_").lower()
    raise ValueError(f"it holds a {kind} where a dictionary of tensors was expected")


def _named(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, _Tensor]]:
    for name, value in state.items():
        if isinstance(value, _Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _named(value, f"{prefix}{name}.")
        elif isinstance(value, _Module):
            yield from _named(vars(value), f"{prefix}{name}.")


def _array(tensor: _Tensor, raw: Callable[[str], bytes]) -> np.ndarray:
    """Returns a contiguous copy, or the bytes themselves where they are the array."""
    flat = np.frombuffer(raw(tensor.storage.key), tensor.dtype or tensor.storage.dtype)
    start, size, stride = tensor.offset, tensor.size, tensor.stride
    numbers = (start, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("damaged: a tensor has no valid shape")
    # The last element that is looked at; beyond the storage there is other memory.
    last = start + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if 0 not in size and last >= len(flat):
        raise ValueError("damaged: a tensor reaches beyond its storage")
    if 0 in size:
        return np.zeros(size, flat.dtype)
    view = np.lib.stride_tricks.as_strided(
        flat[start:], size, [s * flat.itemsize for s in stride], writeable=False
    )
    return np.ascontiguousarray(view).reshape(size)
