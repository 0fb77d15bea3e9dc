"""Held-out examples with a part hidden, and the part sampled given the rest.

How the known part enters is one of two approximations, both in `samplers/inverse.py`:
it replaces its own place in z_s after every step, or its error pulls every prediction.

Source: Lugmayr et al. 2022, RePaint (arXiv 2201.09865); Ho et al. 2022, Video
diffusion models (arXiv 2204.03458), section 3.1.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from diffusionlab import keys as keys_lib
from diffusionlab import pictures, types
from diffusionlab.evals import arrays
from diffusionlab.samplers import base, inverse


def _first(shape, share):
    return np.arange(shape[0]) < math.ceil(share * shape[0])


def _block(shape, rows, columns):
    mask = np.zeros(shape, bool)
    mask[rows, columns] = True
    return mask


def _centre(shape, share):
    height, width = (round(side * math.sqrt(share)) for side in shape[:2])
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    return _block(shape, slice(top, top + height), slice(left, left + width))


def _random(shape, share):
    # The same pixels at every evaluation, and all channels of a pixel alike.
    places = shape[:2] if len(shape) == 3 else shape
    order = np.random.default_rng(0).permutation(int(np.prod(places)))
    hidden = (order < round(share * order.size)).reshape(places)
    return np.broadcast_to(hidden[..., None] if len(shape) == 3 else hidden, shape)


def _part(size, share, end):
    number = math.ceil(share * size)
    return slice(size - number, size) if end else slice(number)


_EVERY = slice(None)
# Name -> (number of axes of x, or None for any; (shape, fraction) -> what is hidden).
MASKS = {
    "left": (3, lambda s, q: _block(s, _EVERY, _part(s[1], q, end=False))),
    "right": (3, lambda s, q: _block(s, _EVERY, _part(s[1], q, end=True))),
    "top": (3, lambda s, q: _block(s, _part(s[0], q, end=False), _EVERY)),
    "bottom": (3, lambda s, q: _block(s, _part(s[0], q, end=True), _EVERY)),
    "centre": (3, _centre),
    "first": (1, _first),
    "random": (None, _random),
}


@functools.lru_cache(maxsize=32)
def replacing(sampler, process: types.Process, resample: int):
    """Returns `f(predict, x, known, label, index) -> x'` by replacement."""

    def run(predict, x, known, label, index):
        cond = {} if label is None else {"label": label}
        return inverse.replacement(
            sampler,
            process,
            lambda z, t: predict(z, t, cond),
            x,
            known,
            keys_lib.sample_keys(0, index),
            resample,
        )

    return run


@functools.lru_cache(maxsize=32)
def reconstructing(sampler, process: types.Process, weight: float):
    """Returns `f(predict, x, known, label, index) -> x'` by reconstruction guidance."""

    def run(predict, x, known, label, index):
        cond = {} if label is None else {"label": label}
        plain = lambda z, t: predict(z, t, cond)  # noqa: E731
        guided = inverse.reconstruction(process, plain, x, known, weight)
        keys = keys_lib.sample_keys(0, index)
        return base.sample(sampler, process, guided, keys, x.shape[1:])

    return run


_METHODS = {
    "replacement": lambda sampler, process, e: replacing(sampler, process, e.resample),
    "reconstruction": lambda sampler, process, e: reconstructing(
        sampler, process, e.weight
    ),
}
# Replacement in fewer sub-intervals of an adaptive sampler is hardly any.
_MIN_STOPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inpainting:
    """Fills the hidden part of held-out examples several times over.

    Numbers, rms per entry in units of the data:

      known_error: of the sampler's own answer where x is given; the pictures show x.
      hidden_error: of the fills where it is hidden; 0 is not the aim, as there are many
        right answers: a perfect method reaches `spread` times sqrt 2, up to its draws.
      hidden_error_mean: of the mean of the draws of an example.
      spread: standard deviation of the draws of an example.

    Attributes:
      mask: what is hidden: left, right, top, bottom, centre or random of images, first
        or random of vectors.
      fraction: share that is hidden.
      method: 'replacement' or 'reconstruction'. An adaptive sampler replaces only
        where its num_steps end, so it needs at least 8 of them.
      resample: of replacement: how often a step is made.
      weight: of reconstruction guidance.
      sampler: None is the config's.
      num_examples: held-out examples, at most.
      num_draws: fills of each.
      num_shown: examples in the picture.
      every: steps between evaluations; 0 is at the end only.
    """

    mask: str = "random"
    fraction: float = 0.5
    method: str = "replacement"
    resample: int = 1
    weight: float = 1.0
    sampler: types.Sampler | None = None
    num_examples: int = 64
    num_draws: int = 4
    num_shown: int = 10
    every: int = 0

    def __post_init__(self):
        for name, known in (("mask", MASKS), ("method", _METHODS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: unknown '{getattr(self, name)}'; known: "
                    f"{', '.join(sorted(known))}."
                )
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction: must be in (0, 1), got {self.fraction}.")
        for name, least in (
            ("resample", 1),
            ("num_examples", 1),
            ("num_draws", 2),
            ("num_shown", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name}: must be at least {least}, got {getattr(self, name)}."
                )
        if self.weight <= 0:
            raise ValueError(f"weight: must be positive, got {self.weight}.")

    def check(self, source: types.Source) -> None:
        """Raises ValueError unless the mask suits data of this shape."""
        shape, (axes, _) = source.spec.shape, MASKS[self.mask]
        if axes is not None and len(shape) != axes:
            fitting = [n for n, (a, _) in MASKS.items() if a in (None, len(shape))]
            raise ValueError(
                f"mask: '{self.mask}' does not suit data of shape {shape}; use "
                f"{' or '.join(fitting)}."
            )
        hidden = self.hidden(shape)
        if hidden.all() or not hidden.any():
            raise ValueError(
                f"fraction: {self.fraction} of data of shape {shape} hides "
                f"{'everything' if hidden.all() else 'nothing'}."
            )
        if self.sampler is not None:
            self._check_stops(self.sampler)

    def _check_stops(self, sampler: types.Sampler) -> None:
        adaptive = sampler.num_evaluations is None
        if self.method != "replacement" or not adaptive:
            return
        if sampler.num_steps < _MIN_STOPS:
            raise ValueError(
                f"sampler.num_steps: {type(sampler).__name__} chooses its own steps, "
                "and the known part is put back only at the stops of num_steps: method "
                f"'replacement' takes at least {_MIN_STOPS}, got {sampler.num_steps}."
            )

    def hidden(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns a boolean array of `shape`: what is hidden."""
        return np.asarray(MASKS[self.mask][1](shape, self.fraction))

    def __call__(self, context: types.EvalContext) -> types.EvalResult:
        self.check(context.test)
        test = arrays.spread(context.test, self.num_examples)
        x = np.asarray(test["x"], np.float32)
        hidden = self.hidden(context.spec.shape)
        label = None
        if context.spec.num_classes:
            label = np.repeat(test["label"], self.num_draws)
        many = np.repeat(x, self.num_draws, axis=0)
        index = np.arange(len(many), dtype=np.int32)
        sampler = context.sampler if self.sampler is None else self.sampler
        self._check_stops(sampler)
        function = _METHODS[self.method](sampler, context.process, self)
        # What is hidden is not even handed over.
        given = np.where(hidden, np.float32(0), many)
        fills = context.compute(function, given, ~hidden, label, index, guided=True)
        fills = np.float64(fills).reshape(len(x), self.num_draws, *x.shape[1:])
        numbers = statistics(x, fills, hidden)
        notes = {
            "data": f"{len(x)} held-out examples, {self.num_draws} fills of each, "
            f"{hidden.mean():.0%} hidden",
            "method": f"{self.method}, {type(sampler).__name__}",
        }
        shown = self._pictures(x, np.where(hidden, fills, x[:, None]), hidden, test)
        return types.EvalResult(numbers, notes, shown)

    def _pictures(self, x, fills, hidden, test) -> dict[str, np.ndarray]:
        if pictures.shows_images(x.shape[1:]):
            rows = slice(self.num_shown)
            columns = [("given", np.where(hidden, 0, x[rows]))]
            columns += [
                (f"fill {i + 1}", fills[rows, i]) for i in range(min(4, fills.shape[1]))
            ]
            columns.append(("original", x[rows]))
            return {"fills": pictures.captioned_columns(columns)}
        if x.ndim == 2 and x.shape[1] >= 2:
            colour = test.get("label", np.zeros(len(x), np.int64))
            panels = [("original", x), ("fill 1", fills[:, 0]), ("fill 2", fills[:, 1])]
            return {
                "fills": pictures.scatter(
                    [(title, points[:, :2], colour) for title, points in panels]
                )
            }
        return {}


def statistics(x, fills, hidden) -> dict[str, float]:
    """Returns the numbers of `Inpainting`.

    Args:
      x: `[N, ...]`.
      fills: `[N, K, ...]`.
      hidden: boolean, of one example.
    """
    x = np.float64(x)
    error = fills - x[:, None]
    return {
        "known_error": _rms(error[..., ~hidden]),
        "hidden_error": _rms(error[..., hidden]),
        "hidden_error_mean": _rms(error.mean(1)[..., hidden]),
        "spread": float(np.sqrt(np.mean(fills.var(1, ddof=1)[..., hidden]))),
    }


def _rms(q) -> float:
    return float(np.sqrt(np.mean(q**2)))
