"""One step that brings books, files and engine into agreement, and a loop around it.

A driver may be killed anywhere and started again: what it finds in the trials' files
and at the engine is all it knows. Nothing finished is run again and nothing is lost.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import pathlib
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from diffusionlab import workdir
from launch import trial as trials
from launch import worker
from launch.definition import TEACHER, is_sweep
from launch.engines import Engine, EngineError, Job
from launch.single import Single, open_books
from launch.sweep import Sweep
from launch.trial import Trial, attempts_of, mark_cancelled, state

_SUBMITTING = 10.0
"""Seconds that a submission of a driver that was killed may still be under way."""
ENDING = ("cancelled", "pruned")
"""Events by which the launcher itself ends a job."""
_LINGERING = 600.0
"""Seconds that a job may live on after its process has ended."""
_QUEUE = 10_000
_BATCH = 1000
"""Jobs of one array; the default of Slurm's MaxArraySize is 1001."""
_PATIENCE = 600.0
"""Seconds for which an engine that does not answer is asked again."""


class DriverError(RuntimeError):
    """The launcher cannot go on; the message says why."""


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
    """One driver at a time.

    Raises:
      DriverError: another is at work here.
    """
    try:
        with workdir.lock(folder / "driver", "driven"):
            yield
    except workdir.WorkdirError as error:
        text = str(error).removeprefix("--workdir: ").replace("/driver'", "'")
        raise DriverError(text) from None


def check_place(books: Sweep | Single, engine: str, options: Mapping) -> None:
    """Checks that jobs which may still live can be asked for here.

    Args:
      books: of the sweep or run.
      engine, options: where its trials are to run now.

    Raises:
      DriverError: they were submitted somewhere else.
    """
    now = place(engine, options)
    for trial in books.everything():
        attempts, events = trial.attempts(), trial.events()
        if not attempts or attempts[-1].cause is not None or trial.result():
            continue
        then = [e["place"] for e in events if e["event"] == "submitting"][-1]
        if then != now:
            raise DriverError(
                f"'{trial.folder}': its job may still live at {then}, and now it is "
                f"{now}; resume it there, or cancel it there first."
            )


def place(engine: str, options: Mapping[str, str]) -> str:
    """Returns where jobs are asked for: another place does not know them."""
    if engine == "local":
        return f"local on {socket.gethostname()}"
    names = ("project", "zone", "cluster", "namespace")
    where = [options[name] for name in names if name in options]
    return " ".join([engine, *where])


@dataclasses.dataclass
class Driver:
    """Runs the trials of one directory on one engine.

    Attributes:
      books: of the sweep or run.
      engine: where they run.
      say: takes lines for the user.
      place: see `place`.
    """

    books: Sweep | Single
    engine: Engine
    say: Callable[[str], None]
    place: str

    def __post_init__(self):
        self._lingering: dict[str, float] = {}
        self._told: set[str] = set()

    def turn(self) -> dict[str, str]:
        """Sees to every trial once; returns the state of those that are open.

        Raises:
          EngineError: the engine does not answer, or refuses.
        """
        alive = self.engine.alive()  # before the files: what has gone has written
        self._end_lingering(alive)
        found = {t: self._see_to(t, alive) for t in self.books.trials()}
        if self.books.is_cancelled():
            for trial, now in found.items():
                if now in ("running", "queued"):
                    mark_cancelled(trial)
                    self.engine.stop([trial.attempts()[-1].job])
            return {trial.name: now for trial, now in found.items()}
        live = ("running", "queued", "submitting")
        busy = sum(now in live for now in found.values())
        room = max(self.books.max_parallel - busy, 0)
        if self.engine.queues and not self.books.is_search:
            room = _QUEUE
        ready = [t for t, now in found.items() if now == "waiting"][:room]
        # What is there first: asking for more may end in an error of the user's.
        handed = self._submit(ready, busy)
        more = self.books.more(room - len(ready))
        handed |= self._submit(more, busy + len(handed))
        for trial in (*ready, *more):
            found[trial] = "queued" if trial in handed else "waiting"
        return {trial.name: now for trial, now in found.items()}

    def _see_to(self, trial: Trial, alive: Mapping[str, str]) -> str:
        """What is due for one trial; returns its state afterwards."""
        now = self._state(trial, alive)
        if now == "submitting":
            self._look_for(trial)
            now = self._state(trial, alive)
        if now == "gone":
            self._explain(trial)
            now = self._state(trial, alive)
        last = trial.attempts()[-1:]
        ended = last and last[0].cause not in (None, trials.PREEMPTED)
        if ended and last[0].job in alive:
            self._lingering.setdefault(last[0].job, time.monotonic())
        elif now == "running" and self.books.is_hopeless(trial):
            trial.record("pruned", step=trial.step())
            self.engine.stop([last[0].job])
            self.say(f"{trial.name}: pruned at step {trial.step()}")
        if now in ("done", "pruned", "given up"):
            if remark := self.books.close(trial, now):
                self.say(remark)
            why = next((a.message for a in reversed(trial.attempts()) if a.message), "")
            why = f": {why}" if now == "given up" and why else ""
            self.say(f"{trial.name}: {now}{why}")
        return now

    def _end_lingering(self, alive: Mapping[str, str]) -> None:
        """Ends jobs that do not go when their process has ended: they cost."""
        self._lingering = {j: t for j, t in self._lingering.items() if j in alive}
        for job, since in self._lingering.items():
            if time.monotonic() - since > _LINGERING:
                self.engine.stop([job])

    def _state(self, trial: Trial, alive: Mapping[str, str]) -> str:
        events = trial.events()
        return state(trial.result(), events, alive, self.books.max_failures)

    def _look_for(self, trial: Trial) -> None:
        """A driver was killed between submitting and writing the job down."""
        events = trial.events()
        last = [e for e in events if e["event"] == "submitting"][-1]
        job = self.engine.find(last["submission"], last["index"])
        if job is not None:
            # Its files may not be complete: submitit writes some after submitting.
            self.engine.stop([job])
            self.say(f"{trial.name}: job {job} of a killed driver is cancelled")
        elif time.time() - last["time"] < _SUBMITTING:
            return
        trial.record(
            "ended",
            submission=last["submission"],
            cause=trials.PREEMPTED,
            message="the driver was killed while submitting",
        )

    def _explain(self, trial: Trial) -> None:
        """A job went without a word: writes down why, as far as can be found out."""
        events, last = trial.events(), trial.attempts()[-1]
        log = self.engine.log(last.job)
        known = self.engine.cause(last.job)
        begun = [i for i, e in enumerate(events) if e["event"] == "submitting"]
        if any(e["event"] in ENDING for e in events[begun[-1] :]):
            known = trials.PREEMPTED, "it was asked to end, and did not come to save"
        if known is None and last.started is None:
            known = trials.LOST, "the job ended before its process started"
        if known is None:
            starts = [e for e in events if e["event"] == "started"]
            known = _killed(starts[-1])
        cause, message = known
        message = f"{message}; see {log}" if log else message
        trial.record(
            "ended", job=last.job, cause=cause, step=trial.step(), message=message
        )
        if cause == trials.CANCELLED:
            trial.record("cancelled", by="the engine")

    def _submit(self, ready: Sequence[Trial], busy: int) -> set[Trial]:
        """Hands trials over that need not wait for a teacher; returns which."""
        groups: dict[tuple[str, ...], list[Trial]] = collections.defaultdict(list)
        for trial in ready:
            try:
                after = self._after(trial)
            except DriverError as error:
                trial.record("ended", cause=trials.FAILED, message=str(error))
                continue
            if after is not None:
                groups[tuple(after)].append(trial)
        handed: set[Trial] = set()
        for after, members in groups.items():
            for first in range(0, len(members), _BATCH):
                part = members[first : first + _BATCH]
                self._submit_batch(part, after, busy)
                handed |= set(part)
        return handed

    def _submit_batch(
        self, batch: Sequence[Trial], after: tuple[str, ...], busy: int
    ) -> None:
        """Hands over what waits for the same jobs.

        Where that fails nothing is known: the next turn looks for the jobs.
        """
        submission = uuid.uuid4().hex[:12]
        jobs = [
            Job(trial.folder, f"{self.books.folder.name}/{trial.name}", after)
            for trial in batch
        ]
        for index, trial in enumerate(batch):
            trial.record(
                "submitting", submission=submission, index=index, place=self.place
            )
        parallel = self.books.max_parallel
        if self.engine.queues:
            parallel = max(parallel - busy, 1)
        names = self.engine.submit(jobs, submission, parallel)
        for trial, job in zip(batch, names, strict=True):
            trial.record("submitted", submission=submission, job=job)
            self.say(f"{trial.name}: job {job}")

    def _after(self, trial: Trial) -> list[str] | None:
        """Jobs a trial waits for: its teacher's; None: it cannot be handed over yet."""
        asked = trial.asked()
        teacher = {**asked["overrides"], **asked.get("point", {})}.get(TEACHER)
        if not isinstance(teacher, str):
            return []
        found = after(pathlib.Path(asked["cwd"]) / teacher, self.engine)
        if found is None and teacher not in self._told:
            self._told.add(teacher)
            self.say(f"{trial.name}: waits for its teacher '{teacher}' to finish")
        return found

    def run(self, poll: float, progress: Callable[[dict[str, str]], None]) -> None:
        """Takes turns until nothing is left to do.

        Args:
          poll: seconds between two turns.
          progress: takes the states after every turn.

        Raises:
          EngineError: it has not answered for ten minutes.
        """
        deaf_since = None
        while True:
            try:
                found = self.turn()
                deaf_since = None
            except EngineError as error:
                deaf_since = deaf_since or time.monotonic()
                if time.monotonic() - deaf_since > _PATIENCE:
                    raise
                self.say(f"{error}; asking again")
                time.sleep(max(poll, _SUBMITTING))
                continue
            progress(found)
            if self._is_over(found):
                return
            time.sleep(poll)

    def _is_over(self, found: Mapping[str, str]) -> bool:
        if self._lingering:
            return False
        open_ones = set(found.values()) - {"done", "pruned", "given up", "cancelled"}
        return not open_ones and (self.books.is_cancelled() or not self.books.waiting())

    def stop(self) -> list[str]:
        """Ends every live job, which saves before; returns the jobs."""
        alive = self.engine.alive()
        jobs = [a[-1].job for t in self.books.trials() if (a := t.attempts())]
        found = [job for job in jobs if job in alive]
        self.engine.stop(found)
        return found


def after(teacher: pathlib.Path, engine: Engine) -> list[str] | None:
    """Returns the jobs that a student of a teacher has to wait for.

    Args:
      teacher: a run directory, or that of a sweep, whose best trial is meant.
      engine: where the student will run.

    Returns:
      [] if the teacher is there; its jobs, if the engine runs them and holds jobs back
      until others are done; None otherwise: ask again later.

    Raises:
      DriverError: the teacher will never be there.
    """
    if is_sweep(teacher):
        books = open_books(teacher)
        members, open_ones = books.everything(), books.waiting()
    elif (teacher / trials.TRIAL_FILE).is_file():
        books = Single(teacher)
        members, open_ones = books.everything(), 0
    else:
        return []  # a run that was started by hand; the program checks it
    alive, jobs = engine.alive(), []
    for member in members:
        events = member.events()
        now = state(member.result(), events, alive, books.max_failures)
        if now in ("running", "queued"):
            jobs.append(attempts_of(events)[-1].job)
        elif now not in ("done", "pruned", "cancelled", "given up"):
            open_ones += 1
    if not any(m.result() for m in members) and not jobs and not open_ones:
        raise DriverError(
            f"config.teacher: '{teacher}' has no finished run, and nothing of it is "
            "running; resume it first: python -m launch resume."
        )
    if open_ones:
        return None
    return jobs if engine.queues or not jobs else None


def _killed(start: Mapping[str, Any]) -> tuple[str, str]:
    """What ended a process that wrote its start and no end."""
    before, now = start.get("kills"), worker.kills()
    here = start.get("host") == socket.gethostname()
    if here and before is not None and now is not None and now > before:
        return trials.OUT_OF_MEMORY, "the system ended it for want of memory"
    return trials.KILLED, "the process ended without a word (kill -9, or a crash)"


def counts(states: dict[str, str], done: int, total: int) -> str:
    """Returns '3/12 done, 2 running, 1 queued'."""
    open_ones = [s for s in states.values() if s != "done"]
    words = [f"{open_ones.count(s)} {s}" for s in sorted(set(open_ones))]
    return ", ".join([f"{done}/{total} done", *words])
