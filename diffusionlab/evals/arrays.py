"""Examples of a data source as arrays."""

from __future__ import annotations

import numpy as np

from diffusionlab import types


def take(source: types.Source, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the examples at `indices`, each entry stacked to `[N, ...]`."""
    indices = [int(i) for i in indices]
    if hasattr(source, "__getitems__"):
        return {k: np.asarray(v) for k, v in source.__getitems__(indices).items()}
    examples = [source[i] for i in indices]
    return {k: np.stack([e[k] for e in examples]) for k in examples[0]}


def spread(source: types.Source, limit: int) -> dict[str, np.ndarray]:
    """Returns at most `limit` examples, evenly spaced: classes stay balanced."""
    number = min(limit, len(source))
    return take(source, np.arange(number) * len(source) // number)
