"""What a feature network is to the rest of the program.

Every example enters as float32 in [-1, 1]; `to_uint8` is the one place where it is
quantised. A network keeps its weights in one flat dictionary of arrays, and is a pure
function of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from diffusionlab.types import Array, DataSpec


class Network(NamedTuple):
    """A feature network with its weights.

    Attributes:
      params: arrays, any nested dictionary.
      apply: `apply(params, x) -> {output: [B, d] float32}`, jit-able; x is what
        `prepare` returned.
      prepare: `prepare(x) -> numpy [B, ...]`, on the host; x is float32 `[B, ...]` in
        [-1, 1], as sources and samplers give it.
      about: JSON that decides the features: name, hash of the weights, resize,
        quantisation. Two networks of the same `about` give the same features.
    """

    params: Any
    apply: Callable[[Any, Array], Mapping[str, Array]]
    prepare: Callable[[np.ndarray], np.ndarray]
    about: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of `about`."""
        text = json.dumps(self.about, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Room(NamedTuple):
    """What an extractor may use when it is loaded.

    Attributes:
      cache: folder for converted weights and small trained classifiers.
      open_run: `open_run(folder, step) -> (params, apply, about)` of a classifier that
        this program trained; `apply(params, x) -> {'features', 'logits'}`.
      timeout: seconds that one of several processes waits for the others.
      open_language_model: `open_language_model(folder, step) -> (params, log_probs,
        source, about)` of a language model that this program trained, on the host;
        `log_probs(params, tokens) -> [B, L]`, `source` has the tokens' texts.
    """

    cache: pathlib.Path
    open_run: Callable[..., tuple[Any, Callable, Mapping[str, Any]]]
    timeout: float = 600.0
    open_language_model: Callable[..., tuple[Any, Callable, Any, Any]] | None = None


def cache_folder() -> pathlib.Path:
    """Returns where what is computed once is kept: DIFFUSIONLAB_CACHE, or at home."""
    given = os.environ.get("DIFFUSIONLAB_CACHE")
    return pathlib.Path(given or pathlib.Path.home() / ".cache" / "diffusionlab")


class Extractor(Protocol):
    """A block of the config that names a feature network.

    Attributes:
      outputs: names of what it computes: 'features', and for some 'logits', 'spatial'.
    """

    outputs: tuple[str, ...]

    def check(self, spec: DataSpec) -> None:
        """Raises ValueError or FileNotFoundError where it cannot work; no weights yet.

        The message begins with the offending field: "path: ...".
        """
        ...

    def load(self, room: Room) -> Network: ...


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Returns x in [-1, 1] as uint8: clipped, (x + 1) 127.5 rounded to the nearest."""
    scaled = (np.clip(np.asarray(x, np.float32), -1.0, 1.0) + 1.0) * 127.5
    return np.round(scaled).astype(np.uint8)


def to_rgb(x: np.ndarray) -> np.ndarray:
    """Returns `[..., 1 or 3]` with three channels, a single one repeated."""
    return np.broadcast_to(x, (*x.shape[:-1], 3))


def check_images(spec: DataSpec, name: str, ndim: int = 3) -> None:
    """Raises ValueError unless examples are images (3) or videos (4) in grey or RGB."""
    if len(spec.shape) != ndim or spec.shape[-1] not in (1, 3):
        what = "images [H, W, 1 or 3]" if ndim == 3 else "videos [T, H, W, 1 or 3]"
        raise ValueError(
            f"name: the extractor '{name}' takes {what}, and the data have shape "
            f"{spec.shape}."
        )
