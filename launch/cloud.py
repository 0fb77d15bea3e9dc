"""What engines share that are commands of a cloud: calls, names, checks of options."""

from __future__ import annotations

import hashlib
import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from launch import engines
from launch.engines import EngineError, Job, Resources

_WAIT_SECONDS = 600

INSTALL = {
    "xpk": "install it into an environment of its own, since its pins fight with JAX's "
    "(python3 -m venv xpk && xpk/bin/pip install xpk), and put that last on PATH",
    "kubectl": "install it: gcloud components install kubectl",
    "gcloud": "install the Google Cloud SDK",
}


def call(*words: str) -> str:
    """Runs a command; returns what it writes to stdout.

    Raises:
      EngineError: it is not there, fails, or does not end; in one line.
    """
    what = " ".join(words[:3])
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,  # A question is not to be waited for.
            capture_output=True,
            text=True,
            timeout=_WAIT_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise EngineError(f"{what}: {_missing(words[0])}") from None
    except subprocess.TimeoutExpired:
        raise EngineError(f"{what}: no answer in {_WAIT_SECONDS} seconds.") from None
    if done.returncode:
        lines = [s.strip() for s in f"{done.stdout}\n{done.stderr}".splitlines()]
        lines = [line for line in lines if line] or [f"status {done.returncode}"]
        errors = [line for line in lines if "error" in line.lower()]
        raise EngineError(f"{what}: {'; '.join((errors or lines[-1:])[-3:])}")
    return done.stdout


def _missing(program: str) -> str:
    return f"there is no {program} on PATH; {INSTALL[program]}, or use --render=FOLDER."


def need(program: str, engine: str) -> None:
    """Raises EngineError where a command is not installed; says how to."""
    if shutil.which(program) is None:
        raise EngineError(f"--engine={engine}: {_missing(program)}")


def whole_machines(resources: Resources, engine: str) -> int:
    """Returns the number of nodes, for an engine that gives nothing else.

    Raises:
      ValueError: something else is asked for.
    """
    if resources.tasks_per_node != 1:
        raise ValueError(
            f"--tasks_per_node: --engine={engine} starts one process on each machine; "
            "leave it out."
        )
    for name in ("gpus_per_node", "cpus_per_task", "memory_gb", "minutes"):
        if getattr(resources, name):
            flag = {"minutes": "time"}.get(name, name)
            raise ValueError(
                f"--{flag}: --engine={engine} gives whole machines without a time "
                "limit; leave it out."
            )
    return resources.nodes


def chosen(
    given: Mapping[str, str],
    accepted: Mapping[str, str],
    needed: Sequence[str],
    engine: str,
) -> dict[str, str]:
    """Returns the options, as `engines.options`.

    Raises:
      ValueError: one is unknown or missing, or a switch is not '1'.
    """
    found = engines.options(given, accepted, engine)
    for name in needed:
        if not found.get(name):
            raise ValueError(
                f"--{name}: --engine={engine} needs it ({accepted[name]})."
            )
    for name, value in found.items():
        if accepted[name].startswith("1: ") and value != "1":
            raise ValueError(f"--{name}: must be 1 or left out, got '{value}'.")
    return found


def passed(options: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """Returns those options as flags of a command, which has '-' in their names."""
    return [f"--{n.replace('_', '-')}={options[n]}" for n in names if n in options]


def plain_path(folder: pathlib.Path, engine: str) -> None:
    """Raises ValueError for a folder that cannot be a mount, or that shells garble."""
    if "gs:" in folder.parts:
        raise ValueError(
            f"'{folder}': --engine={engine} needs a path; mount the bucket at the same "
            "one here and in the jobs, with gcsfuse for instance, and give that."
        )
    if not re.fullmatch(r"/[\w@%+=:./-]*", str(folder), re.ASCII):
        raise ValueError(
            f"'{folder}': --engine={engine} needs an absolute path of letters, digits "
            "and _@%+=:./- only."
        )


def worker(job: Job, engine: str) -> list[str]:
    """Returns the words of a job's command.

    Raises:
      EngineError: the job is to wait for others.
    """
    if job.after:
        raise EngineError(
            f"--engine={engine}: '{job.name}' is to wait for other jobs, which this "
            "engine cannot do; submit it when they have ended."
        )
    return engines.words(job)


def tag(text: str) -> str:
    """Returns eight digits that stand for a text in names and labels."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def job_name(job: Job, submission: str, index: int) -> str:
    """Returns a job's name, of at most 39 characters: xpk takes no more."""
    # Of a long name its end tells more: it has the trial.
    return f"{engines.plain_name(job.name[-23:], 25)}-{tag(submission)}-{index}"


def named(names: Iterable[str], submission: str, index: int) -> str | None:
    """Returns the name that `job_name` gave, if it is among these."""
    end = f"-{tag(submission)}-{index}"
    return next((name for name in names if name.endswith(end)), None)


def create_all(
    creates: Mapping[str, Sequence[str]], stop: Callable[[Sequence[str]], None]
) -> list[str]:
    """Runs a command for each job, all or none; returns the jobs.

    Raises:
      EngineError: one failed, and what was begun is stopped; or lives on.
    """
    begun = []
    for job, create in creates.items():
        # One that fails may have come far enough for the job to be there.
        begun.append(job)
        try:
            call(*create)
        except EngineError:
            stop(begun)
            raise
    return begun


def delete_all(
    deletes: Mapping[str, Sequence[str]], living: Callable[[], Collection[str]]
) -> None:
    """Runs a command for each job; one that is gone already is no error.

    Raises:
      EngineError: one lives on.
    """
    refused = {}
    for job, delete in deletes.items():
        try:
            call(*delete)
        except EngineError as error:
            refused[job] = error
    left = refused.keys() & set(living()) if refused else ()
    for job in left:
        raise EngineError(f"{job} could not be ended: {refused[job]}")
