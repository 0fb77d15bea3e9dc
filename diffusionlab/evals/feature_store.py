"""Features of any number of examples, on disk: written batch by batch, read as a map.

A store is a folder with one file of float32 rows per output, one of labels, and
`progress.json`, which is written after each batch: what was interrupted goes on from
the last whole batch. `digest` is a chain over the examples in order,

    digest_i = sha256(digest_{i-1} | sha256(x_i | label_i))                         (1)

so it says which data the features were computed from, however they were divided.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusionlab import multihost
from diffusionlab.features.base import Network
from diffusionlab.metrics import moments as moments_lib
from diffusionlab.types import DataSpec

_NO_LABEL = -1
_SECONDS_BETWEEN_LINES = 10.0


class Stored:
    """The features in a finished store; what `metrics.base.Features` asks for.

    Args:
      folder: of the store.
      name: of the set, for messages.
      class_names: of the labels.
      examples: `examples(indices) -> x` float32 in [-1, 1], if they can be had again.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        name: str,
        class_names: tuple[str, ...] = (),
        examples: Callable[[Sequence[int]], np.ndarray] | None = None,
    ):
        self.folder, self.name, self.class_names = folder, name, class_names
        self._examples, self._moments = examples, {}
        self._progress = _read_progress(folder)
        self.num: int = self._progress["num"]
        self.digest: str = self._progress["digest"]
        label = np.fromfile(_file(folder, "label"), np.int32)[: self.num]
        self.label = None if np.any(label == _NO_LABEL) else label

    def rows(self, output: str) -> np.ndarray:
        """Returns `[N, d]` float32, a memory map."""
        width = self._progress["outputs"][output]
        shape = (self.num, width)
        return np.memmap(_file(self.folder, output), np.float32, "r", shape=shape)

    def moments(self, output: str) -> moments_lib.Moments:
        """Returns the moments of an output, computed once."""
        if output not in self._moments:
            self._moments[output] = moments_lib.of_rows(self.rows(output))
        return self._moments[output]

    def examples(self, indices: Sequence[int]) -> np.ndarray:
        """Returns some of the examples, `[n, ...]` float32 in [-1, 1].

        Raises:
          ValueError: they cannot be had again.
        """
        if self._examples is None:
            raise ValueError(f"{self.name}: its examples are not at hand.")
        return self._examples(indices)


def _file(folder: pathlib.Path, output: str) -> pathlib.Path:
    return folder / f"{output}.bin"


def _read_progress(folder: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {"num": 0, "digest": "", "outputs": {}, "identity": None}


def chain(digest: str, x: np.ndarray, label: np.ndarray) -> str:
    """Returns equation 1 after the examples of a batch."""
    for example, number in zip(np.ascontiguousarray(x), label, strict=True):
        one = hashlib.sha256(example.tobytes() + int(number).to_bytes(8, signed=True))
        digest = hashlib.sha256(digest.encode() + one.digest()).hexdigest()
    return digest


class _Writer:
    """Appends batches to a store; a store of something else is begun anew."""

    def __init__(self, folder: pathlib.Path, identity: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.progress = _read_progress(folder)
        if self.progress["identity"] != identity or not self._is_whole():
            (folder / "progress.json").unlink(missing_ok=True)
            self.progress = _read_progress(folder) | {"identity": identity}

    def _is_whole(self) -> bool:
        """Whether the files have all rows that the progress speaks of."""
        num = self.progress["num"]
        for name, width in (self.progress["outputs"] | {"label": 1}).items():
            file = _file(self.folder, name)
            if num and not (file.is_file() and file.stat().st_size >= 4 * width * num):
                return False
        return True

    def append(self, x: np.ndarray, label: np.ndarray, found: Mapping) -> None:
        num = self.progress["num"]
        parts = {name: np.asarray(rows, np.float32) for name, rows in found.items()}
        parts["label"] = np.asarray(label, np.int32)
        for name, rows in parts.items():
            file = _file(self.folder, name)
            file.touch()
            with file.open("r+b") as out:
                # Rows of a batch that was interrupted are written over.
                out.truncate(num * rows[0].nbytes)
                out.seek(0, os.SEEK_END)
                out.write(np.ascontiguousarray(rows).tobytes())
                out.flush()
                os.fsync(out.fileno())
        self.progress |= {
            "num": num + len(x),
            "digest": chain(self.progress["digest"], x, label),
            "outputs": {name: rows.shape[1] for name, rows in found.items()},
        }
        temporary = self.folder / ".progress.json"
        temporary.write_text(json.dumps(self.progress), encoding="utf-8")
        os.replace(temporary, self.folder / "progress.json")


def fill(
    folder: pathlib.Path,
    batches: Callable[[int], Iterable[tuple[np.ndarray, np.ndarray | None]]],
    num: int,
    network: Network,
    outputs: Sequence[str],
    apply: Callable[..., Any],
    *,
    name: str,
    identity: str,
    timeout: float,
) -> None:
    """Computes the features of `num` examples into a store, from where it stands.

    With several processes all of them call it; process 0 writes.

    Args:
      folder: of the store; what is there of another identity is discarded.
      batches: `batches(start)` yields (x `[B, ...]`, label `[B]` or None) from example
        `start` to the last.
      num: examples that there will be.
      network: the feature network.
      outputs: of the network, those to keep.
      apply: `apply(function, params, x)`, see `EvalContext`.
      name: of the set, for messages.
      identity: text that says what the features are computed from.
      timeout: seconds that one process waits for the others.

    Raises:
      ValueError: an example is not finite, or there are fewer than `num`.
    """
    writer = _Writer(folder, identity) if multihost.is_main() else None
    done = writer.progress["num"] if writer else 0
    done = start = multihost.all_of(f"how far {name} is", done, timeout)[0]
    function = _only(network.apply, tuple(outputs))
    began = told = time.monotonic()
    for x, label in batches(done) if done < num else ():
        x = np.asarray(x, np.float32)
        bad = ~np.isfinite(x.reshape(len(x), -1)).all(axis=1)
        if bad.any():
            raise ValueError(
                f"{name}: example {done + int(bad.argmax())} is not finite, nor are "
                f"{int(bad.sum()) - 1} more of the {len(x)} around it."
            )
        found = apply(function, network.params, network.prepare(x))
        if writer:
            label = np.full(len(x), _NO_LABEL) if label is None else label
            writer.append(x, label, found)
        done += len(x)
        if multihost.is_main() and time.monotonic() > told + _SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            left = (told - began) / (done - start) * (num - done)
            print(
                f"{name}: features of {done:,}/{num:,}, {left:.0f} s left", flush=True
            )
    if done != num:
        raise ValueError(f"{name}: expected {num} examples, and got {done}.")
    multihost.barrier(f"features of {name}", timeout)


@functools.lru_cache(maxsize=16)
def _only(function: Callable, outputs: tuple[str, ...]) -> Callable:
    """One function object per network and outputs: what is jitted is compiled once."""

    def chosen(params, x):
        found = function(params, x)
        return {name: found[name] for name in outputs}

    return chosen


def class_names(spec: DataSpec) -> tuple[str, ...]:
    """Returns the names of the classes, or their numbers."""
    return spec.class_names or tuple(str(c) for c in range(spec.num_classes))
