"""Data to codes and back, by a deterministic sampler run both ways.

The code z_1 of held-out x is the solution of the probability-flow ODE from t = 0 to 1,
and sampling from it should return x. An exact solver returns it exactly, and codes of
the data have the law of z_1: about N(0, q_1), q_1 = alpha_1² d² + sigma_1².

Source: Song, Meng and Ermon 2021 (arXiv 2010.02502), sections 4.3 and 5.4.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from diffusionlab import pictures, types
from diffusionlab.evals import arrays
from diffusionlab.samplers import ddim, inverse

# What a sampler is tried on while the data are not known.
_SHAPES = ((1,), (8, 8, 1), (8, 8, 3))


@functools.lru_cache(maxsize=32)
def round_trip(sampler, process: types.Process):
    """Returns `f(predict, x, label) -> (z_1 / sqrt(q_1), x again)`, `[B, ...]` both."""

    def run(predict, x, label):
        cond = {} if label is None else {"label": label}
        plain = lambda z, t: predict(z, t, cond)  # noqa: E731
        code = inverse.encode(sampler, process, plain, x)
        again = inverse.decode(sampler, process, plain, code)
        alpha, sigma = process.schedule.alpha_sigma(jnp.float32(1))
        scale = jnp.sqrt((alpha * process.sigma_data) ** 2 + sigma**2)
        return code / scale, again

    return run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inversion:
    """Encodes held-out examples and decodes their codes, without guidance.

    Numbers, for each number of steps N:

      round_trip/<N>: rms difference of x and x again, in units of the data.
      code_mean/<N>, code_variance/<N>: over all entries of all codes; 0 and 1 for
        codes distributed as the prior.

    Attributes:
      sampler: a deterministic one; its num_steps is replaced. None is DDIM.
      num_steps: the numbers of steps, down as well as up.
      num_examples: held-out examples, at most.
      num_shown: of them in the picture.
      every: steps between evaluations; 0 is at the end only.
    """

    sampler: types.Sampler | None = None
    num_steps: tuple[int, ...] = (8, 16, 32, 64)
    num_examples: int = 256
    num_shown: int = 10
    every: int = 0

    def __post_init__(self):
        if not self.num_steps or min(self.num_steps) < 1:
            raise ValueError(
                f"num_steps: expected numbers of at least 1, got {self.num_steps}."
            )
        for name in ("num_examples", "num_shown"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: must be at least 1, got {getattr(self, name)}."
                )

    def check_process(self, process: types.Process) -> None:
        """Raises ValueError for a sampler that draws noise at one of `num_steps`.

        It is tried on a few shapes. Where the sampler suits none of them, it is tried
        when the evaluator runs, on that of the data.
        """
        suiting = [shape for shape in _SHAPES if self._suits(process, shape)]
        if suiting:
            self._check_deterministic(process, suiting[0])

    def _suits(self, process: types.Process, shape: tuple[int, ...]) -> bool:
        if not hasattr(self.sampler, "check"):
            return True
        try:
            for steps in self.num_steps:
                self._with(steps).check(process, types.DataSpec(shape))
        except ValueError:
            return False
        return True

    def _check_deterministic(self, process, shape) -> None:
        if self.sampler is None:
            return
        for steps in self.num_steps:
            inverse.check_deterministic(self._with(steps), process, shape)

    def _with(self, num_steps: int):
        if self.sampler is None:
            return ddim.Ddim(num_steps=num_steps)
        return dataclasses.replace(self.sampler, num_steps=num_steps)

    def __call__(self, context: types.EvalContext) -> types.EvalResult:
        self._check_deterministic(context.process, context.spec.shape)
        test = arrays.spread(context.test, self.num_examples)
        x = np.asarray(test["x"], np.float32)
        label = test["label"] if context.spec.num_classes else None
        numbers, codes, agains = {}, {}, {}
        for steps in self.num_steps:
            function = round_trip(self._with(steps), context.process)
            codes[steps], agains[steps] = context.compute(function, x, label)
            error = np.float64(agains[steps]) - x
            numbers[f"round_trip/{steps}"] = float(np.sqrt(np.mean(error**2)))
            numbers[f"code_mean/{steps}"] = float(np.mean(codes[steps]))
            numbers[f"code_variance/{steps}"] = float(np.var(codes[steps]))
        name = type(self._with(1)).__name__
        notes = {"data": f"{len(x)} held-out examples, {name}, up and down again"}
        shown = self._pictures(x, label, codes, agains, context.spec)
        return types.EvalResult(numbers, notes, shown)

    def _pictures(self, x, label, codes, agains, spec) -> dict[str, np.ndarray]:
        best = max(self.num_steps)
        if len(spec.shape) == 1 and spec.shape[0] >= 2:
            colour = np.zeros(len(x), np.int64) if label is None else label
            panels = [("data", x), ("codes", codes[best]), ("data again", agains[best])]
            return {
                "round_trip": pictures.scatter(
                    [(f"{title}, N = {best}", p[:, :2], colour) for title, p in panels]
                )
            }
        if not pictures.shows_images(spec.shape):
            return {}
        rows = slice(self.num_shown)
        columns = [("data", x[rows]), ("code", np.clip(codes[best][rows] / 3, -1, 1))]
        columns += [(f"N = {n}", agains[n][rows]) for n in self.num_steps]
        return {"round_trip": pictures.captioned_columns(columns)}
