"""Samples at fixed noise over training, in one picture: `samples/strip.png`.

Every time a run makes a picture of its samples, the first few are kept. Those of text
are in `samples/strip.txt` instead. Sample i comes
from the same noise and the same label each time, so a column of the strip is one sample
as training goes on.
"""

from __future__ import annotations

import os
import pathlib
import zipfile
from collections.abc import Callable, Sequence

import numpy as np

from diffusionlab import pictures, texts

PICTURE = "strip.png"
TEXT = "strip.txt"
_STORE = "strip.npz"
_NUM_IMAGES = 12
_NUM_POINTS = 400
_NUM_TEXTS = 4
_MAX_SIDE = 64  # pixels of a stored image; a larger one is averaged down
_MAX_ROWS = 40  # of the picture; all of them are stored
_PANELS = 6  # scatter plots a row


def add(
    folder: pathlib.Path, step: int, x: np.ndarray, label: np.ndarray | None = None
) -> np.ndarray:
    """Keeps the first samples of a step and returns the strip, uint8 `[H, W, 3]`.

    A run that went on from an earlier checkpoint replaces what it makes again: rows of
    later steps are of a training that no longer counts, and go.

    Args:
      folder: the pictures of the run; gets `strip.npz` and `strip.png`.
      step: of the samples; the row of the same step is replaced.
      x: `[N, H, W, C]` in [-1, 1], or `[N, D]`; the first ones always from one noise.
      label: `[N]`, classes.
    """
    kept = _keep(folder, step, _small(x))
    picture = draw(kept, label)
    pictures.save_png(folder / PICTURE, picture)
    return picture


def add_tokens(
    folder: pathlib.Path,
    step: int,
    x: np.ndarray,
    decode: Callable[[np.ndarray], Sequence[str]],
) -> str:
    """Keeps the first samples of a step and returns the strip of their texts.

    Args:
      folder: the samples of the run; gets `strip.npz` and `strip.txt`.
      step: as of `add`.
      x: `[N, ...]`, tokens; the first ones always from one noise.
      decode: tokens `[N, ...]` to N texts.
    """
    kept = _keep(folder, step, np.asarray(x[:_NUM_TEXTS]))
    strip = texts.over_steps([(step, decode(kept[step])) for step in _chosen(kept)])
    texts.save(folder / TEXT, strip)
    return strip


def _keep(folder: pathlib.Path, step: int, row: np.ndarray) -> dict[int, np.ndarray]:
    """Stores the row of a step; returns the rows so far that it goes with."""
    kept = {s: part for s, part in _read(folder / _STORE).items() if s < step}
    kept[step] = row
    if any(part.shape[1:] != row.shape[1:] for part in kept.values()):
        kept = {step: row}
    _write(folder / _STORE, kept)
    return kept


def _chosen(rows: dict[int, np.ndarray]) -> list[int]:
    """The steps, newest last; of many an even choice."""
    steps = sorted(rows)
    chosen = np.unique(np.linspace(0, len(steps) - 1, _MAX_ROWS).round().astype(int))
    return [steps[i] for i in chosen]


def draw(rows: dict[int, np.ndarray], label: np.ndarray | None = None) -> np.ndarray:
    """Returns rows by step as one picture, newest last; of many an even choice.

    Args:
      rows: step -> uint8 images `[N, H, W, C]` or points `[N, D]`.
      label: classes of the first N, the colours of points.
    """
    steps = _chosen(rows)
    # Rows may differ in length where the number of samples was changed on the way.
    num = min(len(rows[step]) for step in steps)
    named = [(f"step {step:,}", rows[step][:num]) for step in steps]
    if named[0][1].ndim == 4:
        return pictures.named_rows([(n, part / 127.5 - 1) for n, part in named])
    colour = np.zeros(num, np.int64) if label is None else np.asarray(label)[:num]
    panels = [(name, points[:, :2], colour) for name, points in named]
    return pictures.scatter(panels, size=1.8, columns=min(_PANELS, len(panels)))


def _small(x: np.ndarray) -> np.ndarray:
    """The first samples as they are stored: points as they are, images in bytes."""
    if x.ndim == 2:
        return np.asarray(x[:_NUM_POINTS], np.float32)
    x = pictures.visible(np.asarray(x[:_NUM_IMAGES], np.float32))
    factor = -(-max(x.shape[1:3]) // _MAX_SIDE)
    height, width = (side // factor * factor for side in x.shape[1:3])
    x = x[:, :height, :width]
    shape = len(x), height // factor, factor, width // factor, factor, x.shape[-1]
    return pictures.to_uint8(x.reshape(shape).mean(axis=(2, 4)))


def _read(path: pathlib.Path) -> dict[int, np.ndarray]:
    if not path.is_file():
        return {}
    try:
        with np.load(path) as stored:
            return {int(step): stored[step] for step in stored.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile):
        # A picture is not worth a run: of a file that cannot be read nothing is kept.
        return {}


def _write(path: pathlib.Path, rows: dict[int, np.ndarray]) -> None:
    """Writes all rows; a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **{str(step): part for step, part in rows.items()})
    os.replace(temporary, path)
