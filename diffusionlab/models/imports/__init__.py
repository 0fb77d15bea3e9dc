"""Where the weights of published networks go: one file of names per architecture.

A file has `entries(block, spec, shapes) -> {name in the file: Entry}`, of a network's
block in the config, the data, and the shapes that the file has by name. It is plain
numpy: nothing here imports JAX.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import NamedTuple

import numpy as np

ARCHITECTURES = {
    "peebles_dit": "diffusionlab.models.imports.peebles_dit",
}
"""Registered name of a network -> the module with its names."""


class Entry(NamedTuple):
    """What becomes of one array of a file.

    Attributes:
      shape: that it has in the file.
      put: path of a parameter -> the array's change of layout; several where the array
        is divided, none where it is left out.
      layer: place along the first axis of these parameters, where layers are stacked.
      equals: what it has to be, within 1e-4, where it is a constant of the network.
      optional: a file without it is whole all the same.
    """

    shape: tuple[int, ...]
    put: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {}
    layer: int | None = None
    equals: np.ndarray | None = None
    optional: bool = False


def of(name: str) -> ModuleType:
    """Returns the module with the names of a network.

    Raises:
      ValueError: there is none for this network.
    """
    if name not in ARCHITECTURES:
        raise ValueError(
            f"no weights from elsewhere are known for the network '{name}'; there are "
            f"names for: {', '.join(ARCHITECTURES)}"
        )
    return importlib.import_module(ARCHITECTURES[name])
