"""What --samples and --reference name: samples in files, and what to compare with."""

from __future__ import annotations

import ast
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from diffusionlab import registry
from diffusionlab.data import array_files, base
from diffusionlab.data.example_files import ExampleFiles
from diffusionlab.types import DataSpec, Source

_BATCH = 64  # as that of references: one compiled program serves both


class Reference:
    """What samples are compared with.

    Attributes:
      train, test: the sources; of a data set named without a split both its splits, of
        anything else twice the same.
      has_splits: whether these two differ.
      statistics: path of a file that has these alone, else ''.
      about: JSON that says what it is.
      note: a line for the user, or ''.
    """

    def __init__(self, given: str):
        self.statistics = self.note = ""
        path = pathlib.Path(given)
        block = _block(given)
        if block is not None:
            self.train, self.test = _splits(block)
            block = registry.check("source", block, "--reference")
            self.about = {"source": block, "num": len(self.train)}
        elif _has_statistics(path) and not _has_examples(path):
            self.statistics = given
            self.train = self.test = _NoExamples(given)
            version = array_files.members(path)
            self.about = {"path": given, "version": [version["mu"], version["sigma"]]}
        else:
            self.train = self.test = open_files(given, "--reference")
            self.about = about_files(self.train)
            if _has_statistics(path):
                self.note = (
                    f"{given} has examples and statistics: the {len(self.train)} "
                    "examples are compared with. --config.evals.LABEL.reference="
                    f"{given} takes the statistics, for metrics that need no more."
                )

    @property
    def has_splits(self) -> bool:
        return self.train is not self.test


def open_files(given: str, flag: str) -> ExampleFiles:
    """Returns the examples at a path; what is wrong with them is said of the flag."""
    try:
        return ExampleFiles(path=given)
    except ValueError as error:
        raise ValueError(f"{flag}: {str(error).removeprefix('path: ')}") from None
    except FileNotFoundError as error:
        said = str(error).removeprefix("path: ")
        if flag == "--reference":
            names = ", ".join(sorted(registry.table("source")))
            said += f" Nor is it a data set; these are: {names}."
        raise FileNotFoundError(f"{flag}: {said}") from None


def about_files(source: ExampleFiles) -> dict[str, Any]:
    """Returns JSON that tells these examples from others."""
    return {
        "path": source.path,
        "version": source.version,
        "num_in_file": len(source),
    }


def _block(given: str) -> dict[str, Any] | None:
    """Returns the block of a data source, or None where a path is meant.

    Raises:
      ValueError: it is like a block, and none.
    """
    if given in registry.table("source"):
        return {"name": given}
    if not given.lstrip().startswith("{"):
        return None
    try:
        block = ast.literal_eval(given)
    except (ValueError, SyntaxError) as error:
        raise ValueError(
            "--reference: expected a block like {'name': 'digits', 'split': 'test'}, "
            f"got {given}: {error}."
        ) from None
    return block


def _splits(block: Mapping[str, Any]) -> tuple[Source, Source]:
    source = registry.build("source", block, "--reference")
    if "split" in block or not hasattr(source, "split"):
        return source, source
    return source, dataclasses.replace(source, split="test")


def _has_statistics(path: pathlib.Path) -> bool:
    return {"mu", "sigma"} <= _arrays_of(path)


def _has_examples(path: pathlib.Path) -> bool:
    return bool({"x", "arr_0"} & _arrays_of(path))


def _arrays_of(path: pathlib.Path) -> set[str]:
    """Names of the arrays in an .npz file; of anything else none."""
    if path.suffix != ".npz" or not path.is_file():
        return set()
    try:
        return set(array_files.members(path))
    except ValueError as error:
        raise ValueError(f"--reference: {error}") from None


class _NoExamples:
    """A source in the place of a file of statistics."""

    def __init__(self, path: str):
        self._path = path

    def _refuse(self):
        raise ValueError(
            f"--reference: {self._path} has statistics only; this evaluator or metric "
            "needs the examples: give a file or folder of them, or a data set."
        )

    @property
    def spec(self) -> DataSpec:
        self._refuse()

    def __len__(self) -> int:
        self._refuse()

    def __getitem__(self, index: int) -> base.Example:
        self._refuse()


def _are_numbers(names: tuple[str, ...], num_classes: int) -> bool:
    return all(name.isdecimal() and int(name) < num_classes for name in names)


class Samples:
    """The samples of a file as evaluators ask for them.

    Args:
      source: the examples.
      reference: of the classes; where both have names, they are matched by these.
    """

    def __init__(self, source: ExampleFiles, reference: DataSpec | None):
        self.source, self.note = source, ""
        classes, names = source.spec.num_classes, source.spec.class_names
        self._class_of = np.arange(classes)
        if reference is not None and classes:
            known, num_classes = reference.class_names, reference.num_classes
            if names and known and set(names) <= set(known):
                self._class_of = np.asarray([known.index(name) for name in names])
            elif names and not known and _are_numbers(names, num_classes):
                self._class_of = np.asarray([int(name) for name in names])
            elif classes > num_classes or (names and known):
                theirs = ", ".join(known) or num_classes or "none"
                self.note = (
                    f"the classes of the samples ({', '.join(names) or classes}) are "
                    f"not those of the reference ({theirs}): the samples count as "
                    "without classes"
                )
                num_classes = 0
            classes, names = num_classes, known or names
        self.spec = DataSpec(source.spec.shape, classes, names if classes else ())

    def stream(
        self, num: int, start: int = 0
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (x, label) of samples `start` to `num` - 1, or as far as there are."""
        for first in range(start, min(num, len(self.source)), _BATCH):
            stop = min(first + _BATCH, num, len(self.source))
            found = base.gather(self.source, np.arange(first, stop))
            label = np.zeros(stop - first, np.int32)
            if self.spec.num_classes:
                label = self._class_of[found["label"]].astype(np.int32)
            yield found["x"], label

    def draw(self, num: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (x, label) of the first `num` samples, or of all there are."""
        parts = zip(*self.stream(num), strict=True)
        x, label = (np.concatenate(part) for part in parts)
        return x, label
