"""Text: how varied the tokens are, and how likely a reference model finds them.

The entropy of the tokens of one sample, with n_w of its L tokens equal to w, in nats

    H = - sum_w (n_w / L) log(n_w / L)                                              (1)

at most log L; and the perplexity under a reference model, over all samples together

    PPL = exp( sum of -log p over scored tokens / number of scored tokens )         (2)

Neither means much alone: repetition lowers (2), and (1) shows it. State with (2) the
model, its tokenizer and context, and whether the first token is scored.

What is copied is told by the longest runs of tokens of a sample that occur in training
text, and variety across samples by distinct-n, the share of all their n-grams that are
different ones.

Source: Dieleman et al. 2022 (arXiv 2211.15089), section 6, for the pair of (1) and (2);
Li et al. 2016 (arXiv 1510.03055) for distinct-n.
"""

from __future__ import annotations

import numpy as np


def _tokens(tokens: np.ndarray, name: str) -> np.ndarray:
    """Returns integers `[B, L]` as int64, or raises ValueError."""
    tokens = np.asarray(tokens)
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim != 2:
        raise ValueError(
            f"{name}: expected integers [B, L], got {tokens.dtype} {tokens.shape}."
        )
    return tokens.astype(np.int64)


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


def mean_and_error(log_p: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Returns the mean of -log p over scored tokens, and its standard error.

    The error is over samples, as of a ratio of two sums: its exponential's ends are the
    interval of equation 2. NaN where there is one sample.

    Args:
      log_p, mask: as for `generative_perplexity`.
    """
    mean = float(np.log(generative_perplexity(log_p, mask)))
    mask = np.asarray(mask, bool)
    nll = -np.where(mask, np.asarray(log_p, np.float64), 0.0).sum(1)
    count = mask.sum(1)
    if len(nll) < 2:
        return mean, float("nan")
    residual = nll - mean * count
    scale = len(nll) / (len(nll) - 1)
    return mean, float(np.sqrt(scale * np.sum(residual**2)) / count.sum())


def distinct(tokens: np.ndarray, n: int) -> float:
    """Returns the share of different ones among the n-grams of integers `[B, L]`.

    Raises:
      ValueError: no integers `[B, L]`, or n is not in 1 ... L.
    """
    tokens = _tokens(tokens, "tokens")
    if not 1 <= n <= tokens.shape[1]:
        raise ValueError(f"n: must be in 1 ... {tokens.shape[1]}, got {n}.")
    grams = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1).reshape(-1, n)
    return len(np.unique(grams, axis=0)) / len(grams)


def copied_runs(tokens: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Returns how many tokens from each position on occur, in this order, in `train`.

    Runs end where their row does, in both. All suffixes of both are sorted, by doubling
    the length that is compared; the longest match of one is with the nearest of
    `train` before or after it. Time and memory are N log N in the tokens of both.

    Args:
      tokens: `[B, L]` integers.
      train: `[N, M]` integers.

    Returns:
      `[B, L]` int64; n or more where the n-gram that begins there occurs.
    """
    tokens, train = _tokens(tokens, "tokens"), _tokens(train, "train")
    rows, length = tokens.shape
    levels = _ranks(tokens, train)
    order = np.argsort(levels[-1])
    is_train = order >= rows * (length + 1)
    place = np.arange(len(order))
    before = np.maximum.accumulate(np.where(is_train, place, -1))
    after = np.where(is_train, place, len(order))
    after = np.minimum.accumulate(after[::-1])[::-1]
    mine = order[~is_train]
    longest = np.zeros(len(mine), np.int64)
    for nearest in (before[~is_train], after[~is_train]):
        there = (nearest >= 0) & (nearest < len(order))
        other = order[np.where(there, nearest, 0)]
        longest = np.maximum(longest, np.where(there, _common(levels, mine, other), 0))
    found = np.empty(rows * (length + 1), np.int64)
    found[mine] = longest
    return found.reshape(rows, length + 1)[:, :length]


def _ranks(tokens: np.ndarray, train: np.ndarray) -> list[np.ndarray]:
    """Returns for k = 0, 1, ... the rank of the 2^k symbols from each position on.

    Rows lie one after another, each closed by a symbol of its own that matches no
    other; the last level tells every suffix of one from all of the other.
    """
    symbols = max(tokens.max(initial=0), train.max(initial=0)) + 1
    first = 0
    parts = []
    for block in (tokens, train):
        ends = symbols + first + np.arange(len(block))
        parts.append(np.concatenate([block, ends[:, None]], axis=1).ravel())
        first += len(block)
    rank = np.concatenate(parts)
    levels, width = [_ranked(rank)], 1
    while width <= min(tokens.shape[1], train.shape[1]):
        then = np.minimum(np.arange(len(rank)) + width, len(rank) - 1)
        key = levels[-1].astype(np.int64) * len(rank) + levels[-1][then]
        levels.append(_ranked(key))
        width *= 2
    return levels


def _ranked(key: np.ndarray) -> np.ndarray:
    return np.unique(key, return_inverse=True)[1].astype(np.int32)


def _common(levels: list[np.ndarray], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the length of the longest common prefix of the suffixes at a and b."""
    length = np.zeros(len(a), np.int64)
    last = len(levels[0]) - 1
    for k in range(len(levels) - 1, -1, -1):
        here, there = np.minimum(a + length, last), np.minimum(b + length, last)
        length += np.where(levels[k][here] == levels[k][there], 2**k, 0)
    return length
