"""One step that brings books, files and engine into agreement, and a loop around it.

A driver may be killed anywhere and started again: what it finds in the trials' files
and at the engine is all it knows. Nothing finished is run again and nothing is lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

from diffusionlab import workdir
from launch import trial as trials
from launch.definition import TEACHER, is_sweep
from launch.engines import Engine, EngineError, Job
from launch.sweep import Single, Sweep, open_books
from launch.trial import Trial, attempts_of, failures, state

_SUBMITTING = 10.0
"""Seconds that a submission of a driver that was killed may still be under way."""
_LINGERING = 600.0
"""Seconds that a job may live on after its process has ended."""
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


@dataclasses.dataclass
class Driver:
    """Runs the trials of one directory on one engine.

    Attributes:
      books: of the sweep or run.
      engine: where they run.
      say: takes lines for the user.
    """

    books: Sweep | Single
    engine: Engine
    say: Callable[[str], None]

    def turn(self) -> dict[str, str]:
        """Sees to every trial once; returns the state of those that are open."""
        alive = self.engine.alive()  # before the files: what has gone has written
        found = {}
        for trial in self.books.trials():
            found[trial] = self._see_to(trial, alive)
        busy = [t for t, s in found.items() if s in ("running", "queued", "submitting")]
        ready = [t for t, s in found.items() if s == "waiting"]
        room = max(self.books.max_parallel - len(busy), 0)
        if self.engine.queues and not self.books.is_search:
            room = max(room, 10_000)
        if room > len(ready):
            ready += self.books.more(room - len(ready))
        handed = self._submit(ready[:room], len(busy))
        for trial in ready:
            found[trial] = "queued" if trial in handed else "waiting"
        return {trial.name: found[trial] for trial in found}

    def _see_to(self, trial: Trial, alive) -> str:
        """What is due for one trial; returns its state afterwards."""
        now = self._state(trial, alive)
        if now == "submitting":
            self._look_for(trial)
            now = self._state(trial, alive)
        if now == "gone":
            self._explain(trial)
            now = self._state(trial, alive)
        last = trial.attempts()[-1:]
        if now == "running" and last[0].cause not in (None, trials.PREEMPTED):
            # A machine that does not go by itself costs, and keeps the trial's place.
            if time.time() - last[0].ended > _LINGERING:
                self.engine.stop([last[0].job])
        elif now == "running" and self.books.is_hopeless(trial):
            job = last[0].job
            trial.record("pruned", step=trial.step())
            self.engine.stop([job])
            self.say(f"{trial.name}: pruned at step {trial.step()}")
        if now in ("done", "pruned", "given up"):
            if remark := self.books.close(trial, now):
                self.say(remark)
            last = next((a for a in reversed(trial.attempts()) if a.message), None)
            why = f": {last.message}" if now == "given up" and last else ""
            self.say(f"{trial.name}: {now}{why}")
        return now

    def _state(self, trial: Trial, alive) -> str:
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
        last = trial.attempts()[-1]
        log = self.engine.log(last.job)
        known = self.engine.cause(last.job)
        if known is None and last.started is None:
            known = trials.LOST, "the job ended before its process started"
        if known is None:
            starts = [e for e in trial.events() if e["event"] == "started"]
            known = _killed(starts[-1])
        cause, message = known
        message = f"{message}; see {log}" if log else message
        trial.record(
            "ended", job=last.job, cause=cause, step=trial.step(), message=message
        )
        if cause == trials.CANCELLED:
            trial.record("cancelled", by="the engine")

    def _submit(self, ready: Sequence[Trial], busy: int) -> set[Trial]:
        """Hands trials over that need not wait for a teacher."""
        jobs, chosen = [], []
        for trial in ready:
            try:
                after = self._after(trial)
            except DriverError as error:
                trial.record("ended", cause=trials.FAILED, message=str(error))
                continue
            if after is None:
                continue
            name = f"{self.books.folder.name}/{trial.name}"
            jobs.append(Job(trial.folder, name, tuple(after)))
            chosen.append(trial)
        if not jobs:
            return set()
        submission = uuid.uuid4().hex[:12]
        for index, trial in enumerate(chosen):
            trial.record("submitting", submission=submission, index=index)
        parallel = max(self.books.max_parallel - busy, 1)
        try:
            names = self.engine.submit(jobs, submission, parallel)
        except EngineError as error:
            for trial in chosen:
                trial.record(
                    "ended",
                    submission=submission,
                    cause=trials.PREEMPTED,
                    message=str(error),
                )
            raise
        for trial, job in zip(chosen, names, strict=True):
            trial.record("submitted", submission=submission, job=job)
            self.say(f"{trial.name}: job {job}")
        return set(chosen)

    def _after(self, trial: Trial) -> list[str] | None:
        """Jobs a trial waits for: its teacher's; None: it cannot be handed over yet."""
        asked = trial.asked()
        teacher = {**asked["overrides"], **asked.get("point", {})}.get(TEACHER)
        if teacher is None:
            return []
        return after(pathlib.Path(asked["cwd"]) / str(teacher), self.engine)

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
                time.sleep(poll)
                continue
            progress(found)
            over = not set(found.values()) - {"cancelled"}
            if self.books.is_complete() or (over and self.books.is_cancelled()):
                return
            time.sleep(poll)

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
        allowance = books.max_failures
    elif (teacher / trials.TRIAL_FILE).is_file():
        members, open_ones = [Trial(teacher)], 0
        allowance = members[0].asked()["max_failures"]
    else:
        return []  # a run that was started by hand; the program checks it
    alive, jobs = engine.alive(), []
    for member in members:
        events = member.events()
        now = state(member.result(), events, alive, allowance)
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


def _killed(start) -> tuple[str, str]:
    """What ended a process that wrote its start and no end."""
    import socket

    from launch import worker

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


def count_failures(trial: Trial) -> int:
    """Returns the failures that count; see `trial.failures`."""
    return failures(trial.events())
