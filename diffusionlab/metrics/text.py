"""Text: how varied the tokens are, and how likely a reference model finds them.

The entropy of the tokens of one sample, with n_w of its L tokens equal to w, in nats

    H = - sum_w (n_w / L) log(n_w / L)                                              (1)

at most log L; and the perplexity under a reference model, over all samples together

    PPL = exp( sum of -log p over scored tokens / number of scored tokens )         (2)

Neither means much alone: repetition lowers (2), and (1) shows it. State with (2) the
model, its tokenizer and context, and whether the first token is scored.

Source: Dieleman et al. 2022 (arXiv 2211.15089), section 6, for the pair of the two.
"""

from __future__ import annotations

import numpy as np


def unigram_entropy(tokens: np.ndarray) -> np.ndarray:
    """Returns equation 1 of integers `[..., L]`: `[...]` float64, in nats."""
    tokens = np.asarray(tokens)
    if not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
        raise ValueError(
            "tokens: expected integers [..., L] with L at least 1, got "
            f"{tokens.dtype} {tokens.shape}."
        )
    rows = tokens.reshape(-1, tokens.shape[-1])
    found = np.empty(len(rows))
    for i, row in enumerate(rows):
        p = np.unique(row, return_counts=True)[1] / len(row)
        found[i] = -np.sum(p * np.log(p))
    # -0.0 of a constant row would be shown as such.
    return (found + 0.0).reshape(tokens.shape[:-1])


def generative_perplexity(log_p: np.ndarray, mask: np.ndarray) -> float:
    """Returns equation 2: every scored token counts alike, not every sample.

    Args:
      log_p: `[B, L]`, the reference model's log probability of each token, in nats.
      mask: `[B, L]` bool, whether the token is scored.

    Raises:
      ValueError: the shapes differ, no token is scored, or a scored one is NaN.
    """
    log_p, mask = np.asarray(log_p, np.float64), np.asarray(mask, bool)
    if log_p.shape != mask.shape:
        raise ValueError(f"mask: has shape {mask.shape}, and log_p has {log_p.shape}.")
    if not mask.any():
        raise ValueError("mask: no token is scored.")
    scored = log_p[mask]
    if np.isnan(scored).any():
        raise ValueError(f"log_p: {int(np.isnan(scored).sum())} scored tokens are NaN.")
    return float(np.exp(-scored.mean()))
