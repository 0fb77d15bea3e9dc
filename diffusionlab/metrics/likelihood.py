"""Bits per dimension of a negative log-likelihood in nats.

    bits = nats / (D log 2)                                                         (1)

A density over [-1, 1] says of data on a grid of K levels, bins of width 2 / K, that a
level has the probability density x 2 / K, so that

    bits = nats / (D log 2) + log2(K / 2)                                           (2)

Source: Theis, van den Oord and Bethge 2016 (arXiv 1511.01844), section 3.1.
"""

from __future__ import annotations

import math

import numpy as np


def bits_per_dim(
    nats: float | np.ndarray, dims: int, levels: int | None = None
) -> float | np.ndarray:
    """Returns bits per dimension of `nats`, a negative log-likelihood.

    Args:
      nats: of an example of `dims` dimensions, or of many of them.
      dims: D.
      levels: K, where `nats` is of a density over [-1, 1] and the answer is to be of
        probabilities of bins of width 2 / K, equation 2; None is equation 1.
    """
    if dims < 1:
        raise ValueError(f"dims: must be at least 1, got {dims}.")
    if levels is not None and levels < 2:
        raise ValueError(f"levels: must be at least 2, got {levels}.")
    bits = nats / (dims * math.log(2))
    return bits if levels is None else bits + math.log2(levels / 2)
