"""A trial: one run directory, and what the launcher writes into it.

    trial.json       what was asked for: config, overrides, flags; written once
    attempts.jsonl   one line per event, by the driver and by the trial's process 0

The rest of the directory is an ordinary run of diffusionlab. It is finished when its
result.json says so, and by nothing else. Engines are asked whether a job lives; why it
ended is in these files, or, where the job could not write any more, in their absence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from diffusionlab import workdir, writers

TRIAL_FILE = "trial.json"

DONE, PREEMPTED, FAILED, KILLED = "done", "preempted", "failed", "killed"
OUT_OF_MEMORY, LOST, CANCELLED, PRUNED = "out of memory", "lost", "cancelled", "pruned"
CAUSES = (DONE, PREEMPTED, FAILED, KILLED, OUT_OF_MEMORY, LOST, CANCELLED, PRUNED)
"""Why an attempt ended; 'lost' is a job that went before it started."""
COUNTED = (FAILED, KILLED, OUT_OF_MEMORY, LOST)
"""Those that use up the allowance of a trial."""


def identity(overrides: Mapping[str, Any]) -> str:
    """Returns the name of a point: a hash of its overrides, in whatever order."""
    text = json.dumps(overrides, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclasses.dataclass
class Attempt:
    """One start of a trial's process, or a job that never came to that.

    Attributes:
      job: the engine's name of the job.
      submission: of this launcher; see `Trial.submitting`.
      started, ended: seconds since 1970, or None.
      cause: one of `CAUSES`, None while nothing is known of an end.
      step: finished steps at the end, where that is known.
      message: of an error.
    """

    job: str | None = None
    submission: str | None = None
    submitted: float | None = None
    started: float | None = None
    ended: float | None = None
    cause: str | None = None
    step: int | None = None
    message: str = ""


@dataclasses.dataclass(frozen=True)
class Trial:
    """The directory of a trial.

    Attributes:
      folder: the run directory.
    """

    folder: pathlib.Path

    @property
    def name(self) -> str:
        return self.folder.name

    def create(self, asked: Mapping[str, Any]) -> None:
        """Writes trial.json, whole or not at all; what is there already stays.

        Args:
          asked: `config`, `overrides` (key of the config -> value), `cwd`, and what
            else the trial's process is told.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / TRIAL_FILE).is_file():
            workdir.write_json(self.folder / TRIAL_FILE, asked)

    def asked(self) -> dict[str, Any]:
        """Returns what `create` was given.

        Raises:
          FileNotFoundError: the directory is of no trial.
        """
        path = self.folder / TRIAL_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"'{self.folder}' is no run of the launcher (there is no {TRIAL_FILE})."
            )
        return workdir.read_json(path)

    def result(self) -> dict[str, Any] | None:
        """Returns result.json if the run is finished: `step` and `numbers`."""
        path = self.folder / "result.json"
        if not path.is_file():
            return None
        result, config = workdir.read_json(path), self.folder / "config.json"
        wanted = self.asked().get("num_steps")
        if wanted is None and config.is_file():
            wanted = workdir.read_json(config)["train"]["num_steps"]
        return result if wanted in (None, result["step"]) else None

    def rows(self) -> list[dict[str, Any]]:
        """Returns the rows of metrics.jsonl."""
        path = self.folder / writers.METRICS_FILE
        return writers.read_rows(path) if path.is_file() else []

    def values(self, metric: str) -> list[tuple[int, float]]:
        """Returns (step, value) of a metric wherever it is there and finite.

        Args:
          metric: as in metrics.jsonl, 'eval/mixture/excess'.
        """
        found = [(row["step"], row[metric]) for row in self.rows() if metric in row]
        # What is not finite stands there as text.
        return [(s, v) for s, v in found if isinstance(v, int | float)]

    def step(self) -> int:
        """Returns how many steps the run has finished, as far as it has written."""
        rows = [row["step"] for row in self.rows()]
        return max([*rows, *workdir.saved_steps(self.folder)], default=0)

    def record(self, event: str, **what: Any) -> None:
        """Adds a line to attempts.jsonl, and waits until it is on the disk."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **what})
        path = self.folder / "attempts.jsonl"
        descriptor = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
        with os.fdopen(descriptor, "ab") as file:
            # A line that a killed process left half written must not spoil this one.
            file.write(f"\n{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())

    def events(self) -> list[dict[str, Any]]:
        """Returns the lines of attempts.jsonl that are whole."""
        path = self.folder / "attempts.jsonl"
        found = []
        for line in path.read_text().splitlines() if path.is_file() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return [event for event in found if isinstance(event, dict)]

    def attempts(self) -> list[Attempt]:
        """Returns the attempts in order; the last one may still go on."""
        return attempts_of(self.events())


def attempts_of(events: Sequence[Mapping[str, Any]]) -> list[Attempt]:
    """Returns the attempts that a list of events tells of.

    'submitting' and 'submitted' make an attempt that waits; 'started' is that one's
    start, or, of a job that started before, a new attempt: the engine put it back into
    its queue. 'ended' ends the last attempt of its job.
    """
    attempts: list[Attempt] = []

    def last(**same: Any) -> Attempt | None:
        for attempt in reversed(attempts):
            if all(getattr(attempt, key) == value for key, value in same.items()):
                return attempt
        return None

    for event in events:
        kind, job = event.get("event"), event.get("job")
        when, submission = event.get("time"), event.get("submission")
        if kind == "submitting":
            attempts.append(Attempt(submission=submission, submitted=when))
        elif kind == "submitted":
            attempt = last(submission=submission)
            # Its process may have been faster than this line.
            if attempt is None or attempt.job not in (None, job):
                attempts.append(attempt := Attempt(submission=submission))
            attempt.job, attempt.submitted = job, when
        elif kind == "started":
            attempt = last(job=job) or last(submission=submission, job=None)
            if attempt is None or attempt.started is not None:
                if attempt is not None and attempt.cause is None:
                    attempt.cause, attempt.ended = PREEMPTED, when
                attempts.append(attempt := Attempt(submission=submission))
            attempt.job, attempt.started = job, when
        elif kind == "ended":
            attempt = last(job=job) if job else last(submission=submission)
            if attempt is None or not (job or submission):
                attempts.append(attempt := Attempt(job=job, submission=submission))
            attempt.ended, attempt.cause = when, event["cause"]
            attempt.step = event.get("step")
            attempt.message = event.get("message", "")
    return attempts


def failures(events: Sequence[Mapping[str, Any]]) -> int:
    """Returns how many attempts failed that began after the user asked to retry."""
    retries = [i for i, event in enumerate(events) if event.get("event") == "retry"]
    forgiven = len(attempts_of(events[: retries[-1]])) if retries else 0
    return sum(a.cause in COUNTED for a in attempts_of(events)[forgiven:])


def state(
    result: Any,
    events: Sequence[Mapping[str, Any]],
    alive: Mapping[str, str],
    max_failures: int,
) -> str:
    """Returns what a trial is: a word for tables and for the driver.

    Args:
      result: see `Trial.result`.
      events: see `Trial.events`.
      alive: state by job, of the engine: 'waiting' or 'running'.
      max_failures: the allowance.

    Returns:
      'done', 'running', 'queued' (at the engine), 'submitting' (a driver began to, and
      whether it came through is not known), 'waiting' (to be submitted, for the first
      time or again), 'gone' (its job went, and nobody has written yet why),
      'cancelled', 'pruned' or 'given up'.
    """
    if result is not None:
        return "done"
    attempts = attempts_of(events)
    last = attempts[-1] if attempts else None
    if last is not None and last.job in alive:
        return {"waiting": "queued"}.get(alive[last.job], alive[last.job])
    if last is not None and last.cause is None and last.job is None:
        return "submitting"
    final = _last_event(events, ("cancelled", "pruned", "retry"))
    if final in ("cancelled", "pruned"):
        return final
    if last is not None and last.cause is None:
        return "gone"
    if failures(events) >= max_failures:
        return "given up"
    return "waiting"


def _last_event(events, kinds: Collection[str]) -> str | None:
    found = [event["event"] for event in events if event.get("event") in kinds]
    return found[-1] if found else None


def is_cancelled(trial: Trial) -> bool:
    """Whether the last word on a trial was to cancel it."""
    kinds = [e["event"] for e in trial.events()]
    return [k for k in kinds if k in ("cancelled", "retry")][-1:] == ["cancelled"]


def mark_cancelled(trial: Trial) -> None:
    """Writes that a trial is not to be started again, unless that is written."""
    if trial.result() is None and not is_cancelled(trial):
        trial.record("cancelled", by="the user")
