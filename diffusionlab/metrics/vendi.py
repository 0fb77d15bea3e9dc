"""Vendi score: how many different samples there effectively are.

For N rows of length 1 and their Gram matrix K, with the eigenvalues w_i of K / N

    VS = exp( - sum_i w_i log w_i )                                                 (1)

from 1, all rows alike, to N, all at right angles. X^T X / N has the same eigenvalues
other than 0 as K / N = X X^T / N, and the smaller of the two is taken.

Source: Friedman and Dieng 2023 (arXiv 2210.02410), definition 3.1.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from diffusionlab.metrics import base, kernel, moments
from diffusionlab.metrics.base import Features
from diffusionlab.types import EvalResult

_ENTRIES = 2**22  # of rows that are float64 at one time: 32 MB


def _score(gram: np.ndarray, num: int) -> float:
    from scipy import special

    values = np.maximum(np.linalg.eigvalsh(gram) / num, 0.0)
    return float(np.exp(-np.sum(special.xlogy(values, values))))


def _products(rows: np.ndarray, index: np.ndarray | None = None) -> np.ndarray:
    """X^T X `[d, d]` of all rows, or of those of `index`."""
    gram = np.zeros((rows.shape[1], rows.shape[1]))
    for piece in moments.pieces(rows, index):
        x = kernel.unit(piece)
        gram += x.T @ x
    return gram


def _cosines(rows: np.ndarray) -> np.ndarray:
    """X X^T `[N, N]`."""
    gram, size = np.empty((len(rows), len(rows))), max(1, _ENTRIES // rows.shape[1])
    for i in range(0, len(rows), size):
        left = kernel.unit(rows[i : i + size])
        for j in range(0, i + 1, size):
            right = left if i == j else kernel.unit(rows[j : j + size])
            block = left @ right.T
            gram[i : i + size, j : j + size] = block
            gram[j : j + size, i : i + size] = block.T
    return gram


def vendi(rows: np.ndarray) -> float:
    """Returns equation 1 with the cosine between rows `[N, d]`, none of them zero."""
    few = len(rows) < rows.shape[1]
    return _score(_cosines(rows) if few else _products(rows), len(rows))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vendi:
    """Vendi score of the samples; equation 1. It does not look at the reference.

    Number `vendi`. It grows with the number of samples: compare equal numbers only.

    Attributes:
      groups: of the jackknife behind the interval, each of which costs one more
        spectrum; 0 is without interval.
    """

    groups: int = 10
    needs = ("features",)

    def __post_init__(self):
        base.check_groups(self.groups)

    def __call__(self, samples: Features, reference: Features) -> EvalResult:
        rows = base.rows_of(samples, "features")
        pieces = moments.pieces(rows)
        zeros = sum(int(np.sum(~np.any(piece, axis=1))) for piece in pieces)
        if zeros:
            raise ValueError(
                f"{samples.name}: {zeros} of {len(rows)} rows of 'features' are zero "
                "and have no direction."
            )
        num, width = rows.shape
        groups = self.groups if num >= 2 * self.groups else 0
        parts = base.groups_of(num, groups, samples.label)
        rest = []
        if num < width:
            gram = _cosines(rows)
            for part in parts:
                kept = np.delete(np.arange(num), part)
                rest.append(_score(gram[np.ix_(kept, kept)], len(kept)))
        else:
            gram = _products(rows)
            for part in parts:
                rest.append(_score(gram - _products(rows, part), num - len(part)))
        value = _score(gram, num)
        intervals = {"vendi": base.jackknife(value, rest)} if groups else {}
        notes = {
            "vendi": f"{num} samples, cosine between {width} features; at most "
            f"{min(num, width)}"
        }
        return EvalResult({"vendi": value}, notes, intervals=intervals)
