"""What `distillation.py` measures of samples, and how it writes the numbers down.

Of the mixture, with the labels of samples and data in turn, as many of each:

  distance       sliced Wasserstein-1 distance to the density of the data: along each
                 direction the area between the two distribution functions, the exact
                 one being known; the floor is that of as many exact draws
  weight_error   largest relative error of a component's share of the samples, each
                 counted where its nearest mean is
  accuracy       share of the samples whose nearest mean is that of their own label
  variance_ratio variance of the samples of a component over the true one, the mean
                 over components

Of the digits: what the evaluators `samples` and `sample_quality` find, see there.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

from diffusionlab import evaluate, inference, pictures, restore
from diffusionlab.metrics import neighbours

DIRECTIONS = 64
_CELLS = 4096
_BATCH = {"mixture": 20_000, "digits": 500}
TITLES = {
    "mixture": {
        "distance": "sliced-Wasserstein distance to the data",
        "weight_error": "largest relative error of a mode's weight",
        "accuracy": "class accuracy",
        "variance_ratio": "variance within modes, over the true one",
        "seconds": "seconds of training",
    },
    "digits": {
        "distance": "Fréchet distance in classifier features",
        "accuracy": "class accuracy",
        "precision": "precision",
        "recall": "recall",
        "seconds": "seconds of training",
    },
}
_OF_DIGITS = {
    "distance": "quality/frechet",
    "accuracy": "samples/agreement",
    "precision": "samples/precision",
    "recall": "samples/recall",
}
_EVALS = {
    "samples": {"name": "samples"},
    "quality": {
        "name": "sample_quality",
        "extractor": {"name": "digits"},
        "metrics": [{"name": "frechet", "groups": 0}],
        "reference": "test",
        "baseline": "train",
    },
}


def evals_of(data: str, num_samples: int) -> dict:
    """Returns the block `evals` that `measure` needs in a config."""
    if data == "mixture":
        return {}
    return {k: {**block, "num_samples": num_samples} for k, block in _EVALS.items()}


def batch_size(data: str) -> int:
    """Returns how many samples are drawn at once."""
    return _BATCH[data]


def measure(
    data: str, built, mesh, params, step: int, num_samples: int, folder: pathlib.Path
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the numbers of one sampler, and the same of data in place of samples.

    Args:
      data: 'mixture' or 'digits'.
      built: the experiment, with the sampler to measure.
      params: by role.
      step: of the parameters.
      num_samples: how many.
      folder: where evaluators write what else they find.
    """
    if data == "digits":
        ema = restore.default_ema(built)
        evaluation = evaluate.Evaluation(built, mesh, folder)
        found, _ = evaluation.run(params, step, list(built.evals), ema)
        named = {k: f"eval/{name}" for k, name in _OF_DIGITS.items()}
        real = {k: f"{name}_real" for k, name in named.items()}
        return tuple({k: found[n] for k, n in part.items()} for part in (named, real))
    indices = np.arange(num_samples)
    label = inference.labels_in_turn(built, indices)
    draw = inference.make_draw(built, mesh)
    size = min(_BATCH[data], num_samples)
    x = inference.draw_many(draw, mesh, params, built.seed, indices, label, size)
    source = built.test_source
    return of_mixture(x, label, source), _of_data(source, num_samples)


@functools.lru_cache
def _of_data(source, num_samples: int) -> dict[str, float]:
    """The numbers of exact draws: the floor."""
    label = np.arange(num_samples) % len(source.means)
    return of_mixture(fresh(source, label, 0), label, source)


def fresh(source, label: np.ndarray, seed: int) -> np.ndarray:
    """Returns exact draws of the mixture with these labels, `[N, D]`."""
    eps = np.random.default_rng(seed).normal(size=(len(label), *source.spec.shape))
    return source.means[label] + source.std * eps


def of_mixture(x: np.ndarray, label: np.ndarray, source) -> dict[str, float]:
    """Returns the numbers of the module's header for samples `[N, D]` with labels."""
    x = np.asarray(x, np.float64)
    nearest = neighbours.nearest(x, np.asarray(source.means))[0]
    count = np.bincount(nearest, minlength=len(source.means))
    true = np.bincount(label, minlength=len(source.means))
    # Of a component without samples there is no spread at all.
    variances = [
        x[nearest == k].var(axis=0).mean() if n else 0.0 for k, n in enumerate(count)
    ]
    return {
        "distance": to_density(x, np.bincount(label) / len(label), source),
        "weight_error": float(np.max(np.abs(count / np.maximum(true, 1) - 1))),
        "accuracy": float(np.mean(nearest == label)),
        "variance_ratio": float(np.mean(variances) / source.std**2),
    }


def to_density(x: np.ndarray, weights: np.ndarray, source) -> float:
    """Returns the sliced Wasserstein-1 distance of x `[N, D]` to a mixture.

    With infinitely many draws of the mixture in the place of its distribution function
    it is `mixture.sliced_wasserstein`, along the same law of directions.

    Args:
      x: samples.
      weights: of the components, `[K]`.
      source: knows the means `[K, D]` and the standard deviation of the components.
    """
    directions = np.random.default_rng(0).normal(size=(x.shape[1], DIRECTIONS))
    directions /= np.linalg.norm(directions, axis=0)
    distances = []
    for direction in directions.T:
        along, centres = x @ direction, source.means @ direction
        low = min(along.min(), centres.min() - 6 * source.std)
        high = max(along.max(), centres.max() + 6 * source.std)
        edges = np.linspace(low, high, _CELLS + 1)
        ours = np.cumsum(np.histogram(along, edges)[0]) / len(x)
        scaled = (edges[1:, None] - centres) / source.std
        gap = np.abs(ours - special.ndtr(scaled) @ weights)
        distances.append(gap.sum() * (edges[1] - edges[0]))
    return float(np.mean(distances))


def seconds_of(rows: Sequence[Mapping], batch: int) -> float:
    """Returns the seconds of training in the rows of a run's metrics.

    Pictures, evaluations, checkpoints and compiling are not in it.
    """
    total, last = 0.0, 0
    for row in rows:
        if rate := row.get("perf/examples_per_second"):
            total += (row["step"] - last) * batch / rate
            last = row["step"]
    return total


def markdown(
    data: str,
    rows: Sequence[Mapping],
    reasons: Mapping[str, str],
    real: Mapping,
    notes: Mapping[str, str],
) -> str:
    """Returns a table for each number: a row for each method, a column for each step.

    Args:
      data: 'mixture' or 'digits'.
      rows: 'method', 'steps' and 'numbers' each.
      reasons: (method) -> why some of its cells have a dash.
      real: the numbers of data in place of samples.
      notes: (method) -> what is otherwise than in the other rows; they are marked '*'.
    """
    columns = sorted({row["steps"] for row in rows})
    names = list(dict.fromkeys([*(row["method"] for row in rows), *reasons]))
    cells = {(row["method"], row["steps"]): row["numbers"] for row in rows}
    parts = []
    for key, title in TITLES[data].items():
        lines = ["| " + " | ".join([title, *map(str, columns)]) + " |"]
        lines += ["| --- |" + " --- |" * len(columns)]
        for name in names:
            found = [cells.get((name, steps), {}).get(key) for steps in columns]
            if key != "seconds" or any(value is not None for value in found):
                marked = f"{name} \\*" if name in notes else name
                lines.append("| " + " | ".join([marked, *map(_cell, found)]) + " |")
        if key in real:
            lines.append(
                f"| data in place of samples: {_cell(real[key])} |"
                + " |" * len(columns)
            )
        parts.append("\n".join(lines))
    for mark, said in (("A dash:", reasons), ("\\*:", notes)):
        if said:
            lines = [f"- {name}: {why}" for name, why in said.items()]
            parts.append("\n".join([mark, "", *lines]))
    return "\n\n".join(parts) + "\n"


def _cell(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 10 else f"{value:.3g}"


def picture(data: str, rows: Sequence[Mapping], real: Mapping) -> np.ndarray:
    """Returns distance against steps, a curve for each method, uint8 `[H, W, 3]`.

    The data in place of samples, and what is measured at a single large number of
    steps beyond the others, are lines across.
    """
    most = sorted({row["steps"] for row in rows})
    few = [steps for steps in most if steps < 64] or most
    lines, levels = [], [("data in place of samples", real["distance"])]
    for name in dict.fromkeys(row["method"] for row in rows):
        of = sorted(
            (row["steps"], row["numbers"]["distance"])
            for row in rows
            if row["method"] == name
        )
        if points := [point for point in of if point[0] in few]:
            lines.append((name, *zip(*points, strict=True)))
        levels += [(f"{name}, {n} steps", d) for n, d in of if n not in few]
    return pictures.curves(
        lines,
        x_title="steps",
        y_title=TITLES[data]["distance"],
        levels=levels,
        tallest=100,
    )
