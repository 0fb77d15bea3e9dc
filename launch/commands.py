"""What the launcher's commands do: check everything, then hand over to a driver."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from diffusionlab import explain, progress, revision, workdir
from launch import definition, driver, engines, flags, table
from launch.engines import Engine, Job, Resources
from launch.sweep import SweepError, create, open_books, trial_of
from launch.trial import Trial, identity, state

_STOPPING = 120.0
"""Seconds that jobs have to save when the user ends the driver."""


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status. An error of the user's is one line."""
    try:
        args, overrides, options, further = flags.read(argv)
        return _COMMANDS[args.command](args, overrides, options, further)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not (said := explain.explain(error)):
            raise
        print(f"launch: error: {said}", file=sys.stderr)
        return 1


def _start(args, overrides, options, folder) -> tuple[Resources, Engine]:
    """Resources and engine, checked; nothing is written."""
    have = flags.resources(args, options)
    engine = engines.build(args.engine, have, folder / "jobs")
    if args.render is None:
        engine.check()
    return have, engine


def _run(args, overrides, options, further) -> int:
    folder = args.workdir.resolve()
    config = definition.check(args.config, overrides)
    if definition.is_sweep(folder):
        raise SweepError(f"--workdir: '{folder}' is a sweep's; give another.")
    workdir.check(folder, config, "auto")
    have, engine = _start(args, overrides, options, folder)
    asked = {
        "config": args.config,
        "overrides": overrides,
        "flags": further,
        "cwd": str(pathlib.Path.cwd()),
        "engine": args.engine,
        "resources": dataclasses.asdict(have),
        "max_failures": args.max_failures,
        "num_steps": config["train"]["num_steps"],
        "revision": revision.git_revision(),
    }
    if args.render:
        job = Job(folder, folder.name, asked=json.dumps(asked))
        return _render(args, engine, [job], 1)
    with driver.alone(folder):
        # The run directory is the program's to guard; this file is what we were asked.
        workdir.write_json(folder / "trial.json", asked)
        return _drive(folder, engine, args, follow=engine.ends_with_driver)


def _sweep(args, overrides, options, further) -> int:
    folder = (args.root / args.name).resolve()
    names = [name for name in args.sweep.split(",") if name]
    points, search = definition.choose(args.config, names)
    if search and not args.trials:
        raise ValueError("--trials: missing; a search needs the number of its points.")
    if args.trials and not search:
        raise ValueError("--trials: is for searches; a grid has its own number.")
    seed = definition.check(args.config, overrides)["seed"]
    points = definition.repeat(points, args.seeds, seed)
    for point in points:
        definition.check(args.config, {**overrides, **point})
    have, engine = _start(args, overrides, options, folder)
    asked = {
        "name": args.name,
        "config": args.config,
        "overrides": overrides,
        "sweeps": names or ["sweep"],
        "seeds": args.seeds,
        "seed": seed,
        "num_trials": (args.trials or 0) * args.seeds,
        "metric": args.metric,
        "goal": args.goal,
        "prune": args.prune,
        "engine": args.engine,
        "resources": dataclasses.asdict(have),
        "max_parallel": args.max_parallel,
        "max_failures": args.max_failures,
        "flags": further,
        "cwd": str(pathlib.Path.cwd()),
        "revision": revision.git_revision(),
    }
    if args.render:
        if search:
            raise ValueError("--render: a search has no points before it runs.")
        jobs = []
        for number, point in enumerate(points):
            run = f"{number:04d}-{identity(point)}"
            told = json.dumps(trial_of(folder, asked, number, point))
            jobs.append(Job(folder / "runs" / run, f"{args.name}/{run}", asked=told))
        return _render(args, engine, jobs, args.max_parallel)
    with driver.alone(folder):
        create(folder, asked, args.extend).enqueue(points)
        return _drive(folder, engine, args, follow=not args.detach)


def _resume(args, *_) -> int:
    books = open_books(args.folder)
    asked = books.asked
    if args.max_parallel is not None:
        if args.max_parallel < 1:
            raise ValueError(f"--max_parallel: at least 1, got {args.max_parallel}.")
        books.max_parallel = args.max_parallel
    engine = _engine_of(args.folder, asked)
    if args.render:
        jobs = [
            Job(t.folder, f"{books.folder.name}/{t.name}", asked=json.dumps(t.asked()))
            for t in books.everything()
            if t.result() is None
        ]
        return _render(args, engine, jobs, books.max_parallel)
    engine.check()
    with driver.alone(books.folder):
        return _drive(
            books.folder,
            engine,
            args,
            follow=not args.detach,
            retry=args.retry,
            max_parallel=args.max_parallel,
        )


def _engine_of(folder: pathlib.Path, asked: dict[str, Any]) -> Engine:
    have = Resources(**asked["resources"])
    return engines.build(asked["engine"], have, folder.resolve() / "jobs")


def _drive(folder, engine, args, follow, retry=False, max_parallel=None) -> int:
    """Takes turns until all is done, or one; returns the exit status."""
    books = open_books(folder)
    books.max_parallel = max_parallel or books.max_parallel
    for name in books.retry(given_up=retry):
        print(f"{name}: opened again")
    is_sweep = definition.is_sweep(folder)
    printer = progress.Printer()
    here = driver.Driver(books, engine, printer.say)
    show = _Shown(here, printer, engine, follows_log=not is_sweep)
    if not follow:
        here.turn()
        print(f"go on with: python -m launch resume {folder}")
        return 0
    ask = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        here.run(args.poll, show)
    except KeyboardInterrupt:
        if engine.ends_with_driver:
            _end(here, printer)
            show.log()
        print(f"go on with: python -m launch resume {folder}")
        return 130
    finally:
        signal.signal(signal.SIGTERM, ask)
        if is_sweep:
            _report(folder, {})
    states = _states(books, {})
    if is_sweep:
        print(table.frame(folder).to_string(index=False))
    return 0 if set(states.values()) <= {"done", "pruned"} else 1


def _report(folder: pathlib.Path, alive) -> None:
    from launch import page  # its plots bring JAX, which takes seconds

    print(f"report: {page.write_page(folder, alive)}")


def _end(here: driver.Driver, printer: progress.Printer) -> None:
    """Stops the jobs and waits until they have saved."""
    printer.say("stopping: jobs save and end")
    deadline = time.monotonic() + _STOPPING
    while here.stop() and time.monotonic() < deadline:
        time.sleep(0.5)


class _Shown:
    """After every turn: the log of a run, or a line about a sweep."""

    def __init__(self, here, printer, engine, follows_log: bool):
        self._here, self._printer, self._engine = here, printer, engine
        self._read: dict[str, int] = {}
        self._follows_log = follows_log
        # What was said before this command is not said again.
        for one in here.books.everything():
            for attempt in one.attempts():
                path = engine.log(attempt.job) if attempt.job else None
                if isinstance(path, pathlib.Path) and path.is_file():
                    self._read[attempt.job] = path.stat().st_size
        self._since, self._first = time.monotonic(), None
        self._shown: dict[str, str] | None = None

    def __call__(self, found: dict[str, str]) -> None:
        self.log()
        if self._follows_log:
            return
        everything = self._here.books.everything()
        done = sum(t.result() is not None for t in everything)
        waiting = self._here.books.waiting()
        total = len(everything) + waiting
        if self._first is None:
            self._first = done
        line = f"{driver.counts(found, done, total)}"
        if done > self._first:
            each = (time.monotonic() - self._since) / (done - self._first)
            line += f" | ETA {progress.duration(each * (total - done))}"
        # Into a file only what is new.
        if sys.stdout.isatty() or found != self._shown:
            self._printer.progress(line)
        self._shown = dict(found)

    def log(self) -> None:
        """Prints what the newest attempt of a run has said since the last time."""
        if not self._follows_log:
            return
        for attempt in self._here.books.everything()[0].attempts()[-1:]:
            path = self._engine.log(attempt.job) if attempt.job else None
            if not isinstance(path, pathlib.Path) or not path.is_file():
                continue
            with path.open("rb") as file:
                file.seek(self._read.get(attempt.job, 0))
                text = file.read()
                self._read[attempt.job] = file.tell()
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()


def _states(books, alive) -> dict[str, str]:
    return {
        t.name: state(t.result(), t.events(), alive, books.max_failures)
        for t in books.everything()
    }


def _render(args, engine: Engine, jobs: list[Job], parallel: int) -> int:
    """Writes what would be submitted into a folder that is new or empty."""
    return _write(args.render, engine.render(jobs, parallel))


def _write(folder: pathlib.Path, texts: dict[str, str]) -> int:
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"--render: '{folder}' is not empty; give a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
        print(folder / name)
    return 0


def _alive(folder: pathlib.Path, asked: dict[str, Any]) -> dict[str, str]:
    """Live jobs; {} with a word of warning where the engine does not answer."""
    try:
        return _engine_of(folder, asked).alive()
    except (engines.EngineError, OSError) as error:
        print(f"launch: {error}; what runs is not known", file=sys.stderr)
        return {}


def _status(args, *_) -> int:
    books = open_books(args.folder)
    alive = _alive(args.folder, books.asked)
    lines = [("trial", "state", "attempts", "preemptions", "failures", "step", "job")]
    for one in books.everything():
        lines.append(_row(one, alive, books.max_failures))
    text = _columns(lines)
    if waiting := books.waiting():
        text += f"{waiting} more to begin\n"
    if args.render:
        return _write(args.render, {"status.txt": text})
    print(text, end="")
    return 0


def _row(one: Trial, alive, max_failures: int) -> tuple:
    attempts = one.attempts()
    last = attempts[-1] if attempts else None
    return (
        one.name,
        state(one.result(), one.events(), alive, max_failures),
        sum(a.started is not None for a in attempts),
        sum(a.cause == "preempted" and a.started is not None for a in attempts),
        driver.count_failures(one),
        one.step(),
        last.job if last and last.job else "",
    )


def _columns(rows: list[tuple]) -> str:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "".join(
        "  ".join(str(v).ljust(w) for v, w in zip(row, widths, strict=True)).rstrip()
        + "\n"
        for row in rows
    )


def _table(args, *_) -> int:
    asked = definition.read_sweep(args.folder)
    alive = _alive(args.folder, asked)
    frame = table.frame(args.folder, alive, args.metric)
    if args.render:
        return _write(args.render, {"table.csv": frame.to_csv(index=False)})
    if args.out is not None:
        table.write(frame, args.out)
        print(args.out)
    else:
        print(frame.to_string(index=False))
        if asked["seeds"] > 1:
            metric = args.metric or asked["metric"]
            print(table.grouped(frame, metric, asked["goal"]).to_string(index=False))
    _report(args.folder, alive)
    return 0


def _cancel(args, *_) -> int:
    books = open_books(args.folder)
    engine = _engine_of(args.folder, books.asked)
    alive = engine.alive()
    last = [a[-1].job for t in books.everything() if (a := t.attempts())]
    jobs = [job for job in last if job in alive]
    if args.render:
        return _write(args.render, {"cancel.txt": "\n".join(jobs) + "\n"})
    # Written first: a driver that is at work must not start them again.
    books.cancel()
    engine.stop(jobs)
    print(f"{len(jobs)} job(s) asked to save and end: {' '.join(jobs)}")
    print(f"go on with: python -m launch resume {args.folder}")
    return 0


_COMMANDS: dict[str, Callable[..., int]] = {
    "run": _run,
    "sweep": _sweep,
    "resume": _resume,
    "status": _status,
    "table": _table,
    "cancel": _cancel,
}
