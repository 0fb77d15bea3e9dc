"""Inception score: how sure a classifier is of each sample, and how varied over all.

For the probabilities p_ic of sample i and their mean q_c over a split of the samples

    IS = exp( mean_i sum_c p_ic (log p_ic - log q_c) )                              (1)

from 1, all alike, to the number of classes.

Source: Salimans et al. 2016 (arXiv 1606.03498), section 4. Splits and order
are those of torch-fidelity 0.4: rows `RandomState(seed).permutation(N)`, split i from
i N // S on.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from diffusionlab.metrics import base, moments
from diffusionlab.metrics.base import Features
from diffusionlab.types import EvalResult

_GROUPS = 10  # of the jackknife where splits are not random, or there is one


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns log softmax of `[N, C]`, float64."""
    from scipy import special

    return special.log_softmax(np.asarray(logits, np.float64), axis=1)


def sums(logits: np.ndarray, index: np.ndarray | None = None) -> np.ndarray:
    """Returns what equation 1 needs of `[N, C]` logits, and adds up: `[C + 2]`.

    That is sum_i p_ic for each class, sum_ic p_ic log p_ic, and N; of the rows `index`
    where they are given.
    """
    total = np.zeros(logits.shape[1] + 2)
    for piece in moments.pieces(logits, index):
        log_p = log_probabilities(piece)
        p = np.exp(log_p)
        total[:-2] += p.sum(axis=0)
        total[-2:] += np.vdot(p, log_p), len(p)
    return total


def score(total: np.ndarray) -> float:
    """Returns equation 1 of added `sums`."""
    from scipy import special

    num, mean = total[-1], total[:-2] / total[-1]
    return float(np.exp(total[-2] / num - np.sum(special.xlogy(mean, mean))))


def splits_of(num: int, splits: int, seed: int | None) -> list[np.ndarray]:
    """Returns the rows of each split, ascending; without a seed in their order."""
    order = np.arange(num)
    if seed is not None:
        order = np.random.RandomState(seed).permutation(num)
    edges = [i * num // splits for i in range(splits + 1)]
    return [np.sort(order[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def split_scores(logits: np.ndarray, splits: int, seed: int | None) -> np.ndarray:
    """Returns equation 1 of each split of `[N, C]`; see `splits_of`."""
    parts = splits_of(len(logits), splits, seed)
    return np.array([score(sums(logits, part)) for part in parts])


def _without_groups(logits, label, splits, seed) -> list[float]:
    """The mean over splits without each of `groups_of`."""
    parts = splits_of(len(logits), splits, seed)
    group = np.empty(len(logits), int)
    for g, index in enumerate(base.groups_of(len(logits), _GROUPS, label)):
        group[index] = g
    found = np.array(
        [[sums(logits, p[group[p] == g]) for g in range(_GROUPS)] for p in parts]
    )
    rest = found.sum(axis=1, keepdims=True) - found
    return [float(np.mean([score(split[g]) for split in rest])) for g in range(_GROUPS)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionScore:
    """Inception score; equation 1. It does not look at the reference.

    Numbers `inception_score`, the mean over splits, and `inception_score_std` over them
    (divisor S). With the defaults they are those of torch-fidelity; the evaluator of
    guided diffusion takes splits of 5,000 in the order of the samples. The logits are
    those without bias where the extractor says so.

    Attributes:
      splits: of the samples.
      seed: of the order of the samples; None leaves them as they are, which is wrong
        for those sorted by class.
    """

    splits: int = 10
    seed: int | None = 2020
    needs = ("logits",)

    def __post_init__(self):
        base.check_positive(splits=self.splits)

    def __call__(self, samples: Features, reference: Features) -> EvalResult:
        logits = base.rows_of(samples, "logits")
        if len(logits) < self.splits:
            raise ValueError(
                f"splits: {self.splits} splits of {len(logits)} samples leave some "
                "empty; take fewer, or more samples."
            )
        scores = split_scores(logits, self.splits, self.seed)
        mean, interval = float(scores.mean()), None
        if self.splits > 1 and self.seed is not None:
            # Random splits are themselves groups of a jackknife of a mean.
            rest = (scores.sum() - scores) / (self.splits - 1)
            interval = base.jackknife(mean, rest)
        elif len(logits) >= 2 * _GROUPS * self.splits:
            rest = _without_groups(logits, samples.label, self.splits, self.seed)
            interval = base.jackknife(mean, rest)
        numbers = {"inception_score": mean, "inception_score_std": float(scores.std())}
        notes = {
            "inception_score": f"{len(logits)} samples in {self.splits} splits, "
            f"{logits.shape[1]} classes"
        }
        intervals = {} if interval is None else {"inception_score": interval}
        return EvalResult(numbers, notes, intervals=intervals)
