"""The run directory: it belongs to one config, and nothing in it is ever overwritten.

    config.json        the resolved config
    overrides.json     what was asked for: config file, overrides
    environment.json   versions, devices, revision of the code; a list, one per start
    metrics.jsonl      one row per log point
    best.json          which checkpoint is the best, where config.checkpoint.best asks
    lock               held while a process trains here: who, and since when
    checkpoints/  samples/  evals/  tensorboard/  report.html

Nothing here imports JAX: a directory of another config is refused at once.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import math
import os
import pathlib
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from diffusionlab import config as config_lib
from diffusionlab import writers

LOCK_FILE = "lock"
LAUNCH_FILES = ("trial.json", "attempts.jsonl", "jobs", "driver")
"""What a launcher keeps beside a run: by itself it makes none."""
BEST_FILE = "best.json"


class WorkdirError(RuntimeError):
    """The run directory cannot be used for this; the message says why."""


class InUseError(WorkdirError):
    """Another process is at work there."""


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the resolved config of a run.

    Raises:
      FileNotFoundError: the directory holds no run.
      WorkdirError: its config is damaged.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"--workdir: '{workdir}' holds no run (there is no config.json); train "
            "with --config=... first."
        )
    return read_json(path)


def read_json(path: pathlib.Path) -> Any:
    """Returns what `write_json` wrote; numbers that are not finite are numbers again.

    Raises:
      WorkdirError: the file is damaged.
    """
    try:
        return _numbers(json.loads(path.read_text()))
    except ValueError as error:  # of the JSON, or of the encoding
        raise WorkdirError(
            f"--workdir: '{path}' is damaged ({error}); mend it, or give another "
            "--workdir."
        ) from None


def _has_entries(workdir: pathlib.Path) -> bool:
    """Whether there is more than a launcher's, and the lock of an empty start."""
    try:
        names = {p.name for p in workdir.iterdir()} if workdir.exists() else set()
    except OSError as error:
        raise _unusable(workdir, error) from None
    # What a launcher that was killed left of a file it had not finished.
    names = {n for n in names if not n.startswith(".trial.json.")}
    return bool(names - {LOCK_FILE, *LAUNCH_FILES})


def _unusable(workdir: pathlib.Path, error: OSError) -> WorkdirError:
    return WorkdirError(
        f"--workdir: '{workdir}' cannot be a run directory: {error.strerror}; give "
        "another."
    )


def check(workdir: pathlib.Path, config: Mapping[str, Any], resume: str) -> None:
    """Checks that a run of `config` may start or go on here; writes nothing.

    Raises:
      WorkdirError: the directory belongs to another config, holds something else, has
        more steps than the config, has lost its checkpoints, or `resume` is 'never'
        and a run is there.
    """
    if not _has_entries(workdir):
        return
    if not (workdir / "config.json").is_file():
        raise WorkdirError(
            f"--workdir: '{workdir}' is not empty and holds no run; give another."
        )
    if resume == "never":
        raise WorkdirError(
            f"--workdir: '{workdir}' holds a run, and --resume=never does not "
            "continue one; give another directory."
        )
    stored = read_config(workdir)
    found = config_lib.conflicts(stored, config)
    if found:
        raise WorkdirError(
            f"--workdir: '{workdir}' holds a run of another config; give another "
            "directory, or undo: " + "; ".join(found)
        )
    saved = saved_steps(workdir)
    if not saved:
        _check_never_saved(workdir, stored["checkpoint"]["every"])
    done = max(saved, default=0)
    if done and config["train"]["num_steps"] < done:
        raise WorkdirError(
            f"config.train.num_steps: {config['train']['num_steps']} is less than the "
            f"{done} steps that '{workdir}' has; give {done} or more, or another "
            "directory."
        )


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the finished checkpoints, folders named by a number."""
    folders = workdir.glob("checkpoints/*")
    return sorted(int(p.name) for p in folders if p.name.isdigit())


def find_run(run: str | pathlib.Path, path: str) -> pathlib.Path:
    """Returns the directory of another run, whose parameters are to be used.

    Args:
      run: its directory.
      path: key of the config that names it, for messages.

    Raises:
      FileNotFoundError: there is no run, or none with a checkpoint.
    """
    folder = pathlib.Path(run)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{path}: '{run}' holds no run (there is no config.json); give the "
            "directory of a trained one."
        )
    if not saved_steps(folder):
        raise FileNotFoundError(
            f"{path}: the run in '{run}' has no checkpoint yet; train it first."
        )
    return folder


def is_better(value: float, other: float | None, mode: str) -> bool:
    """Whether a value beats another (None: there is no other); NaN never does."""
    if not math.isfinite(value):
        return False
    return other is None or (value < other if mode == "min" else value > other)


def find_best(
    workdir: pathlib.Path, metric: str, mode: str, last: int | None = None
) -> dict[str, Any] | None:
    """Returns `{metric, mode, step, value}` of the best checkpoint that is there.

    Of equal values the first one counts. None: no checkpoint has a value.

    Args:
      workdir: the run directory.
      metric: as `config.checkpoint.best`.
      mode: 'min' or 'max'.
      last: later steps do not count; None is no limit.
    """
    path, best = workdir / writers.METRICS_FILE, None
    saved, name = set(saved_steps(workdir)), f"eval/{metric}"
    for row in writers.read_rows(path) if path.is_file() else ():
        step, value = row["step"], row.get(name)
        if value is None or step not in saved or (last is not None and step > last):
            continue
        # What is not finite stands there as text.
        if is_better(float(value), best and best["value"], mode):
            best = {"metric": metric, "mode": mode, "step": step, "value": value}
    return best


def best_step(workdir: pathlib.Path) -> int:
    """Returns the step of the best checkpoint of a run.

    Raises:
      ValueError: the run keeps none, or has none yet.
      WorkdirError: best.json is damaged.
    """
    path = workdir / BEST_FILE
    if not path.is_file():
        raise ValueError(
            f"--step=best: '{workdir}' has no {BEST_FILE}: no evaluation gave a value "
            "yet, or config.checkpoint.best names none; give the number of a step."
        )
    best = read_json(path)
    if best["step"] not in saved_steps(workdir):
        # It is being saved at this moment: until then the one before it is there.
        best = find_best(workdir, best["metric"], best["mode"])
    if best is None:
        raise ValueError(
            f"--step=best: the best checkpoint of '{workdir}' is gone; give the number "
            f"of a step: {saved_steps(workdir)}."
        )
    return best["step"]


def _check_never_saved(workdir: pathlib.Path, every: int) -> None:
    """Checks that a run without checkpoints has not lost them, and may start afresh.

    Rows are written while the first save is under way, which may then fail; they end
    where the second one waits for it.
    """
    metrics, result = workdir / writers.METRICS_FILE, workdir / "result.json"
    rows = writers.read_rows(metrics) if metrics.is_file() else []
    last = max((row["step"] for row in rows), default=0)
    gone = rows and not (workdir / "checkpoints").is_dir()
    if gone or last > 2 * every or result.is_file():
        raise WorkdirError(
            f"--workdir: '{workdir}' holds a run (rows up to step {last}), but its "
            "checkpoints are gone: give another --workdir, or remove "
            f"{metrics.name} and {result.name} there to start again at step 0."
        )


@contextlib.contextmanager
def lock(workdir: pathlib.Path, doing: str = "trained in") -> Iterator[None]:
    """Keeps other processes from training here until it is left or this one ends.

    Makes the directory. The lock goes with the process, however that ends; the file
    stays, and is empty when nobody holds it.

    Args:
      workdir: what is locked.
      doing: what is done to it meanwhile, for the message.

    Raises:
      InUseError: another process holds it.
      WorkdirError: the directory cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK_FILE).open("a+")
    except OSError as error:
        raise _unusable(workdir, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InUseError(
                f"--workdir: '{workdir}' is being {doing} by {file.read().strip()}; "
                "wait for it or end it."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise _unusable(workdir, error) from None
            print(f"'{workdir}': no locks here; do not start this run twice at a time")
        file.truncate(0)
        since = datetime.datetime.now().isoformat(" ", "seconds")
        file.write(f"host {socket.gethostname()}, pid {os.getpid()}, since {since}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def claim(
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    asked: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> None:
    """Writes the records of this start; an earlier config is kept beside the new one.

    Args:
      workdir: checked by `check`.
      config: the resolved config.
      asked: config file and overrides of this start.
      environment: see `machine.environment`.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    old = read_json(path) if path.is_file() else None
    if old is not None and old != config:
        number = len(list(workdir.glob("config.*.json")))
        write_json(workdir / f"config.{number}.json", old)
    if old != config:
        write_json(path, config)
    for name, record in (("overrides", asked), ("environment", environment)):
        file = workdir / f"{name}.json"
        records = read_json(file) if file.is_file() else []
        write_json(file, [*records, record])


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a file whole or not at all.

    JSON has no NaN and no infinity: as in metrics.jsonl they are the texts 'nan', 'inf'
    and '-inf', see `read_json`.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(_each(_text, value), indent=2, allow_nan=False)
    part.write_text(text + "\n")
    os.replace(part, path)


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """The same JSON with every entry that holds no others changed."""
    if isinstance(value, Mapping):
        return {key: _each(change, part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_each(change, part) for part in value]
    return change(value)


def _text(value: Any) -> Any:
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if finite else str(float(value))


def _numbers(value: Any) -> Any:
    words = {word: float(word) for word in ("nan", "inf", "-inf")}
    return _each(lambda v: words.get(v, v) if isinstance(v, str) else v, value)
