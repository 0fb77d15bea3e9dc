"""Images against the images they should be, pair by pair: reconstructions, restored or
upscaled images, translations."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from diffusionlab import pictures, types
from diffusionlab.evals import arrays
from diffusionlab.metrics import psnr, ssim
from diffusionlab.metrics.base import of_mean

_SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedImages:
    """Compares sample i with example i of the reference, in order.

    A number per metric, named after its block: the mean over pairs, with its interval.
    Pictures show the pairs of the lowest and of the highest values of the first metric:
    sample | reference.

    Attributes:
      paired_metrics: blocks; empty is psnr and ssim.
      num_samples: pairs; 0 is all, and then there have to be as many samples as
        examples.
      split: 'train' or 'test' data.
      num_shown: pairs in each picture.
      every: steps between evaluations; 0 is at the end only.
    """

    paired_metrics: tuple = ()
    num_samples: int = 0
    split: str = "train"
    num_shown: int = 8
    every: int = 0

    def __post_init__(self):
        if self.num_samples < 0 or self.num_samples == 1:
            raise ValueError(
                f"num_samples: must be 0 (all) or at least 2, got {self.num_samples}."
            )
        if self.split not in _SPLITS:
            raise ValueError(f"split: expected 'train' or 'test', got {self.split!r}.")
        if self.num_shown < 1:
            raise ValueError(f"num_shown: must be at least 1, got {self.num_shown}.")
        names = [_name(metric) for metric in self._metrics()]
        if len(set(names)) < len(names):
            raise ValueError(f"paired_metrics: one is there twice: {', '.join(names)}.")

    def _metrics(self) -> tuple:
        return self.paired_metrics or (psnr.Psnr(), ssim.Ssim())

    def check(self, source: types.Source) -> None:
        """Raises ValueError or FileNotFoundError where it cannot work on these data."""
        if not pictures.shows_images(source.spec.shape):
            raise ValueError(
                "name: the evaluator 'paired_images' takes images [H, W, 1 or 3], and "
                f"the data have shape {source.spec.shape}."
            )
        for i, metric in enumerate(self._metrics()):
            try:
                metric.check(source.spec)
            except (ValueError, FileNotFoundError) as error:
                raise type(error)(f"paired_metrics[{i}].{error}") from None

    def __call__(self, context: types.EvalContext) -> types.EvalResult:
        reference = context.train if self.split == "train" else context.test
        num = self._num_pairs(len(reference), context.about.get("num_in_file"))
        functions = {_name(m): m.prepare(context.room) for m in self._metrics()}
        values = {name: [] for name in functions}
        shown = [_Extremes(self.num_shown, sign) for sign in (1, -1)]
        done = 0
        for x, _ in context.stream(num):
            y = arrays.take(reference, np.arange(done, done + len(x)))["x"]
            if x.shape != y.shape:
                raise ValueError(
                    f"paired_images: samples have shape {x.shape[1:]}, the reference "
                    f"{y.shape[1:]}; pairs need one size."
                )
            for name, function in functions.items():
                values[name].append(np.asarray(function(x, y), np.float64))
            first = next(iter(values.values()))[-1]
            for extremes in shown:
                extremes.add(first, x, y)
            done += len(x)
        if done != num:
            raise ValueError(f"num_samples: {num} pairs expected, {done} samples came.")
        found = {name: of_mean(np.concatenate(v)) for name, v in values.items()}
        first = next(iter(found))
        names = (f"lowest_{first}", f"highest_{first}")
        return types.EvalResult(
            numbers={name: mean for name, (mean, _) in found.items()},
            intervals={name: interval for name, (_, interval) in found.items()},
            notes={"pairs": f"mean over {num} pairs, sample i and example i"},
            pictures={n: e.picture(n) for n, e in zip(names, shown, strict=True)},
            provenance={
                "samples": {"num": num, **context.about},
                "reference": {"split": self.split, "num": num},
            },
        )

    def _num_pairs(self, examples: int, samples: int | None) -> int:
        """How many pairs; `samples` is None where any number can be drawn."""
        if not self.num_samples and samples not in (None, examples):
            raise ValueError(
                f"num_samples: there are {samples} samples and {examples} examples of "
                "the reference; pairs need equal numbers, or num_samples=N compares "
                "the first N."
            )
        num = self.num_samples or examples
        least = min(examples, num if samples is None else samples)
        if num > least:
            raise ValueError(
                f"num_samples: {num} pairs were asked for, and there are {least}."
            )
        return num


class _Extremes:
    """The pairs of the lowest (`sign` 1) or highest (-1) values so far."""

    def __init__(self, num: int, sign: int):
        self._num, self._sign = num, sign
        self._parts: list[tuple[np.ndarray, ...]] = []

    def add(self, values: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        parts = [*self._parts, (values, x, y)]
        joined = [np.concatenate(part) for part in zip(*parts, strict=True)]
        kept = np.argsort(self._sign * joined[0], kind="stable")[: self._num]
        self._parts = [tuple(part[kept] for part in joined)]

    def picture(self, name: str) -> np.ndarray:
        values, x, y = self._parts[0]
        low, high = sorted((values[0], values[-1]))
        caption = (
            f"{name.replace('_', ' ')}: {low:.4g} to {high:.4g}; sample | reference"
        )
        return pictures.pairs(x, y, 4, caption=caption)


def _name(metric: Callable) -> str:
    """'MeanSquare' -> 'mean_square': the name in the registry, by convention."""
    return re.sub(r"(?<=.)(?=[A-Z])", "_", type(metric).__name__).lower()
