"""The page of a sweep: `report.html` in its directory, beside those of its trials.

One file that loads nothing from elsewhere, and that can be written at any time: what is
not there yet is absent from the page.
"""

from __future__ import annotations

import html
import json
import math
import os
import pathlib
import re
import urllib.parse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas

from diffusionlab import curves, inline, progress, report, writers
from diffusionlab import report_tables as tables
from launch import definition, table

_ASSETS = pathlib.Path(__file__).parent / "assets"
_STYLE = pathlib.Path(report.__file__).parent / "assets" / "report.css"
_MAX_IMAGE_BYTES = 6_000_000  # of all pictures together, before base64
_MIN_IMAGE_BYTES = 40_000  # below, nothing could be seen
_MAX_TEXT = 2_000  # characters of a trial's samples
_MAX_POINTS = 240_000  # of all curves together
_MAX_POINTS_OF_ONE = 400
_FIRST = ("eval/", "train/", "sample/")
_STATES = (*table.ENDED[:1], "running", "queued", "submitting", "waiting", "gone")
_STATES += table.ENDED[1:]
_FAILED = ("pruned", "given up", "cancelled")


def write_page(
    sweep: pathlib.Path, alive: Mapping[str, str] | None = None
) -> pathlib.Path:
    """Writes `report.html` into the directory of a sweep, and returns its path.

    Args:
      sweep: its directory.
      alive: 'waiting' or 'running' by job, of the engine.

    Raises:
      FileNotFoundError: the directory is of no sweep.
      ValueError: a metrics file is damaged before its last line; names it.
    """
    sweep = pathlib.Path(sweep)
    about, records = definition.read_sweep(sweep), table.read(sweep, alive)
    path = sweep / "report.html"
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    part.write_text(_page(sweep, about, records), encoding="utf-8")
    os.replace(part, path)
    return path


def _page(sweep: pathlib.Path, about: Mapping, records: Sequence[table.Record]) -> str:
    metric, goal = about["metric"], about["goal"]
    frame = table.frame_of(records, metric, goal)
    names = table.override_columns(frame, metric)
    best = table.best_of(records, metric, goal) if metric else None
    measured = _curves(records, metric)
    several = [name for name in names if name != "seed"]
    sections = [
        ("Groups", _groups(frame, metric, goal) if metric and "seed" in names else ""),
        ("Trials", _trials(frame, sweep) if records else ""),
        ("Curves", "<div id='curves'></div>" if measured else ""),
        ("Overrides", "<div id='overrides'></div>" if metric and names else ""),
        ("Samples", _samples(sweep, records, frame, names, metric, goal)),
        ("Definition", f"<pre>{html.escape(json.dumps(about, indent=2))}</pre>"),
    ]
    data = {
        "metric": metric,
        "names": several or names,
        "trials": _data(frame, names, metric),
        "curves": measured,
        "failed": _FAILED,
    }
    return _document(
        title=html.escape(about["name"]),
        head=_head(about, records, best) + _progress(records),
        sections=[(title, body) for title, body in sections if body],
        data=data,
    )


def _document(*, title: str, head: str, sections: list, data: Mapping) -> str:
    """The page around its parts, which are HTML already."""
    style = _STYLE.read_text(encoding="utf-8")
    style += (_ASSETS / "sweep.css").read_text(encoding="utf-8")
    script = (_ASSETS / "sweep.js").read_text(encoding="utf-8")
    links = "".join(f"<a href='#{name.lower()}'>{name}</a>" for name, _ in sections)
    bodies = "\n".join(
        f"<section id='{name.lower()}'><h2>{name}</h2>{body}</section>"
        for name, body in sections
    )
    # '<' never stands in the data, so no text in them can close the element.
    inlined = json.dumps(data, allow_nan=False, separators=(",", ":"))
    inlined = inlined.replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang='en'><head><meta charset='utf-8'>
<meta name='viewport' content='width=device-width, initial-scale=1'>
<title>{title} · diffusionlab</title><link rel='icon' href='data:,'>
<style>{style}</style></head>
<body class='sweep'><header><p class='kicker'>diffusionlab sweep</p><h1>{title}</h1>
{head}<nav>{links}</nav></header>
<main>{bodies}</main>
<script type='application/json' id='data'>{inlined}</script>
<script>{script}</script></body></html>
"""


def _head(about: Mapping, records, best: table.Record | None) -> str:
    tiles = [("trials", f"{len(records):,}", f"on {about['engine']}")]
    if best is not None:
        which = {"min": "lowest", "max": "highest"}[about["goal"]]
        value = tables.word(best.value(about["metric"]))
        tiles.append((f"{which} {about['metric']}", value, "of finished trials"))
        tiles.append(("best trial", best.trial.name, f"at step {best.step:,}"))
    seconds = sum(record.seconds for record in records)
    tiles.append(("time of all trials", progress.duration(seconds), ""))
    items = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
        f"<small>{html.escape(note)}</small></div>"
        for name, value, note in tiles
    )
    chosen = ", ".join(about.get("sweeps") or ()) or about.get("search")
    facts = [("config", about["config"]), ("sweep", chosen)]
    facts.append(("revision", about.get("revision")))
    said = " · ".join(
        f"{name} <code>{html.escape(str(value))}</code>"
        for name, value in facts
        if value
    )
    return f"<p class='facts'>{said}</p><dl class='tiles'>{items}</dl>"


def _progress(records: Sequence[table.Record]) -> str:
    """How many are in which state, as a bar and in words."""
    counts = Counter(record.state for record in records)
    if not counts:
        return "<p class='facts'>there is no trial yet</p>"
    known = [(state, counts[state]) for state in _STATES if counts[state]]
    bar = "".join(
        f"<i class='{_slug(state)}' style='flex:{number}'></i>"
        for state, number in known
    )
    words = "".join(
        f"<span><i class='{_slug(state)}'></i>{number:,} {state}</span>"
        for state, number in known
    )
    return f"<div class='states'>{bar}</div><p class='legend states-legend'>{words}</p>"


def _slug(state: str) -> str:
    return f"state-{state.replace(' ', '-')}"


def _groups(frame: pandas.DataFrame, metric: str, goal: str) -> str:
    places = {name: place for place, name in enumerate(frame["trial"])}
    columns, body = [], []
    for row in table.groups(frame, metric, goal):
        members, mark = row.pop("trials"), row.pop("best")
        columns = list(row)
        cells = [_cell(value) for value in row.values()]
        body.append(_row(cells, [places[name] for name in members], mark))
    said = "the mean over seeds that have finished, and its sample standard deviation"
    return f"<p class='hint'>{said}</p>" + _sortable(columns, body)


def _trials(frame: pandas.DataFrame, sweep: pathlib.Path) -> str:
    body = []
    for place, row in enumerate(frame.to_dict("records")):
        cells = []
        for name, value in row.items():
            if name == "trial":
                cells.append(_name_cell(value, place, sweep))
            elif name == "state":
                text = html.escape(value)
                cells.append(
                    f"<td class='text'><i class='dot {_slug(value)}'></i>{text}</td>"
                )
            elif name == "seconds":
                cells.append(_cell(value, progress.duration(value)))
            elif name != "best":
                cells.append(_cell(value))
        body.append(_row(cells, [place], row["best"]))
    said = "a click on a row marks its curve, a click on a heading sorts"
    columns = ["time" if n == "seconds" else n for n in frame.columns if n != "best"]
    return f"<p class='hint'>{said}</p>" + _sortable(columns, body)


def _name_cell(name: str, place: int, sweep: pathlib.Path) -> str:
    return (
        f"<td class='text'><button type='button' class='pick' aria-pressed='false'>"
        f"<i style='background:var(--t{place})'></i>{html.escape(name)}</button>"
        f"{_link(name, sweep)}</td>"
    )


def _link(name: str, sweep: pathlib.Path) -> str:
    """To the page of the trial itself, where it has one."""
    if not (sweep / "runs" / name / "report.html").is_file():
        return ""
    target = html.escape(f"runs/{urllib.parse.quote(name)}/report.html")
    return f" <a href='{target}' title='report of {html.escape(name)}'>report</a>"


def _row(cells: list[str], places: Sequence[int], best: str) -> str:
    kind = " class='best'" if best else ""
    trials = " ".join(map(str, places))
    return f"<tr{kind} data-trials='{trials}'>{''.join(cells)}</tr>"


def _cell(value: Any, shown: str | None = None) -> str:
    """A cell that sorts as the number it is, else as its text; the empty come last."""
    number = writers.number(value) if not isinstance(value, str) else None
    if number is not None:
        shown = tables.word(value) if shown is None else shown
        return f"<td data-number='{number!r}'>{html.escape(shown)}</td>"
    text = "" if value is None or isinstance(value, float) else str(value)
    title = f" title='{html.escape(text)}'" if len(text) > 40 else ""
    return f"<td class='text'{title}>{html.escape(text)}</td>"


def _sortable(columns: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(
        f"<th scope='col'><button type='button'>{html.escape(name)}</button></th>"
        for name in columns
    )
    return (
        "<div class='scroll tall'><table class='sortable'>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _data(frame: pandas.DataFrame, names: Sequence[str], metric: str) -> list[dict]:
    """The trials as the script takes them."""
    result = []
    for row in frame.to_dict("records"):
        overrides = {name: _plain(row[name]) for name in names}
        value = writers.number(row[metric]) if metric else None
        result.append({"name": row["trial"], "state": row["state"], "value": value})
        result[-1] |= {"best": bool(row["best"]), "overrides": overrides}
    return result


def _plain(value: Any) -> float | str | None:
    """A finite number, else text; None where there is none."""
    if isinstance(value, str | bool):
        return str(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return value if writers.number(value) is not None else str(value)


def _curves(records: Sequence[table.Record], metric: str) -> dict[str, dict]:
    """Returns name -> {place of the trial: [step, value, step, value, ...]}."""
    found: dict[str, dict[int, list]] = {}
    for place, record in enumerate(records):
        for name, by_step in record.measured.items():
            points = [(step, writers.number(value)) for step, value in by_step.items()]
            if any(value is not None for _, value in points):
                found.setdefault(name, {})[place] = points
    total = sum(map(len, found.values()))
    limit = max(24, min(_MAX_POINTS_OF_ONE, _MAX_POINTS // max(1, total)))

    def flat(points):
        return [
            part
            for step, value in curves.evenly(points, limit)
            for part in (step, value if value is None else float(f"{value:.6g}"))
        ]

    def rank(name):
        places = (i for i, start in enumerate(_FIRST) if name.startswith(start))
        return name != metric, next(places, len(_FIRST)), name

    return {
        name: {place: flat(points) for place, points in found[name].items()}
        for name in sorted(found, key=rank)
    }


def _samples(sweep, records, frame, names, metric: str, goal: str) -> str:
    """The newest samples of each trial, the best first."""
    shown = []
    for record, row in zip(records, frame.to_dict("records"), strict=True):
        folder = record.trial.folder / "samples"
        files = [sorted(folder.glob(f"step_*.{kind}"))[-1:] for kind in ("png", "txt")]
        value = record.value(metric) if metric else None
        worst = value is None or record.state in _FAILED
        order = (worst, (value or 0) * (1 if goal == "min" else -1), record.number)
        if any(files):
            shown.append((order, record, row, sum(files, [])))
    shown.sort(key=lambda item: item[0])
    pictures = sum(path.suffix == ".png" for *_, paths in shown for path in paths)
    share = max(_MIN_IMAGE_BYTES, _MAX_IMAGE_BYTES // max(1, pictures))
    left, figures, skipped = _MAX_IMAGE_BYTES, [], 0
    for _, record, row, paths in shown:
        bodies = []
        for path in paths:
            if path.suffix == ".txt":
                bodies.append(inline.text(path, _MAX_TEXT))
                continue
            picture = inline.picture(path, share, width=800) if left else ""
            size = len(picture) * 3 // 4  # before base64
            if not picture or size > left:
                left, skipped = 0, skipped + 1
                continue
            left -= size
            alt = html.escape(f"samples of {record.trial.name}")
            bodies.append(f"<img src='{picture}' alt='{alt}'>")
        if bodies:
            step = int(re.sub(r"\D", "", paths[0].stem) or 0)
            caption = _caption(record, row, names, metric, step, sweep)
            figures.append(f"<figure>{''.join(bodies)}{caption}</figure>")
    note = f"left out, to keep this page small: {skipped} pictures" if skipped else ""
    if not figures:
        return ""
    return f"<div class='gallery'>{''.join(figures)}</div><p class='hint'>{note}</p>"


def _caption(record, row: Mapping, names, metric: str, step: int, sweep) -> str:
    known = [
        f"{name} = {tables.word(row[name])}" for name in names if _is_set(row[name])
    ]
    value = record.value(metric) if metric else None
    if value is not None:
        known.append(f"{metric}: {tables.word(value)}")
    state = "" if record.state == "done" else f", {record.state}"
    name, at = html.escape(record.trial.name), html.escape(f"step {step:,}{state}")
    said = "".join(f"<span>{html.escape(text)}</span>" for text in known)
    link = _link(record.trial.name, sweep)
    return f"<figcaption><b>{name}</b> {at}{link}<br>{said}</figcaption>"


def _is_set(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))
