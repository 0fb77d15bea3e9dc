"""What a report shows, as data: curves over training, and numbers that form tables."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from diffusionlab.evals import denoising_loss
from diffusionlab.writers import number

_MAX_POINTS = 600  # of a curve: more than a screen can tell apart
_MAX_LEVEL_CURVES = 5
_MAX_LINES = 20  # of a chart, such as one for each class
_LOGARITHMIC = re.compile(r"loss|grad_norm|excess")
_FIRST = ("train/loss", "train/", "eval/")
# Which end of a column of classes is the bad one; of other metrics it is not known.
_HIGHER = re.compile(
    r"accura|agreement|authenticity|coverage|density|inception|precision|psnr|recall"
    r"|ssim|vendi"
)
_LOWER = re.compile(
    r"bits|cmmd|distance|error|frechet|kernel|loss|lpips|mifid|perplexity|wasserstein"
)


def evenly(items: list, limit: int) -> list:
    """Returns at most `limit` items, evenly spaced, first and last among them."""
    if len(items) <= limit:
        return items
    places = np.round(np.linspace(0, len(items) - 1, limit)).astype(int)
    return [items[i] for i in places]


def collect(rows: Iterable[Mapping], evals: Iterable[Mapping]) -> dict[str, dict]:
    """Returns name -> {step: value or list} of the metrics file and the evaluations.

    Args:
      rows: of metrics.jsonl.
      evals: `{"step", "evaluator", "numbers"}` each; a number gets the name
        `eval/<evaluator>/<number>`.
    """
    found: dict[str, dict] = defaultdict(dict)
    for row in rows:
        for name, value in row.items():
            if name != "step":
                found[name][row["step"]] = value
    for result in evals:
        for name, value in result["numbers"].items():
            found[f"eval/{result['evaluator']}/{name}"][result["step"]] = value
    return dict(found)


def intervals(evals: Iterable[Mapping]) -> dict[str, dict]:
    """Returns name -> {step: (low, high)} of the evaluations, named as by `collect`."""
    found: dict[str, dict] = defaultdict(dict)
    for result in evals:
        for name, ends in (result.get("intervals") or {}).items():
            low, high = map(number, ends)
            if low is not None and high is not None:
                name = f"eval/{result['evaluator']}/{name}"
                found[name][result["step"]] = (low, high)
    return dict(found)


def by_part(
    numbers: Mapping[str, Any], class_names: Iterable[str] = ()
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Returns {part: {metric: value}} of the numbers `<metric>/<part>`, and the rest.

    They are a table where the part is a class, or where two metrics have it in common.
    What is over noise levels is drawn as a curve and belongs to the rest, with all that
    is nested deeper.
    """
    metrics: dict[str, list[str]] = defaultdict(list)
    classes = set(class_names)
    for name in numbers:
        metric, _, part = name.partition("/")
        plain = part and "/" not in part and "_by_logsnr" not in metric
        if plain or part in classes:
            metrics[part].append(metric)
    table = {
        part: {metric: numbers[f"{metric}/{part}"] for metric in having}
        for part, having in metrics.items()
        if part in classes or len(having) > 1
    }
    placed = {f"{metric}/{part}" for part, row in table.items() for metric in row}
    return table, {n: value for n, value in numbers.items() if n not in placed}


def worst(metric: str, values: Mapping[str, Any]) -> set[str]:
    """Returns the keys of the worst of several values; none where all are alike."""
    known = {
        k: v for k, v in ((k, number(v)) for k, v in values.items()) if v is not None
    }
    if len(set(known.values())) < 2:
        return set()
    if _HIGHER.search(metric):
        bad = min(known.values())
    elif _LOWER.search(metric):
        bad = max(known.values())
    else:
        return set()
    return {key for key, value in known.items() if value == bad}


def charts(
    found: Mapping[str, Mapping], bands: Mapping[str, Mapping] | None = None
) -> list[dict]:
    """Returns every scalar that was measured at two steps or more, ready to draw.

    Each is `{title, x, log, series: [{name, points: [[step, value or None], ...],
    band: [[step, low, high], ...]}]}`; a figure `name_real` is a line in the chart of
    `name`. Of many lines of a chart some are left out, evenly.

    Args:
      found: see `collect`.
      bands: see `intervals`.
    """
    by_title: dict[str, dict] = {}
    for name, by_step in found.items():
        if "_by_logsnr" in name:
            continue
        pairs = [[step, number(value)] for step, value in sorted(by_step.items())]
        if sum(value is not None for _, value in pairs) < 2:
            continue
        title, line = _place(name)
        chart = by_title.setdefault(title, {"title": title, "x": "step", "series": []})
        band = [[s, *ends] for s, ends in sorted((bands or {}).get(name, {}).items())]
        line = {"name": line, "points": _thin(pairs), "band": band}
        chart["series"].append(line)
    for title, chart in by_title.items():
        chart["series"] = evenly(chart["series"], _MAX_LINES)
        chart["log"] = bool(_LOGARITHMIC.search(title)) and _positive(chart["series"])
    return sorted(by_title.values(), key=lambda chart: _rank(chart["title"]))


def levels(found: Mapping[str, Mapping]) -> list[dict]:
    """Returns the metrics `<title>_by_logsnr` as charts over logsnr, a line per step.

    A list is over equal bins of logsnr in [-15, 15]; else each bin is a metric of its
    own, `<title>_by_logsnr/<logsnr>`.
    """
    by_title: dict[str, dict] = defaultdict(lambda: defaultdict(list))
    for name, by_step in found.items():
        title, _, place = name.rpartition("_by_logsnr")
        if not title:
            continue
        for step, value in by_step.items():
            values = value if isinstance(value, list) else [value]
            at = [float(place[1:])] if place else denoising_loss.centres(len(values))
            for logsnr, part in zip(at, values, strict=True):
                if number(part) is not None:
                    by_title[title][step].append([float(logsnr), number(part)])
    result = []
    for title, by_step in by_title.items():
        series = [
            {"name": f"step {step:,}", "points": sorted(by_step[step])}
            for step in evenly(sorted(by_step), _MAX_LEVEL_CURVES)
        ]
        result.append({"title": title, "x": "logsnr", "series": series})
        result[-1]["log"] = _positive(series)
    return result


def _place(name: str) -> tuple[str, str]:
    """(chart, line): a figure beside its reference, parts of a figure together."""
    if name.endswith("_real"):
        return name.removesuffix("_real"), "real data"
    parts = name.split("/")
    if len(parts) > 3:
        return "/".join(parts[:3]), "/".join(parts[3:])
    return name, "this run"


def _rank(title: str) -> int:
    """Curves of training first, its loss before all."""
    matches = (i for i, start in enumerate(_FIRST) if title.startswith(start))
    return next(matches, len(_FIRST))


def _positive(series: list[dict]) -> bool:
    values = [value for line in series for _, value in line["points"]]
    return all(value is None or value > 0 for value in values)


def _thin(pairs: list) -> list:
    """At most `_MAX_POINTS` points: means of neighbours, at the last step of each."""
    if len(pairs) <= _MAX_POINTS:
        return pairs
    thinned = []
    edges = np.linspace(0, len(pairs), _MAX_POINTS + 1).astype(int)
    for start, stop in itertools.pairwise(edges):
        values = [value for _, value in pairs[start:stop] if value is not None]
        mean = sum(values) / len(values) if values else None
        thinned.append([pairs[stop - 1][0], mean])
    return thinned
