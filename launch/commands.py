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

from diffusionlab import explain, progress, registry, revision, workdir
from launch import definition, driver, engines, flags, status, sweep, table
from launch.engines import Engine, Job, Resources
from launch.single import open_books
from launch.sweep import SweepError
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
    if definition.is_sweep(folder):
        raise SweepError(f"--workdir: '{folder}' is a sweep's; give another.")
    _plug_in(further)
    config = definition.check(args.config, definition.settled(overrides, folder))
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
        return _write(args.render, engine.render([job], 1))
    with driver.alone(folder):
        if (folder / "trial.json").is_file():
            _check_again(folder, asked)
        workdir.write_json(folder / "trial.json", asked)
        return _drive(folder, engine, args, follow=engine.ends_with_driver)


def _check_again(folder: pathlib.Path, asked: dict[str, Any]) -> None:
    """Checks that a run may be asked for anew, where it was asked for before."""
    books = open_books(folder)
    if "sweep" in books.asked:
        raise SweepError(
            f"--workdir: '{folder}' is a trial of the sweep '{books.asked['sweep']}'; "
            "resume that."
        )
    driver.check_place(books, asked["engine"], asked["resources"]["options"])
    last = Trial(folder).attempts()[-1:]
    for key in ("config", "overrides", "flags"):
        if last and last[0].cause is None and books.asked[key] != asked[key]:
            raise SweepError(
                f"--workdir: a job of '{folder}' may still live, with another {key}; "
                "cancel it first: python -m launch cancel."
            )


def _plug_in(further: list[str]) -> None:
    """Folders with modules that the config names: it is checked here already."""
    for word in further:
        name, _, value = word.partition("=")
        if name == "--plugins":
            registry.plug_in_path(str(pathlib.Path(value).resolve()))


def _sweep(args, overrides, options, further) -> int:
    folder = (args.root / args.name).resolve()
    names = [name for name in args.sweep.split(",") if name] or ["sweep"]
    _plug_in(further)
    points, search = definition.choose(args.config, names)
    if search and (args.trials or 0) < 1:
        raise ValueError(
            "--trials: a search needs the number of its points, 1 or more."
        )
    if args.trials is not None and not search:
        raise ValueError("--trials: is for searches; a grid has its own number.")
    seed = definition.check(args.config, overrides)["seed"]
    have, engine = _start(args, overrides, options, folder)
    points = definition.repeat(points, args.seeds, seed)
    for point in points:
        definition.check(args.config, {**overrides, **point})
    asked = {
        "name": args.name,
        "config": args.config,
        "overrides": overrides,
        "sweeps": names,
        "search": names[0] if search else "",
        "points": points,
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
        named = [(f"{n:04d}-{identity(p)}", p) for n, p in enumerate(points)]
        jobs = [_job(folder, asked, run, point) for run, point in named]
        return _write(args.render, engine.render(jobs, args.max_parallel))
    sweep.check(folder, asked, args.extend)
    with driver.alone(folder):
        sweep.check(folder, asked, args.extend)
        if definition.is_sweep(folder):
            driver.check_place(open_books(folder), args.engine, options)
        sweep.create(folder, asked)
        return _drive(folder, engine, args, follow=not args.detach)


def _job(folder: pathlib.Path, asked: dict[str, Any], run: str, point) -> Job:
    told = sweep.trial_of(folder, asked, int(run.partition("-")[0]), point)
    name = f"{folder.name}/{run}"
    return Job(folder / "runs" / run, name, asked=json.dumps(told))


def _resume(args, *_) -> int:
    books = open_books(args.folder)
    asked, folder = books.asked, books.folder
    _plug_in(asked["flags"])
    if args.max_parallel is not None:
        if args.max_parallel < 1:
            raise ValueError(f"--max_parallel: at least 1, got {args.max_parallel}.")
        books.max_parallel = args.max_parallel
    engine = _engine_of(args.folder, asked)
    if args.render:
        alive = _alive(args.folder, asked)
        jobs = [
            Job(t.folder, f"{folder.name}/{t.name}", asked=json.dumps(t.asked()))
            for t, now in zip(
                books.everything(), _states(books, alive).values(), strict=True
            )
            if now in ("waiting", "cancelled", "gone")
        ]
        jobs += [_job(folder, asked, *named) for named in books.points_to_begin()]
        return _write(args.render, engine.render(jobs, books.max_parallel))
    engine.check()
    with driver.alone(folder):
        driver.check_place(books, asked["engine"], asked["resources"]["options"])
        books.enqueue()
        return _drive(
            folder,
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
    asked = books.asked
    where = driver.place(asked["engine"], asked["resources"]["options"])
    here = driver.Driver(books, engine, printer.say, where)
    show = _Shown(here, printer, engine, follows_log=not is_sweep)
    if not follow:
        here.turn()
        print(f"go on with: python -m launch resume {folder}")
        return 0
    ask = signal.signal(signal.SIGTERM, _interrupt)
    try:
        # A cluster's scheduler has others to answer.
        poll = args.poll or (0.5 if engine.ends_with_driver else 2.0)
        here.run(poll, show)
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


def _interrupt(*_) -> None:
    # Not by SIGINT, which programs in the background of a script ignore.
    raise KeyboardInterrupt


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
    text = status.text(books.everything(), alive, books.max_failures)
    if waiting := books.waiting():
        text += f"{waiting} more to begin\n"
    if args.render:
        return _write(args.render, {"status.txt": text})
    print(text, end="")
    return 0


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
    if not args.render:
        # Before jobs are looked for: a driver that is at work then starts no others.
        books.cancel()
    alive = engine.alive()
    last = [a[-1].job for t in books.everything() if (a := t.attempts())]
    jobs = [job for job in last if job in alive]
    if args.render:
        return _write(args.render, {"cancel.txt": "\n".join(jobs) + "\n"})
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
