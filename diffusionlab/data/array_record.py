"""Examples in shards of array_record files: written and read without TensorFlow.

A folder has `spec.json` and the sub-folders `train` and `test` with the shards
`00000.array_record`, `00001.array_record`, ... A record is one example: a line of JSON
that gives name, dtype and shape of each array, in order, and then their bytes:

    [["x", "|u1", [32, 32, 3]], ["label", "<i4", []]]\\n<3072 bytes><4 bytes>

'x' is uint8, scaled to [-1, 1] when read, or float32, taken as is.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np

from diffusionlab import types
from diffusionlab.data import base

_LAYOUT = (
    "expected spec.json and the sub-folders train and test that "
    "diffusionlab.data.array_record.write_array_record makes"
)


def encode(example: Mapping[str, np.ndarray]) -> bytes:
    """Returns the record of an example."""
    arrays = {
        name: np.asarray(value, np.asarray(value).dtype.newbyteorder("<"))
        for name, value in example.items()
    }
    head = [[name, a.dtype.str, list(a.shape)] for name, a in arrays.items()]
    body = b"".join(a.tobytes() for a in arrays.values())
    return json.dumps(head).encode() + b"\n" + body


def decode(record: bytes) -> dict[str, np.ndarray]:
    """Returns the example of a record; the arrays are read-only views."""
    start = record.index(b"\n") + 1
    example = {}
    for name, dtype, shape in json.loads(record[:start]):
        count = int(np.prod(shape))
        array = np.frombuffer(record, dtype, count, start)
        example[name] = array.reshape(shape)
        start += array.nbytes
    return example


def write_array_record(
    folder: str | os.PathLike,
    split: str,
    examples: Iterable[Mapping[str, np.ndarray]],
    spec: types.DataSpec,
    *,
    shard_size: int = 10_000,
) -> int:
    """Writes one split and adds it to `spec.json`, last, so that it is whole or absent.

    Args:
      folder: made where it does not exist.
      split: 'train' or 'test'.
      examples: 'x' uint8 or float32 of `spec.shape`, 'label' where there are classes.
      spec: the same for both splits.
      shard_size: examples of a file.

    Returns:
      The number of examples.

    Raises:
      FileExistsError: the split is there already, or what is left of it.
      ValueError: an example, or the spec of the other split, does not fit `spec`.
    """
    from array_record.python import array_record_module

    base.check_split(split)
    root = pathlib.Path(folder)
    target = root / split
    if target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{target}: not empty; remove it to write it again.")
    stated = _spec_json(spec)
    counts = {}
    if (root / "spec.json").is_file():
        earlier = json.loads((root / "spec.json").read_text(encoding="utf-8"))
        counts = earlier.pop("num_examples")
        if earlier != stated:
            raise ValueError(f"spec: {root / 'spec.json'} has {earlier}, got {stated}.")
    target.mkdir(parents=True, exist_ok=True)
    iterator = enumerate(examples)
    total = 0
    for shard in itertools.count():
        rows = list(itertools.islice(iterator, shard_size))
        if not rows:
            break
        records = [_checked(example, spec, number) for number, example in rows]
        # One record per group: the fastest layout for random access.
        writer = array_record_module.ArrayRecordWriter(
            str(target / f"{shard:05d}.array_record"), "group_size:1"
        )
        for record in records:
            writer.write(record)
        writer.close()
        total += len(rows)
    counts[split] = total
    text = json.dumps(stated | {"num_examples": counts}, indent=2)
    (root / "spec.json").write_text(text + "\n", encoding="utf-8")
    return total


def _spec_json(spec: types.DataSpec) -> dict:
    return {
        "shape": list(spec.shape),
        "num_classes": spec.num_classes,
        "class_names": list(spec.class_names),
    }


def _checked(example, spec: types.DataSpec, number: int) -> bytes:
    """Returns the record of an example, or raises ValueError where it does not fit."""
    names = {"x", "label"} if spec.num_classes else {"x"}
    if set(example) != names:
        raise ValueError(
            f"examples: number {number} has {sorted(example)}, not {sorted(names)}."
        )
    x = np.asarray(example["x"])
    if x.dtype not in (np.uint8, np.float32) or x.shape != tuple(spec.shape):
        raise ValueError(
            f"examples: 'x' of number {number} is {x.dtype}{list(x.shape)}, not uint8 "
            f"or float32 {list(spec.shape)}."
        )
    if spec.num_classes == 0:
        return encode({"x": x})
    label = int(example["label"])
    if not 0 <= label < spec.num_classes:
        raise ValueError(
            f"examples: 'label' of number {number} is {label}; there are "
            f"{spec.num_classes} classes."
        )
    return encode({"x": x, "label": np.int32(label)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecord:
    """A folder that `write_array_record` made, read at random from disk.

    Attributes:
      path: the folder.
      split: 'train' or 'test'.
    """

    path: str
    split: str = "train"

    def __post_init__(self):
        base.check_split(self.split)
        from array_record.python import array_record_data_source

        root = pathlib.Path(self.path)
        if not (root / "spec.json").is_file():
            raise FileNotFoundError(f"{root / 'spec.json'}: no such file; {_LAYOUT}.")
        stated = json.loads((root / "spec.json").read_text(encoding="utf-8"))
        shards = sorted((root / self.split).glob("*.array_record"))
        if self.split not in stated["num_examples"] or not shards:
            raise FileNotFoundError(
                f"{root / self.split}: no finished shards of split '{self.split}'; "
                f"{_LAYOUT}."
            )
        records = array_record_data_source.ArrayRecordDataSource(
            [str(shard) for shard in shards]
        )
        if len(records) != stated["num_examples"][self.split]:
            raise FileNotFoundError(
                f"{root / self.split}: has {len(records)} examples in {len(shards)} "
                f"shards, spec.json says {stated['num_examples'][self.split]}; a shard "
                "is missing."
            )
        spec = types.DataSpec(
            tuple(stated["shape"]), stated["num_classes"], tuple(stated["class_names"])
        )
        object.__setattr__(self, "_shards", shards)
        object.__setattr__(self, "_records", records)
        object.__setattr__(self, "_spec", spec)

    @property
    def spec(self) -> types.DataSpec:
        return self._spec

    @property
    def version(self) -> str:
        """Changes with the shards of the split, as the directory describes them."""
        root = pathlib.Path(self.path)
        return base.files_version(root, [root / "spec.json", *self._shards])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> base.Example:
        example = decode(self._records[index])
        return example | {"x": base.unit(example["x"])}

    def __getitems__(self, indices) -> base.Example:
        records = self._records.__getitems__([int(index) for index in indices])
        batch = base.stack(decode(record) for record in records)
        return batch | {"x": base.unit(batch["x"])}
