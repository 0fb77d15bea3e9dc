"""The training loss on held-out data, in all and by noise level."""

from __future__ import annotations

import dataclasses

import numpy as np

from diffusionlab import types
from diffusionlab.evals import arrays

LOGSNR_RANGE = (-15.0, 15.0)


def centres(num_bins: int) -> np.ndarray:
    """Returns the middle of each of `num_bins` equal bins over logsnr in [-15, 15]."""
    edges = np.linspace(*LOGSNR_RANGE, num_bins + 1)
    return (edges[1:] + edges[:-1]) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoisingLoss:
    """Averages the loss and its metrics over batches of the test source.

    The batches go through the held-out examples in order and begin anew at the end;
    every batch draws its own noise, and the same noise at every evaluation, so two
    checkpoints are compared on the same draws. A metric `name_by_logsnr` that is a
    vector yields one number per bin that was met: `name_by_logsnr/<logsnr>`.

    Attributes:
      num_batches: batches per evaluation.
      batch_size: examples per batch.
      every: steps between evaluations; 0 is at the end only.
    """

    num_batches: int = 8
    batch_size: int = 256
    every: int = 0

    processes = ("gaussian", "categorical")
    takes_tokens = True
    needs_predictions = False

    def __post_init__(self):
        for name in ("num_batches", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1.")

    def __call__(self, context: types.EvalContext) -> types.EvalResult:
        totals: dict[str, np.ndarray] = {}
        size = len(context.test)
        for index in range(self.num_batches):
            first = index * self.batch_size
            indices = np.arange(first, first + self.batch_size) % size
            metrics = context.loss(arrays.take(context.test, indices), index)
            for name, pair in metrics.items():
                pair = np.stack([np.asarray(part, np.float64) for part in pair])
                totals[name] = totals.get(name, 0.0) + pair
        numbers = {}
        for name, (total, count) in totals.items():
            if np.ndim(total) == 0:
                numbers[name] = float(total / count)
                continue
            by_level = name.endswith("_by_logsnr")
            at = centres(len(total)) if by_level else np.arange(len(total))
            for place, part, weight in zip(at, total, count, strict=True):
                if weight > 0:
                    numbers[f"{name}/{place:g}"] = float(part / weight)
        if "bits_per_token" in numbers:
            # Of the mean: a mean of perplexities is another number.
            numbers["perplexity"] = float(2.0 ** numbers["bits_per_token"])
        drawn = self.num_batches * self.batch_size
        note = f"{drawn} noise draws over {min(size, drawn)} held-out examples"
        return types.EvalResult(numbers, {"data": note})
