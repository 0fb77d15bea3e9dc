"""The numbers of a report as HTML: with intervals, by class, and where they come from.

Everything that a result holds is text of somebody else and escaped here.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any

from diffusionlab import curves, writers

_COMPARISON = "sampler_comparison"


def word(value: Any) -> str:
    """Returns a number with four digits; what is no number as it is."""
    number = writers.number(value)
    if number is None:
        return str(value)
    if number == int(number) and abs(number) < 1e12:
        return f"{int(number):,}"
    return f"{number:.4g}"


def interval(ends: Any) -> str:
    """'1.2 to 1.4', or '' where there is none."""
    return " to ".join(map(word, ends)) if ends else ""


def compares(result: Mapping) -> bool:
    """Whether a result is about samplers at several numbers of steps."""
    return (result.get("settings") or {}).get("name") == _COMPARISON


def of_result(result: Mapping) -> str:
    """Returns the numbers and notes of one evals/*.json as tables."""
    return _comparison(result) if compares(result) else _table(result)


def _table(result: Mapping) -> str:
    """The numbers beside their intervals and figures for real data; classes; notes.

    Other parts of a figure fold in.
    """
    intervals = result.get("intervals") or {}
    classes, rest = curves.by_part(result["numbers"], result.get("class_names") or ())
    whole = {name: value for name, value in rest.items() if "/" not in name}
    parts = {name: value for name, value in rest.items() if "/" in name}
    return (
        (_rows(whole, intervals) if whole else "")
        + (_classes(classes, intervals, result) if classes else "")
        + _notes(result)
        + (_folded("in detail", _rows(parts, intervals)) if parts else "")
    )


def _notes(result: Mapping) -> str:
    said = "".join(
        f"<li><b>{html.escape(str(name))}</b>: {html.escape(str(text))}</li>"
        for name, text in (result.get("notes") or {}).items()
    )
    return f"<ul class='notes'>{said}</ul>" if said else ""


def _folded(title: str, body: str, is_open: bool = False) -> str:
    state = " open" if is_open else ""
    return f"<details{state}><summary>{title}</summary>{body}</details>"


def _grid(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    """A table of cells that are HTML already; the first of a row is its heading."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{first}</th>"
        + "".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in others)
        + "</tr>"
        for first, *others in rows
    )
    return f"<div class='scroll {kind}'><table><tr>{top}</tr>{body}</table></div>"


def _rows(numbers: Mapping, intervals: Mapping) -> str:
    references = {name: f"{name}_real" for name in numbers if f"{name}_real" in numbers}
    shown = [name for name in numbers if name not in references.values()]
    sure = any(name in intervals for name in shown)
    body = []
    for name in shown:
        cells = [html.escape(name), html.escape(word(numbers[name]))]
        if sure:
            cells.append(interval(intervals.get(name)))
        if references:
            cells.append(_value(numbers, intervals, references.get(name)))
        body.append(cells)
    head = ["number", "value"] + ["95 % interval"] * sure
    return _grid(head + ["real data"] * bool(references), body)


def _value(numbers: Mapping, intervals: Mapping, name: str | None) -> str:
    """A number with its interval below, or '' where there is none."""
    if name not in numbers:
        return ""
    below = interval(intervals.get(name))
    below = f"<small>{below}</small>" if below else ""
    return html.escape(word(numbers[name])) + below


def _classes(table: Mapping[str, Mapping], intervals: Mapping, result: Mapping) -> str:
    """A row for each class, or other part, and a column for each metric."""
    names = set(result.get("class_names") or ())
    metrics = list(dict.fromkeys(metric for row in table.values() for metric in row))
    bad = {
        m: curves.worst(m, {part: row.get(m) for part, row in table.items()})
        for m in metrics
    }
    body = []
    for part in table:
        cells = [html.escape(part)]
        for metric in metrics:
            state = " class='worst'" if part in bad[metric] else ""
            value = _value(result["numbers"], intervals, f"{metric}/{part}")
            cells.append(f"<td{state}>{value}</td>")
        body.append(cells)
    head = ["class" if names >= set(table) else "", *map(html.escape, metrics)]
    said = "<p class='legend'>marked: the worst of a column</p>"
    return _grid(head, body, "tall") + (said if any(bad.values()) else "")


def _comparison(result: Mapping) -> str:
    """Samplers by rows, evaluations of `predict` by columns; a table a metric."""
    numbers, intervals = result["numbers"], result.get("intervals") or {}
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name in numbers:
        # A sampler is named with its options, in which there may be any character.
        rest, _, metric = name.rpartition("/")
        sampler, _, count = rest.rpartition("/")
        if not sampler:
            sampler, count = "real data", ""
        found.setdefault(metric, {}).setdefault(sampler, {})[count] = name
    parts = []
    for metric, rows in found.items():
        counts = {count for row in rows.values() for count in row if count}
        # '16', or '16 (0.01)' where two tolerances of a sampler need as many.
        counts = sorted(counts, key=lambda c: (len(c.partition(" ")[0]), c))
        body = []
        for sampler, row in rows.items():
            if "" in row:
                value = _value(numbers, intervals, row[""])
                body.append([sampler, f"<td colspan='{len(counts)}'>{value}</td>"])
            else:
                cells = [_value(numbers, intervals, row.get(c)) for c in counts]
                body.append([html.escape(sampler), *cells])
        title = html.escape(f"{metric}, by evaluations of predict per sample")
        table = _grid(["", *map(html.escape, counts)], body, "tall")
        parts.append(_folded(title, table, is_open=not parts))
    return "".join(parts) + _notes(result)


def provenance(about: Mapping) -> str:
    """A sentence about where the numbers come from, above all that is known of it."""
    if not about:
        return ""
    sentence = html.escape(_sentence(about)) or "where the numbers come from"
    known = html.escape(json.dumps(about, indent=2))
    return f"<div class='about'>{_folded(sentence, f'<pre>{known}</pre>')}</div>"


def _sentence(about: Mapping) -> str:
    samples, reference, network = (
        part if isinstance(part := about.get(name), Mapping) else {}
        for name in ("samples", "reference", "network")
    )
    said = []
    if "num" in samples:
        told = _listed({k: samples[k] for k in ("step", "ema", "seed") if k in samples})
        said.append(f"{word(samples['num'])} samples{told}")
    if reference:
        known = reference.get("num")
        number = f"{word(known)} examples of " if known else ""
        rest = {k: v for k, v in reference.items() if k not in ("num", "name")}
        said.append(f"against {number}{reference.get('name', '')}{_listed(rest)}")
    if network:
        rest = {k: v for k, v in network.items() if k != "network"}
        said.append(f"features of {network.get('network', '')}{_listed(rest)}")
    if version := about.get("diffusionlab"):
        said.append(f"diffusionlab {version}")
    return "; ".join(said)


def _listed(known: Mapping) -> str:
    """' (key value, ...)' of what is short; of a hash the first eight digits."""
    words = []
    for key, value in known.items():
        if isinstance(value, str) and re.fullmatch("[0-9a-f]{16,}", value):
            value = value[:8]
        if isinstance(value, str | int | float) and len(str(value)) < 60:
            words.append(f"{key} {value}")
    return f" ({', '.join(words)})" if words else ""
