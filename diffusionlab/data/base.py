"""What every data source shares: randomness, scaling, splits, and reading many rows."""

from __future__ import annotations

import hashlib
import pathlib
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from diffusionlab import types

Example = dict[str, np.ndarray]


def generator(seed: int, stream: str, index: int = 0) -> np.random.Generator:
    """Returns the generator of (seed, stream, index); cheap enough for every batch.

    Args:
      seed: at least 0.
      stream: what the randomness is for.
      index: at least 0; epochs, steps.
    """
    # The two low words of the counter count the draws, so streams never overlap.
    counter = [0, 0, index, zlib.crc32(stream.encode())]
    return np.random.Generator(np.random.Philox(key=seed, counter=counter))


def unit(x: np.ndarray) -> np.ndarray:
    """Returns float32: uint8 goes from [0, 255] to [-1, 1], floats are taken as is."""
    if x.dtype != np.uint8:
        return x.astype(np.float32)
    scaled = x.astype(np.float32)
    scaled /= 127.5
    scaled -= 1.0
    return scaled


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is 'train' or 'test'."""
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}.")


def check_fraction(test_fraction: float) -> None:
    """Raises ValueError unless the fraction lies strictly between 0 and 1."""
    if not 0 < test_fraction < 1:
        raise ValueError(
            f"test_fraction: must be above 0 and below 1, got {test_fraction}."
        )


def short_hash(parts: object) -> str:
    """Returns 16 hex digits that tell plain values from others."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def files_version(root: pathlib.Path, paths: Iterable[pathlib.Path]) -> str:
    """Returns what changes with files, without reading them; '' where there are none.

    Args:
      root: folder that they lie below; its own name does not count.
      paths: of the files, in any order.
    """
    entries = []
    for path in paths:
        stat = path.stat()
        name = path.relative_to(root).as_posix()
        entries.append((name, stat.st_size, stat.st_mtime_ns))
    return short_hash(sorted(entries)) if entries else ""


def stack(examples: Iterable[Mapping[str, np.ndarray]]) -> Example:
    """Returns the examples stacked along a new first axis, by key."""
    rows = list(examples)
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def gather(source: types.Source, indices: Sequence[int] | np.ndarray) -> Example:
    """Returns the stacked examples at `indices`, `[B, ...]` by key."""
    if hasattr(source, "__getitems__"):
        return dict(source.__getitems__(indices))
    return stack(source[int(index)] for index in indices)
