"""A sweep as a table: what each trial was asked for, what it reached, what it cost.

Everything is read from the directory of the sweep, whether trials run or not. Nothing
here imports JAX, Optuna or submitit.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import pathlib
import statistics
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import pandas

from diffusionlab.writers import METRICS_FILE, number
from launch import definition
from launch import trial as trial_lib

ENDED = ("done", "given up", "cancelled", "pruned")
"""States that a trial stays in unless the user asks for more."""

_ABOUT = ("trial", "state", "best")
_COSTS = ("step", "seconds", "attempts", "preemptions", "failures", "message")
_MERGED = ("deviation", "runs", "missing", "trials")
_VAGUE = ("value", "name", "seed")  # as the whole of a short name
_MAX_STEPS = 800  # kept of a metric: a sweep must fit into memory


@dataclasses.dataclass(frozen=True)
class Record:
    """All that a trial's directory says.

    Attributes:
      trial: the directory.
      number: of the trial, from 0.
      overrides: key of the config -> value, of the point and common ones.
      state: see `launch.trial.state`.
      attempts: those that started, or ended without.
      failures: how many of them count.
      measured: name -> {step: value} in order, as it stands in metrics.jsonl; of very
        many some, evenly, with the last finite one.
      result: see `launch.trial.Trial.result`.
      seconds: that its attempts ran; of one that goes on, until now.
    """

    trial: trial_lib.Trial
    number: int
    overrides: Mapping[str, Any]
    state: str
    attempts: Sequence[trial_lib.Attempt]
    failures: int
    measured: Mapping[str, Mapping[int, Any]]
    result: Mapping[str, Any] | None
    seconds: float

    @property
    def step(self) -> int:
        last = [max(by_step) for by_step in self.measured.values()]
        return max([self.result["step"]] if self.result else last, default=0)

    def value(self, metric: str) -> float | None:
        """Returns the last finite value; of a finished trial what its result says.

        A result that is not finite has none, whatever was measured before.
        """
        if self.result is not None and metric in self.result["numbers"]:
            return number(self.result["numbers"][metric])
        values = map(number, reversed(self.measured.get(metric, {}).values()))
        return next((value for value in values if value is not None), None)


def read(sweep: pathlib.Path, alive: Mapping[str, str] | None = None) -> list[Record]:
    """Returns the trials of a sweep by number.

    Args:
      sweep: its directory.
      alive: 'waiting' or 'running' by job, of the engine.

    Raises:
      FileNotFoundError: the directory is of no sweep.
      ValueError: a metrics file is damaged before its last line; names it.
    """
    allowance = definition.read_sweep(sweep)["max_failures"]
    files = pathlib.Path(sweep).glob(f"runs/*/{trial_lib.TRIAL_FILE}")
    trials, alive = (trial_lib.Trial(path.parent) for path in files), alive or {}
    records = [record(trial, alive, allowance) for trial in trials]
    return sorted(records, key=lambda record: (record.number, record.trial.name))


def frame(
    sweep: pathlib.Path,
    alive: Mapping[str, str] | None = None,
    metric: str | None = None,
    goal: str | None = None,
) -> pandas.DataFrame:
    """Returns a row for each trial, by number.

    The columns are trial, state, best ('*' or ''), each override that varies under a
    short name, the metric under its full name, step, seconds, attempts, preemptions,
    failures, and the message of the last failure. Lists, mappings and None are text.

    Args:
      sweep: its directory.
      alive: 'waiting' or 'running' by job, of the engine.
      metric: 'eval/mixture/excess', 'train/loss', ...; None is the sweep's own, and
        where that is '' there is no such column.
      goal: 'min' or 'max'; None is the sweep's own.

    Raises:
      FileNotFoundError: the directory is of no sweep.
      ValueError: no trial has measured the metric, and it is not that they may yet.
    """
    own = definition.read_sweep(sweep)
    metric = own["metric"] if metric is None else metric
    records = read(sweep, alive)
    expected = metric == own["metric"] and all(r.result is None for r in records)
    if metric and not expected:
        _check_measured(metric, records, sweep)
    return frame_of(records, metric, own["goal"] if goal is None else goal)


def frame_of(records: Sequence[Record], metric: str, goal: str) -> pandas.DataFrame:
    """Returns the table of trials that are read already; see `frame`."""
    names = short_names(varying(records), (*_ABOUT, *_COSTS, *_MERGED, metric))
    winner = best_of(records, metric, goal) if metric else None
    columns: dict[str, Any] = {
        "trial": [record.trial.name for record in records],
        "state": [record.state for record in records],
        "best": ["*" if record is winner else "" for record in records],
    }
    for key, name in names.items():
        columns[name] = _column([_cell(record.overrides, key) for record in records])
    if metric:
        values = [record.value(metric) for record in records]
        columns[metric] = pandas.Series(values, dtype=float)
    columns["step"] = [record.step for record in records]
    columns["seconds"] = [round(record.seconds, 1) for record in records]
    columns["attempts"] = [len(record.attempts) for record in records]
    causes = [[attempt.cause for attempt in record.attempts] for record in records]
    columns["preemptions"] = [c.count(trial_lib.PREEMPTED) for c in causes]
    columns["failures"] = [record.failures for record in records]
    columns["message"] = [_message(record.attempts) for record in records]
    return pandas.DataFrame(columns)


def grouped(
    frame: pandas.DataFrame, metric: str, goal: str = "min"
) -> pandas.DataFrame:
    """Returns a row for all trials that differ in their seed only, the best first.

    The columns are best ('*' or ''), the overrides, the mean of the metric (a column of
    `frame`) over finished trials, their sample standard deviation (nothing for one),
    runs, how many those are, and missing, how many of the group have no value: failed,
    not finite or not finished. Groups with a trial that may still finish come last.
    """
    names = override_columns(frame, metric, seed=False)
    columns = ["best", *names, metric, *_MERGED[:-1]]
    return pandas.DataFrame(groups(frame, metric, goal), columns=columns)


def groups(frame: pandas.DataFrame, metric: str, goal: str) -> list[dict[str, Any]]:
    """Returns the rows of `grouped`, each with the names of its `trials`."""
    sign, names = _sign(goal), override_columns(frame, metric, seed=False)
    members: dict[tuple, list[dict]] = defaultdict(list)
    for row in frame.to_dict("records"):
        members[tuple(_same(row[name]) for name in names)].append(row)
    ranked = []
    for rows in members.values():
        done = [row[metric] for row in rows if row["state"] == "done"]
        values = [value for value in done if number(value) is not None]
        mean = statistics.fmean(values) if values else math.nan
        merged = {"best": "", **{name: rows[0][name] for name in names}, metric: mean}
        merged["deviation"] = statistics.stdev(values) if len(values) > 1 else math.nan
        merged |= {"runs": len(values), "missing": len(rows) - len(values)}
        merged["trials"] = [row["trial"] for row in rows]
        unfinished = any(row["state"] not in ENDED for row in rows)
        ranked.append(((unfinished, not values, sign * mean if values else 0), merged))
    ranked.sort(key=lambda pair: pair[0])
    if ranked and ranked[0][0][:2] == (False, False):
        ranked[0][1]["best"] = "*"
    return [merged for _, merged in ranked]


def best(
    sweep: pathlib.Path, metric: str | None = None, goal: str | None = None
) -> pathlib.Path:
    """Returns the directory of the best finished trial; of equal ones the first.

    Args:
      sweep: its directory.
      metric: None is the sweep's own.
      goal: 'min' or 'max'; None is the sweep's own.

    Raises:
      FileNotFoundError: the directory is of no sweep.
      ValueError: no finished trial has a value, or the metric is unknown.
    """
    own = definition.read_sweep(sweep)
    metric = own["metric"] if metric is None else metric
    if not metric:
        raise ValueError(f"--metric: '{sweep}' names none of its own; give one.")
    records = read(sweep)
    if any(record.result is not None for record in records):
        _check_measured(metric, records, sweep)
    found = best_of(records, metric, own["goal"] if goal is None else goal)
    if found is None:
        raise ValueError(f"'{sweep}': no trial is finished with a '{metric}' yet.")
    return found.trial.folder


def best_of(records: Iterable[Record], metric: str, goal: str) -> Record | None:
    """Returns the best finished trial that has a value; of equal ones the first."""
    values, sign = (
        [(r.value(metric), r) for r in records if r.state == "done"],
        _sign(goal),
    )
    known = [(sign * value, r) for value, r in values if value is not None]
    return min(known, key=lambda pair: pair[0])[1] if known else None


def write(frame: pandas.DataFrame, path: pathlib.Path) -> None:
    """Writes a table, whole or not at all, in place of what was there.

    Args:
      frame: any table; numbers of a '.md' have six digits.
      path: ends in '.csv' or '.md'.

    Raises:
      ValueError: it has another ending.
    """
    path = pathlib.Path(path)
    texts = {".csv": lambda: frame.to_csv(index=False), ".md": lambda: markdown(frame)}
    if path.suffix not in texts:
        raise ValueError(f"--out: '{path}' must end in {' or '.join(texts)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    part.write_text(texts[path.suffix](), encoding="utf-8")
    os.replace(part, path)


def markdown(frame: pandas.DataFrame) -> str:
    """Returns the table as markdown, numbers to the right."""
    right = [pandas.api.types.is_numeric_dtype(frame[name]) for name in frame]
    rules = ["---:" if number else "---" for number in right]
    rows = [frame.columns, rules, *frame.itertuples(index=False, name=None)]
    lines = [" | ".join(map(_markdown_cell, row)) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def override_columns(
    frame: pandas.DataFrame, metric: str, seed: bool = True
) -> list[str]:
    """Returns the columns of `frame` that are overrides, with or without the seed."""
    others = {*_ABOUT, *_COSTS, *_MERGED, metric, *(() if seed else ("seed",))}
    return [name for name in frame.columns if name not in others]


def varying(records: Sequence[Record]) -> list[str]:
    """Returns the keys of overrides that are not alike in all trials, the seed last."""
    keys = dict.fromkeys(key for record in records for key in record.overrides)
    # A key that a trial lacks has a value of its own there.
    missing = object()
    found = {k: {_same(r.overrides.get(k, missing)) for r in records} for k in keys}
    several = [key for key, values in found.items() if len(values) > 1]
    return sorted(several, key=lambda key: key == definition.SEED)


def short_names(keys: Sequence[str], reserved: Collection[str] = ()) -> dict[str, str]:
    """Returns the shortest end of each key that no other has; of the seed 'seed'."""
    plain = {key: key.removeprefix("config.") for key in keys}
    names = {}
    for key, full in plain.items():
        words = full.split(".")
        ends = (".".join(words[i:]) for i in reversed(range(len(words))))
        others = [f".{other}" for k, other in plain.items() if k != key]
        clear = (
            end
            for end in ends
            if end not in reserved
            and (end not in _VAGUE or end == full)
            and not any(other.endswith(f".{end}") for other in others)
        )
        # The whole of a key may be the end of another one, which then has more.
        names[key] = next(clear, key if full in reserved else full)
    return names


def record(trial, alive: Mapping[str, str], allowance: int) -> Record:
    """Returns all that a trial's directory says; see `read`."""
    asked, events, result = trial.asked(), trial.events(), trial.result()
    known = trial_lib.attempts_of(events)
    attempts = [a for a in known if a.started is not None or a.cause is not None]
    measured: dict[str, dict[int, Any]] = defaultdict(dict)
    for row in trial.rows():
        for name, value in row.items():
            if name != "step" and not isinstance(value, list):
                measured[name][row["step"]] = value
    for name, value in (result or {"numbers": {}})["numbers"].items():
        measured[name].setdefault(result["step"], value)
    return Record(
        trial=trial,
        number=asked["number"],
        overrides={**asked.get("overrides", {}), **asked.get("point", {})},
        state=trial_lib.state(result, events, alive, allowance),
        attempts=attempts,
        failures=trial_lib.failures(events),
        measured={name: _thinned(by_step) for name, by_step in measured.items()},
        result=result,
        seconds=sum(_seconds(a, alive, trial) for a in attempts),
    )


def _thinned(by_step: Mapping[int, Any]) -> dict[int, Any]:
    steps = sorted(by_step)
    stride = (len(steps) - 1) / (_MAX_STEPS - 1)
    if stride > 1:
        last = [step for step in steps if number(by_step[step]) is not None][-1:]
        steps = sorted({*last, *(steps[round(i * stride)] for i in range(_MAX_STEPS))})
    return {step: by_step[step] for step in steps}


def _seconds(attempt, alive: Mapping[str, str], trial) -> float:
    """How long it ran; an end that nobody wrote down is that of its metrics."""
    if attempt.started is None:
        return 0.0
    ended, path = attempt.ended, trial.folder / METRICS_FILE
    if ended is None and alive.get(attempt.job) == "running":
        ended = time.time()
    elif ended is None:
        ended = path.stat().st_mtime if path.is_file() else attempt.started
    return max(0.0, ended - attempt.started)


def _message(attempts: Sequence[trial_lib.Attempt]) -> str:
    failed = [a for a in attempts if a.cause in trial_lib.COUNTED]
    return (failed[-1].message or failed[-1].cause) if failed else ""


def _check_measured(metric: str, records: Sequence[Record], sweep) -> None:
    names = sorted({name for record in records for name in record.measured})
    if not names or metric in names:
        return
    near = [name for name in names if name.endswith(metric)][:5]
    near = near or difflib.get_close_matches(metric, names, n=5, cutoff=0.0)
    raise ValueError(
        f"--metric: no trial of '{sweep}' has measured '{metric}'; the nearest of what "
        f"they have: {', '.join(near)}."
    )


def _cell(overrides: Mapping[str, Any], key: str) -> Any:
    """None where there is no such override; None itself, lists, mappings are text."""
    value = overrides.get(key)
    if isinstance(value, list | dict):
        return json.dumps(value)
    return "None" if value is None and key in overrides else value


def _column(cells: list[Any]) -> pandas.Series:
    """Numbers as such; whole ones stay whole where others are missing."""
    plain = all(isinstance(c, int | float) and not isinstance(c, bool) for c in cells)
    return pandas.Series(cells, dtype=None if plain and cells else object)


def _same(value: Any) -> Any:
    """Equal for values that mean the same: 1 and 1.0, not 1 and True."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(float(value))
    return json.dumps(value, sort_keys=True, default=repr)


def _sign(goal: str) -> int:
    if goal not in ("min", "max"):
        raise ValueError(f"--goal: must be min or max, got '{goal}'.")
    return 1 if goal == "min" else -1


def _markdown_cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())
