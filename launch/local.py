"""This machine as an engine, through submitit: jobs are processes in the background."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence

import submitit

from launch import engines, worker
from launch.engines import Job, Resources
from launch.rehearse import free_port
from launch.trial import Trial

_FOREVER = 60 * 24 * 365
_LEDGER = "local.json"
_CONTROLLER = "submitit.local._local"


class Local:
    """Runs jobs on this machine; those that run at a time share its GPUs and cores out.

    Two programs with as many threads each as there are cores are slower than one after
    the other.

    Args:
      resources: of one node. `gpus_per_node` 0 shares the machine's GPUs out evenly,
        `cpus_per_task` 0 its cores.
      folder: for submitit's files and the logs.
    """

    ends_with_driver = True
    queues = False

    def __init__(self, resources: Resources, folder: pathlib.Path):
        self._resources, self._folder = resources, folder.resolve()
        engines.options(resources.options, {}, "local")

    def check(self) -> None:
        """Raises ValueError for what one machine does not have."""
        if self._resources.nodes != 1:
            raise ValueError(
                f"--nodes: --engine=local is one machine, got {self._resources.nodes}; "
                "--tasks_per_node gives several processes."
            )
        if self._resources.gpus_per_node > len(gpus()):
            raise ValueError(
                f"--gpus_per_node: {self._resources.gpus_per_node} asked, this machine "
                f"has {len(gpus())}."
            )
        wanted = self._resources.cpus_per_task * self._resources.tasks_per_node
        there = len(_cores()) or os.cpu_count() or 1
        if wanted > there:
            raise ValueError(
                f"--cpus_per_task: {wanted} cores asked, this machine has {there}."
            )

    def render(self, jobs: Sequence[Job], parallel: int) -> dict[str, str]:
        """Returns one file with a command line for each job."""
        lines = [shlex.join(engines.words(job)) for job in jobs]
        tasks = self._resources.tasks_per_node
        head = f"# {parallel} at a time, {tasks} process(es) each"
        return {"commands.sh": "\n".join([head, *lines]) + "\n"}

    def submit(self, jobs: Sequence[Job], submission: str, parallel: int) -> list[str]:
        """See `Engine`."""
        executor = submitit.LocalExecutor(self._folder)
        tasks, names = self._resources.tasks_per_node, []
        executor.update_parameters(
            tasks_per_node=tasks,
            timeout_min=self._resources.minutes or _FOREVER,
            stderr_to_stdout=True,
        )
        for index, job in enumerate(jobs):
            name = f"{submission}-{index}"
            mine = self._choose("gpus", gpus(), self._resources.gpus_per_node, parallel)
            asked = self._resources.cpus_per_task * tasks
            cores = self._choose("cores", _cores(), asked, parallel)
            told = {"LAUNCH_JOB": name, "LAUNCH_SUBMISSION": submission}
            if tasks > 1:
                told["LAUNCH_COORDINATOR"] = f"127.0.0.1:{free_port()}"
            if mine:
                told["LAUNCH_GPUS"] = ",".join(mine)
            if cores:
                told["LAUNCH_CORES"] = ",".join(cores)
            with engines.outside_step(), _environment(told):
                found = executor.submit(worker.main, str(job.folder))
            held = dict(pid=found.job_id, gpus=mine, cores=cores)
            self._write_ledger(name, folder=str(job.folder), **held)
            names.append(name)
        return names

    def _choose(
        self, kind: str, all_of: list[str], asked: int, parallel: int
    ) -> list[str]:
        """The share of one job: those that the fewest working jobs have."""
        ledger = self._ledger()
        working = [
            job
            for job in self.alive()
            # What starts and ends its processes lives on for a while.
            if job in ledger and not _has_ended(job, ledger[job]["folder"])
        ]
        share = asked or max(len(all_of) // parallel, 1)
        held = [one for job in working for one in ledger[job].get(kind, ())]
        order = sorted(all_of, key=lambda one: (held.count(one), all_of.index(one)))
        return order[:share]

    def _ledger(self) -> dict[str, dict]:
        path = self._folder / _LEDGER
        return json.loads(path.read_text()) if path.is_file() else {}

    def _write_ledger(self, job: str, **held) -> None:
        text = json.dumps(self._ledger() | {job: held})
        (self._folder / _LEDGER).write_text(text)

    def alive(self) -> dict[str, str]:
        """Returns 'running' for every process of ours that is there."""
        return dict.fromkeys(self._processes(), "running")

    def _processes(self) -> dict[str, int]:
        """Jobs that live, and the process of each that starts and ends the others."""
        ledger = {held["pid"]: job for job, held in self._ledger().items()}
        found = {}
        for pid, words in _commands():
            if _CONTROLLER not in words or words[-1] != str(self._folder):
                continue
            # A number may have been another job's before.
            job = _variable(pid, "LAUNCH_JOB") or ledger.get(str(pid))
            if job is not None:
                found[job] = pid
        return found

    def find(self, submission: str, index: int) -> str | None:
        """See `Engine`."""
        name = f"{submission}-{index}"
        return name if name in self._processes() else None

    def cause(self, job: str) -> tuple[str, str] | None:
        """Returns None: what ended a process is not kept."""
        return None

    def stop(self, jobs: Sequence[str]) -> None:
        """Sends SIGTERM, which the job's processes get too."""
        processes = self._processes()
        for job in jobs:
            if job in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(processes[job], signal.SIGTERM)

    def log(self, job: str) -> pathlib.Path | None:
        """Returns the log of a job's process 0."""
        held = self._ledger().get(job)
        return self._folder / f"{held['pid']}_0_log.out" if held else None


def _has_ended(job: str, folder: str) -> bool:
    attempts = Trial(pathlib.Path(folder)).attempts()
    return any(one.job == job and one.cause for one in attempts)


def gpus() -> list[str]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [word.strip() for word in visible.split(",") if word.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(
        ["nvidia-smi", "-L"], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listed))]


def _cores() -> list[str]:
    """Returns the cores that this process may use, where the system tells."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    return [str(core) for core in sorted(os.sched_getaffinity(0))]


def _commands() -> Iterator[tuple[int, list[str]]]:
    """Yields number and words of the processes of this machine."""
    proc = pathlib.Path("/proc")
    if not (proc / "self" / "cmdline").exists():
        listed = subprocess.run(
            ["ps", "-axww", "-o", "pid=,args="], capture_output=True, check=True
        ).stdout.decode(errors="surrogateescape")
        for line in listed.splitlines():
            pid, *words = line.split()
            yield int(pid), words
        return
    for path in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            text = (path / "cmdline").read_bytes().decode(errors="surrogateescape")
            # That of a process that has ended, and is not yet waited for, is empty.
            yield int(path.name), text.rstrip("\0").split("\0")


def _variable(pid: int, name: str) -> str | None:
    """A variable of the environment of a process, where the system shows it."""
    with contextlib.suppress(OSError):
        text = (
            pathlib.Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        )
        for line in text.split("\0"):
            if line.startswith(f"{name}="):
                return line.partition("=")[2]
    return None


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets variables for processes that are started, which Ctrl-C then does not end."""
    old = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
