"""From held-out examples to others like them: noise to t_0, and sample down again.

A small t_0 keeps the example, t_0 = 1 is a sample that knows nothing of it. With
another label the example is turned into one of that class.

Source: Meng et al. 2021, SDEdit (arXiv 2108.01073), section 3.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from diffusionlab import keys as keys_lib
from diffusionlab import pictures, types
from diffusionlab.evals import arrays
from diffusionlab.samplers import inverse


@functools.lru_cache(maxsize=32)
def edit(sampler, process: types.Process, start: float):
    """Returns `f(predict, x, label, index) -> x'`; example i draws by `index[i]`."""

    def run(predict, x, label, index):
        cond = {} if label is None else {"label": label}
        return inverse.from_middle(
            sampler,
            process,
            lambda z, t: predict(z, t, cond),
            x,
            start,
            keys_lib.sample_keys(0, index),
        )

    return run


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageToImage:
    """Edits held-out examples from several starting times, as the config samples.

    Numbers: `distance/<t_0>`, the rms difference to the source, in units of the data;
    `distance_other` is that of two different held-out examples.

    Attributes:
      start_times: each t_0, in (0, 1].
      sampler: on its own times below t_0; None is the config's.
      label: class to turn all of them into; None keeps each one's own.
      num_examples: held-out examples, at most.
      num_shown: of them in the picture.
      every: steps between evaluations; 0 is at the end only.
    """

    start_times: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    sampler: types.Sampler | None = None
    label: int | None = None
    num_examples: int = 256
    num_shown: int = 10
    every: int = 0

    def __post_init__(self):
        if not self.start_times or not all(0 < t <= 1 for t in self.start_times):
            raise ValueError(
                f"start_times: expected times in (0, 1], got {self.start_times}."
            )
        for name, least in (("num_examples", 2), ("num_shown", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name}: must be at least {least}, got {getattr(self, name)}."
                )

    def check(self, source: types.Source) -> None:
        """Raises ValueError unless the data have the class that is asked for."""
        classes = source.spec.num_classes
        if self.label is not None and not 0 <= self.label < classes:
            raise ValueError(
                f"label: expected one of {classes} classes, got {self.label}."
            )

    def __call__(self, context: types.EvalContext) -> types.EvalResult:
        self.check(context.test)
        test = arrays.spread(context.test, self.num_examples)
        x = np.asarray(test["x"], np.float32)
        label = test["label"] if context.spec.num_classes else None
        if self.label is not None:
            label = np.full_like(label, self.label)
        sampler = context.sampler if self.sampler is None else self.sampler
        index = np.arange(len(x), dtype=np.int32)
        numbers, results = {}, []
        for start in self.start_times:
            function = edit(sampler, context.process, start)
            result = context.compute(function, x, label, index, guided=True)
            numbers[f"distance/{start:g}"] = _rms(result, x)
            results.append((f"t = {start:g}", result))
        numbers["distance_other"] = _rms(np.roll(x, 1, axis=0), x)
        notes = {"data": f"{len(x)} held-out examples, {type(sampler).__name__}"}
        shown = {}
        columns = [("source", x), *results]
        if len(context.spec.shape) == 1 and context.spec.shape[0] >= 2:
            colour = np.zeros(len(x), np.int64)
            if context.spec.num_classes:
                colour = test["label"]
            panels = [(title, points[:, :2], colour) for title, points in columns]
            shown["edits"] = pictures.scatter(panels, size=2.8)
        elif pictures.shows_images(context.spec.shape):
            columns = [(title, part[: self.num_shown]) for title, part in columns]
            shown["edits"] = pictures.captioned_columns(columns)
        return types.EvalResult(numbers, notes, shown)


def _rms(a, b) -> float:
    return float(np.sqrt(np.mean((np.float64(a) - b) ** 2)))
