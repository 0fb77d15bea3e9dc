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

from diffusionlab.metrics import base, kernel
from diffusionlab.metrics.base import Features
from diffusionlab.types import EvalResult


def _score(gram: np.ndarray, num: int) -> float:
    from scipy import special

    values = np.maximum(np.linalg.eigvalsh(gram) / num, 0.0)
    return float(np.exp(-np.sum(special.xlogy(values, values))))


def vendi(rows: np.ndarray) -> float:
    """Returns equation 1 with the cosine between rows `[N, d]`, none of them zero."""
    x = kernel.unit(rows)
    return _score(x @ x.T if len(x) < x.shape[1] else x.T @ x, len(x))


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
        zeros = int(np.sum(~np.any(rows, axis=1)))
        if zeros:
            raise ValueError(
                f"{samples.name}: {zeros} of {len(rows)} rows of 'features' are zero "
                "and have no direction."
            )
        x = kernel.unit(rows)
        groups = self.groups if len(x) >= 2 * self.groups else 0
        parts = base.groups_of(len(x), groups) if groups else []
        if len(x) < x.shape[1]:
            gram = x @ x.T
            value = _score(gram, len(x))
            rest = []
            for part in parts:
                kept = np.delete(np.arange(len(x)), part)
                rest.append(_score(gram[np.ix_(kept, kept)], len(kept)))
        else:
            gram = x.T @ x
            value = _score(gram, len(x))
            rest = [
                _score(gram - x[part].T @ x[part], len(x) - len(x[part]))
                for part in parts
            ]
        intervals = {"vendi": base.jackknife(value, rest)} if groups else {}
        notes = {
            "vendi": f"{len(x)} samples, cosine between {x.shape[1]} features; at most "
            f"{min(x.shape)}"
        }
        return EvalResult({"vendi": value}, notes, intervals=intervals)
