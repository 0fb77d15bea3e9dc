"""One self-contained page about a run: `report.html` in its directory.

Everything is taken from what lies there (config, environment, metrics, sample grids,
evaluations); a part that is missing is absent from the page. Pictures and data are
inside the file, so it can be sent to somebody, and nothing is loaded from elsewhere.
"""

from __future__ import annotations

import html
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from diffusionlab import curves, inline, strip, writers
from diffusionlab import report_tables as tables
from diffusionlab import workdir as workdir_lib

_ASSETS = pathlib.Path(__file__).parent / "assets"
_MAX_GRIDS = 24
_MAX_IMAGE_BYTES = 4_000_000  # of all pictures together, before base64
_MAX_TEXT = 20_000  # characters of samples
_TILES = (
    *("frechet", "inception_score", "kernel", "agreement", "precision", "recall"),
    *("excess", "inside", "loss"),
)


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
    """Writes `report.html` into the run directory and returns its path.

    A directory that holds evaluations and nothing else has a page of those.

    Raises:
      FileNotFoundError: there is no such directory.
    """
    workdir = pathlib.Path(workdir).resolve()
    if not workdir.is_dir():
        raise FileNotFoundError(f"{workdir}: there is no such run directory.")
    path = workdir / "report.html"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(_page(workdir), encoding="utf-8")
    os.replace(temporary, path)
    return path


def _page(workdir: pathlib.Path) -> str:
    config = _json(workdir / "config.json")
    environment = _json(workdir / "environment.json")
    metrics = workdir / writers.METRICS_FILE
    rows = writers.read_rows(metrics) if metrics.exists() else []
    evals = [_json(path) for path in sorted((workdir / "evals").glob("*.json"))]
    evals = sorted((e for e in evals if e), key=lambda e: e["step"])
    latest = {e["evaluator"]: e for e in evals}
    # What can be looked at comes first.
    latest = dict(sorted(latest.items(), key=lambda item: not item[1].get("pictures")))
    compared = {name: e for name, e in latest.items() if tables.compares(e)}
    others = {name: e for name, e in latest.items() if name not in compared}
    measured = curves.collect(rows, evals)
    grids = curves.evenly(sorted((workdir / "samples").glob("step_*.png")), _MAX_GRIDS)
    shown = [workdir / p for e in latest.values() for p in e.get("pictures", ())]
    shown = [path for path in shown if path.is_file()]
    budget = _MAX_IMAGE_BYTES // (1 + len(grids) + len(shown))
    charts = curves.charts(measured, curves.intervals(evals))
    levels = curves.levels(measured)
    sections = [
        ("Evaluation", _evaluations(others, workdir, budget)),
        ("Quality against steps", _evaluations(compared, workdir, budget)),
        (
            "Samples over time" if len(grids) > 1 else "Samples",
            _slider(grids, budget) + _strip(workdir, grids, budget) + _texts(workdir),
        ),
        ("Loss by noise level", _canvas("levels", levels)),
        ("Curves", _canvas("charts", charts)),
        ("Config", _tree(config) if config else ""),
        ("Environment", _tree(environment) if environment else ""),
    ]
    return _document(
        title=html.escape(workdir.name),
        kind="run" if config else "evaluation",
        tiles=_tiles(rows, latest, _json(workdir / workdir_lib.BEST_FILE)),
        sections=[(title, body) for title, body in sections if body],
        data={"charts": charts, "levels": levels},
    )


def _document(
    *, title: str, kind: str, tiles: str, sections: list, data: Mapping
) -> str:
    """The page around its parts, which are HTML already."""
    style, script = (
        (_ASSETS / name).read_text(encoding="utf-8")
        for name in ("report.css", "report.js")
    )
    links = "".join(f"<a href='#{_slug(name)}'>{name}</a>" for name, _ in sections)
    bodies = "\n".join(
        f"<section id='{_slug(name)}'><h2>{name}</h2>{body}</section>"
        for name, body in sections
    )
    # '<' never stands in the data, so no text in them can close the element.
    inlined = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang='en'><head><meta charset='utf-8'>
<meta name='viewport' content='width=device-width, initial-scale=1'>
<title>{title} · diffusionlab</title><link rel='icon' href='data:,'>
<style>{style}</style></head>
<body><header><p class='kicker'>diffusionlab {kind}</p><h1>{title}</h1>
{tiles}<nav>{links}</nav></header>
<main>{bodies}</main>
<script type='application/json' id='data'>{inlined}</script>
<script>{script}</script></body></html>
"""


def _json(path: pathlib.Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _canvas(name: str, found: list) -> str:
    """Where report.js draws the charts of this name."""
    return f"<div class='charts' data-from='{name}'></div>" if found else ""


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def _tiles(rows, latest, best) -> str:
    """The few numbers to see first."""
    tiles: list[tuple[str, str, str]] = []
    steps = [row["step"] for row in rows] + [e["step"] for e in latest.values()]
    if any(steps):
        tiles.append(("steps", f"{max(steps):,}", ""))
    if best:
        which = {"min": "lowest", "max": "highest"}[best["mode"]]
        note = f"{which} {best['metric']}: {tables.word(best['value'])}"
        tiles.append(("best step", f"{best['step']:,}", note))
    losses = [tables.word(row["train/loss"]) for row in rows if "train/loss" in row]
    if losses:
        tiles.append(("training loss", losses[-1], f"from {losses[0]}"))
    given = [name for result in latest.values() for name in result["numbers"]]
    for label, result in latest.items():
        numbers = result["numbers"]
        for name in (name for name in _TILES if name in numbers):
            real, notes = numbers.get(f"{name}_real"), []
            if ends := (result.get("intervals") or {}).get(name):
                notes.append(f"95 %: {tables.interval(ends)}")
            if real is not None:
                notes.append(f"real data: {tables.word(real)}")
            title = f"{label} {name}" if given.count(name) > 1 else name
            tiles.append((title, tables.word(numbers[name]), "; ".join(notes) or label))
    items = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
        f"<small>{html.escape(note)}</small></div>"
        for name, value, note in tiles
    )
    return f"<dl class='tiles'>{items}</dl>" if items else ""


def _evaluations(latest, workdir, budget) -> str:
    parts = []
    for label, result in latest.items():
        step = result["step"]
        at = f" <small>at step {step:,}</small>" if step else ""
        parts.append(f"<h3>{html.escape(label)}{at}</h3>")
        for picture in result.get("pictures", ()):
            if (workdir / picture).is_file():
                name = pathlib.PurePath(picture).stem
                caption = re.sub(r"^step_\d+_", "", name).replace("_", " ")
                parts.append(_figure(workdir / picture, caption, budget))
        parts.append(tables.of_result(result))
        parts.append(tables.provenance(result.get("provenance") or {}))
    return "".join(parts)


def _figure(path: pathlib.Path, caption: str, budget: int) -> str:
    text = html.escape(caption)
    return (
        f"<figure><img src='{inline.picture(path, budget)}' alt='{text}'>"
        f"<figcaption>{text}</figcaption></figure>"
    )


def _slider(grids: list[pathlib.Path], budget: int) -> str:
    if not grids:
        return ""
    steps = [int(re.sub(r"\D", "", path.stem) or 0) for path in grids]
    images = "".join(
        f"<img src='{inline.picture(path, budget)}' alt='samples at step {step:,}' "
        f"data-step='{step:,}'{' hidden' if path != grids[-1] else ''}>"
        for path, step in zip(grids, steps, strict=True)
    )
    return (
        f"<div class='slider'><div class='frames'>{images}</div><div class='bar'>"
        "<button type='button' aria-label='play'>▶</button><input type='range' min='0' "
        f"max='{len(grids) - 1}' value='{len(grids) - 1}' aria-label='step'>"
        f"<output>step {steps[-1]:,}</output></div></div>"
    )


def _strip(workdir: pathlib.Path, grids: list[pathlib.Path], budget: int) -> str:
    """The same few samples over training; of a single step the grid shows more."""
    path = workdir / "samples" / strip.PICTURE
    if len(grids) < 2 or not path.is_file():
        return ""
    return _figure(path, "the same noise and labels over training", budget)


def _texts(workdir: pathlib.Path) -> str:
    """The newest samples of text, and below them the first ones over training."""
    folder = workdir / "samples"
    files = sorted(folder.glob("step_*.txt"))
    if not files:
        return ""
    step = int(re.sub(r"\D", "", files[-1].stem) or 0)
    parts = [
        f"<h3>text <small>at step {step:,}</small></h3>",
        inline.text(files[-1], _MAX_TEXT),
    ]
    if len(files) > 1 and (folder / strip.TEXT).is_file():
        title = "<summary>the same noise over training</summary>"
        parts.append(
            f"<details>{title}{inline.text(folder / strip.TEXT, _MAX_TEXT)}</details>"
        )
    return "".join(parts)


def _tree(value: Mapping | list) -> str:
    """Nested mappings as a tree that unfolds; everything else as text.

    Of a list of mappings, such as the environments of several starts, the last is open.
    """
    last = len(value) - 1 if isinstance(value, list) else None
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    rows = []
    for name, part in items:
        key = html.escape(str(name if last is None else name + 1))
        if part and (isinstance(part, Mapping) or _is_table(part)):
            hint = part.get("name", "") if isinstance(part, Mapping) else ""
            state = " open" if name == last else ""
            rows.append(
                f"<details{state}><summary>{key} <i>{html.escape(str(hint))}</i>"
                f"</summary>{_tree(part)}</details>"
            )
        else:
            text = part if isinstance(part, str) else json.dumps(part)
            rows.append(f"<p><b>{key}</b><code>{html.escape(text)}</code></p>")
    return f"<div class='tree'>{''.join(rows)}</div>"


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, Mapping) for v in value)
