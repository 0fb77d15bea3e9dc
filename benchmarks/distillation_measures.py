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

Of the digits, also as tokens: what the evaluators `samples` and `sample_quality` find,
see there. Of text: what `text_quality` finds, under the language model of this folder.
Sampling colder makes text likelier and less varied, so what the teacher reaches at the
entropy of a student's samples stands beside these, see `at_equal_entropy`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

from diffusionlab import evaluate, inference, pictures, restore
from diffusionlab.metrics import neighbours

DIRECTIONS = 64
_CELLS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What a table is of.

    Attributes:
      runs: run -> its config, of all that students and evaluators need; the first is
        the teacher.
      variant: of the students' configs.
      of_tokens: whether methods for tokens take part, or those for numbers.
      samplers: row -> sampler of the teacher; also measured at many steps.
      colder: the same, only measured at as many steps as the students make.
      steps: of the students.
      num_samples: of each measurement.
      batch_size: how many are drawn at once.
      titles: number -> what it is called; the first is what the picture shows.
      names: number -> the evaluators' name for it.
      evals: the evaluators, all told the number of samples.
      note: what stands below the table.
    """

    runs: Mapping[str, str]
    variant: str = ""
    of_tokens: bool = False
    samplers: Mapping[str, Mapping]
    colder: Mapping[str, Mapping] = dataclasses.field(default_factory=dict)
    steps: tuple[int, ...] = (1, 2, 4, 8)
    num_samples: int
    batch_size: int
    titles: Mapping[str, str]
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    evals: Mapping[str, Mapping] = dataclasses.field(default_factory=dict)
    note: str = ""


# Ancestral as students of moment matching sample, and as the program does by itself.
_SAMPLERS = {
    "teacher, ddim": {"name": "ddim"},
    "teacher, ancestral": {"name": "ancestral", "noise_exponent": 0.0},
    "teacher, ancestral 0.3": {"name": "ancestral", "noise_exponent": 0.3},
}
_OF_TOKENS = {"teacher": {"name": "token_ancestral"}}
_OF_DIGITS = {
    "num_samples": 1500,
    "batch_size": 500,
    "titles": {
        "distance": "Fréchet distance in classifier features",
        "accuracy": "class accuracy",
        "precision": "precision",
        "recall": "recall",
        "seconds": "seconds of training",
    },
    "names": {
        "distance": "quality/frechet",
        "accuracy": "samples/agreement",
        "precision": "samples/precision",
        "recall": "samples/recall",
    },
    "evals": {
        "samples": {"name": "samples"},
        "quality": {
            "name": "sample_quality",
            "extractor": {"name": "digits"},
            "metrics": [{"name": "frechet", "groups": 0}],
            "reference": "test",
            "baseline": "train",
        },
    },
}
DATA = {
    "mixture": Data(
        runs={"solved": "mixture/analytic", "mixture": "mixture/denoising"},
        variant="mixture",
        samplers=_SAMPLERS,
        num_samples=200_000,
        batch_size=20_000,
        titles={
            "distance": "sliced-Wasserstein distance to the data",
            "weight_error": "largest relative error of a mode's weight",
            "accuracy": "class accuracy",
            "variance_ratio": "variance within modes, over the true one",
            "seconds": "seconds of training",
        },
    ),
    "digits": Data(
        runs={"digits": "digits/denoising"}, samplers=_SAMPLERS, **_OF_DIGITS
    ),
    "digits_tokens": Data(
        runs={"digits_tokens": "digits/tokens"},
        variant="digits",
        of_tokens=True,
        samplers=_OF_TOKENS,
        steps=(4, 8, 16),
        **_OF_DIGITS,
    ),
    "text": Data(
        runs={"text": "text/masked", "language_model": "text/language_model"},
        of_tokens=True,
        samplers=_OF_TOKENS,
        colder={
            f"teacher, temperature {tau}": {
                "name": "token_ancestral",
                "temperature": tau,
            }
            for tau in (0.9, 0.8, 0.7)
        },
        steps=(4, 8, 16, 32),
        num_samples=256,
        batch_size=64,
        titles={
            "perplexity": "perplexity under the language model",
            "teacher_perplexity": "that of the teacher at the same entropy",
            "gradient_moment": "Gradient Moment",
            "teacher_gradient_moment": "that of the teacher at the same entropy",
            "entropy": "entropy of a sample's characters, nats",
            "seconds": "seconds of training",
        },
        names={k: f"text/{k}" for k in ("perplexity", "gradient_moment", "entropy")},
        evals={"text": {"name": "text_quality", "ngrams": ()}},
        note="At the same entropy: between the teacher's temperatures, at as many "
        "steps; a dash is an entropy that none of them reaches.",
    ),
}


def evals_of(data: str, num_samples: int, runs: pathlib.Path) -> dict:
    """Returns the block `evals` that `measure` needs in a config.

    Args:
      data: in `DATA`.
      num_samples: of each evaluator.
      runs: the folder of all runs, where the reference of text lies.
    """
    more = {"num_samples": num_samples}
    if data == "text":
        more["reference"] = str(runs / "language_model")
    return {label: {**block, **more} for label, block in DATA[data].evals.items()}


def at_equal_entropy(rows: Sequence[Mapping]) -> dict[tuple[str, int], dict]:
    """Returns the teacher's numbers where its samples have a student's entropy.

    The teacher at several temperatures is a curve for each number of steps; between its
    points the logarithm of the perplexity, and the Gradient Moment, are taken to be
    straight lines in the entropy. Beyond its ends there is no answer.

    Args:
      rows: 'method', 'steps' and 'numbers' each; teachers' methods begin so.

    Returns:
      (method, steps) -> 'teacher_perplexity' and 'teacher_gradient_moment'.
    """
    found, curves = {}, {}
    for row in rows:
        if row["method"].startswith("teacher"):
            curves.setdefault(row["steps"], []).append(row["numbers"])
    for row in rows:
        curve = sorted(curves.get(row["steps"], ()), key=lambda n: n["entropy"])
        if row["method"].startswith("teacher") or not curve:
            continue
        entropy = [numbers["entropy"] for numbers in curve]
        at = row["numbers"]["entropy"]
        if entropy[0] <= at <= entropy[-1]:
            log_p = np.log([numbers["perplexity"] for numbers in curve])
            moment = [numbers["gradient_moment"] for numbers in curve]
            found[row["method"], row["steps"]] = {
                "teacher_perplexity": float(np.exp(np.interp(at, entropy, log_p))),
                "teacher_gradient_moment": float(np.interp(at, entropy, moment)),
            }
    return found


def measure(
    data: str, built, mesh, params, step: int, num_samples: int, folder: pathlib.Path
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the numbers of one sampler, and the same of data in place of samples.

    Args:
      data: in `DATA`.
      built: the experiment, with the sampler to measure.
      params: by role.
      step: of the parameters.
      num_samples: how many.
      folder: where evaluators write what else they find.
    """
    if names := DATA[data].names:
        ema = restore.default_ema(built)
        evaluation = evaluate.Evaluation(built, mesh, folder)
        found, _ = evaluation.run(params, step, list(built.evals), ema)
        named = {k: f"eval/{name}" for k, name in names.items()}
        real = {k: f"{name}_real" for k, name in named.items()}
        return tuple(
            {k: found[n] for k, n in part.items() if n in found}
            for part in (named, real)
        )
    indices = np.arange(num_samples)
    label = inference.labels_in_turn(built, indices)
    draw = inference.make_draw(built, mesh)
    size = min(DATA[data].batch_size, num_samples)
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


def with_teacher(data: str, rows: Sequence[Mapping]) -> list[dict]:
    """Returns the rows, those of text with the teacher at their entropy."""
    found = at_equal_entropy(rows) if data == "text" else {}
    return [
        {
            **row,
            "numbers": row["numbers"] | found.get((row["method"], row["steps"]), {}),
        }
        for row in rows
    ]


def markdown(
    data: str,
    rows: Sequence[Mapping],
    reasons: Mapping[str, str],
    real: Mapping,
    notes: Mapping[str, str],
) -> str:
    """Returns a table for each number: a row for each method, a column for each step.

    Args:
      data: in `DATA`.
      rows: 'method', 'steps' and 'numbers' each.
      reasons: (method) -> why some of its cells have a dash.
      real: the numbers of data in place of samples.
      notes: (method) -> what is otherwise than in the other rows; they are marked '*'.
    """
    columns = sorted({row["steps"] for row in rows})
    names = list(dict.fromkeys([*(row["method"] for row in rows), *reasons]))
    cells = {(row["method"], row["steps"]): row["numbers"] for row in rows}
    parts = []
    for key, title in DATA[data].titles.items():
        lines = ["| " + " | ".join([title, *map(str, columns)]) + " |"]
        lines += ["| --- |" + " --- |" * len(columns)]
        for name in names:
            found = [cells.get((name, steps), {}).get(key) for steps in columns]
            if key.startswith("teacher_"):
                has_row = not name.startswith("teacher")
            else:
                has_row = key != "seconds" or any(value is not None for value in found)
            if has_row:
                marked = f"{name} \\*" if name in notes else name
                lines.append("| " + " | ".join([marked, *map(_cell, found)]) + " |")
        if key in real:
            lines.append(
                f"| data in place of samples: {_cell(real[key])} |"
                + " |" * len(columns)
            )
        parts.append("\n".join(lines))
    if DATA[data].note:
        parts.append(DATA[data].note)
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
    """Returns the first number against steps, a curve each, as a picture.

    The data in place of samples, and what is measured at a single large number of
    steps beyond the others, are lines across.
    """
    key, title = next(iter(DATA[data].titles.items()))
    most = sorted({row["steps"] for row in rows})
    few = [steps for steps in most if steps < 64] or most
    lines, levels = [], [("data in place of samples", real[key])]
    for name in dict.fromkeys(row["method"] for row in rows):
        of = sorted(
            (row["steps"], row["numbers"][key]) for row in rows if row["method"] == name
        )
        if points := [point for point in of if point[0] in few]:
            lines.append((name, *zip(*points, strict=True)))
        levels += [(f"{name}, {n} steps", d) for n, d in of if n not in few]
    return pictures.curves(
        lines,
        x_title="steps",
        y_title=title,
        levels=levels,
        tallest=100,
    )
