"""What an engine is: something that runs jobs on machines, and knows which live.

An engine schedules, restarts and stores; what runs and where its files are is decided
here. To add one, write a module with a class of these methods and a line in `ENGINES`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

ENGINES = {
    "local": "launch.local:Local",
    "slurm": "launch.slurm:Slurm",
    "xpk": "launch.xpk:Xpk",
    "tpu": "launch.tpu:Tpu",
    "skypilot": "launch.skypilot:Skypilot",
}
"""Imported when one is used: their libraries are extras."""


class EngineError(RuntimeError):
    """The engine is not there, or refuses; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Resources:
    """What each job gets. Engines refuse what they cannot give.

    Attributes:
      nodes: machines; of a TPU, slices.
      tasks_per_node: processes on each machine.
      gpus_per_node: GPUs of each machine.
      cpus_per_task: cores of each process; 0 is the engine's own default.
      memory_gb: memory of each machine; 0 is the engine's own default.
      minutes: limit of one attempt; 0 is the engine's own default.
      options: the engine's own settings, by their own names: of Slurm 'partition',
        'account', 'qos', 'constraint'; of xpk and TPUs 'project', 'zone', 'cluster'.
    """

    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 0
    memory_gb: float = 0
    minutes: int = 0
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("nodes", "tasks_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name}: must be at least 1, got {getattr(self, name)}."
                )
        for name in ("gpus_per_node", "cpus_per_task", "memory_gb", "minutes"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"--{name}: must be at least 0, got {getattr(self, name)}."
                )


@dataclasses.dataclass(frozen=True)
class Job:
    """One trial to be run.

    Attributes:
      folder: the trial's run directory, absolute, and the same here as in the job;
        `python -m launch.worker FOLDER` in each process runs it, and is restarted
        after exit status 75.
      name: for people: of the sweep, and of the trial.
      after: jobs of the same engine that must end well before it starts.
      asked: trial.json as text, where the directory cannot have it yet: of a task that
        is only rendered.
    """

    folder: pathlib.Path
    name: str
    after: tuple[str, ...] = ()
    asked: str = ""


class Engine(Protocol):
    """Runs jobs. Made as `Engine(resources, folder)`, the latter for its own files.

    Attributes:
      ends_with_driver: jobs are to be stopped when the user stops the driver.
      queues: it takes all jobs at once, and runs them as there is room; otherwise the
        driver hands over what may run now.
    """

    ends_with_driver: bool
    queues: bool

    def check(self) -> None:
        """Raises EngineError or ValueError if no job could be submitted; asks only."""

    def render(self, jobs: Sequence[Job], parallel: int) -> dict[str, str]:
        """Returns what `submit` would hand over: name of a file -> its text."""

    def submit(self, jobs: Sequence[Job], submission: str, parallel: int) -> list[str]:
        """Hands jobs over.

        Args:
          jobs: at least one; they wait for the same others.
          submission: a name of this call, by which `find` knows the jobs again.
          parallel: how many of them may run at a time, where the engine queues them;
            otherwise how many trials there may be at a time.

        Returns:
          The engine's name of each job.

        Raises:
          EngineError: it did not come through; `find` tells how far it came.
        """

    def alive(self) -> dict[str, str]:
        """Returns 'waiting' or 'running' of each job that has not ended.

        Raises:
          EngineError: the engine does not answer.
        """

    def find(self, submission: str, index: int) -> str | None:
        """Returns a live job whose driver did not live to write its name down.

        Args:
          submission: as in `submit`.
          index: which of its jobs.
        """

    def cause(self, job: str) -> tuple[str, str] | None:
        """Returns (cause, message) of a job that went without a word, if known."""

    def stop(self, jobs: Sequence[str]) -> None:
        """Ends jobs for good; they have the engine's own time to save before that."""

    def log(self, job: str) -> pathlib.Path | str | None:
        """Returns where the log of a job's process 0 is: a file, or a command."""


def words(job: Job) -> list[str]:
    """Returns the command of each process of a job, as words."""
    return ["python", "-m", "launch.worker", str(job.folder)]


def build(name: str, resources: Resources, folder: pathlib.Path) -> Engine:
    """Returns an engine.

    Raises:
      ValueError: no engine has this name.
      EngineError: its library is not installed.
    """
    if name not in ENGINES:
        raise ValueError(f"--engine: no '{name}'; accepted: {', '.join(ENGINES)}.")
    module, _, cls = ENGINES[name].partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("launch"):
            raise
        raise EngineError(
            f"--engine={name}: needs {error.name}; pip install 'diffusionlab[launch]'."
        ) from None
    return getattr(found, cls)(resources, folder)


def options(
    given: Mapping[str, str], accepted: Mapping[str, str], engine: str
) -> dict[str, str]:
    """Returns the engine's own settings; `accepted` says what each one is.

    In a name '-' and '_' are the same.

    Raises:
      ValueError: one is unknown; names those that are accepted.
    """
    names, found = {name.replace("-", "_"): name for name in accepted}, {}
    for name, value in given.items():
        if name.replace("-", "_") not in names:
            known = "; ".join(f"--{k} ({v})" for k, v in accepted.items())
            raise ValueError(
                f"--{name}: no flag of the launcher, and of --engine={engine} there "
                f"are {known or 'none'}."
            )
        found[names[name.replace("-", "_")]] = value
    return found


@contextlib.contextmanager
def outside_step() -> Iterator[None]:
    """Hides the Slurm job that the driver may be: its jobs would take it for theirs."""
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.startswith("SLURM_") and name != "SLURM_CONF"
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


def plain_name(text: str, limit: int = 40) -> str:
    """Returns a name of lower-case letters, digits and '-', as clusters want it."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not plain or not plain[0].isalpha():
        plain = f"r-{plain}".strip("-")
    return plain[:limit].rstrip("-")
