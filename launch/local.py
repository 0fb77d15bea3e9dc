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

_FOREVER = 60 * 24 * 365
_LEDGER = "gpus.json"


class Local:
    """Runs jobs on this machine; each has the GPUs that no other job has.

    Args:
      resources: of one node. `gpus_per_node` 0 shares the machine's GPUs out evenly.
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
        for job in jobs:
            mine = self._free_gpus(parallel)
            executor.update_parameters(
                tasks_per_node=tasks,
                timeout_min=self._resources.minutes or _FOREVER,
                gpus_per_node=len(mine),
                visible_gpus=mine,
                stderr_to_stdout=True,
            )
            coordinator = f"127.0.0.1:{free_port()}" if tasks > 1 else ""
            with _environment(
                LAUNCH_SUBMISSION=submission, LAUNCH_COORDINATOR=coordinator
            ):
                found = executor.submit(worker.main, str(job.folder))
            self._note(found.job_id, mine)
            names.append(found.job_id)
        return names

    def _free_gpus(self, parallel: int) -> tuple[int, ...]:
        all_of = gpus()
        share = self._resources.gpus_per_node or len(all_of) // max(parallel, 1)
        alive, ledger = self.alive(), self._ledger()
        taken = {gpu for job, held in ledger.items() if job in alive for gpu in held}
        free = [gpu for gpu in all_of if gpu not in taken]
        # With more trials than GPUs they share: better slow than none.
        return tuple((free if len(free) >= share > 0 else all_of)[: share or None])

    def _ledger(self) -> dict[str, list[int]]:
        path = self._folder / _LEDGER
        return json.loads(path.read_text()) if path.is_file() else {}

    def _note(self, job: str, held: Sequence[int]) -> None:
        if held:
            text = json.dumps(self._ledger() | {job: list(held)})
            (self._folder / _LEDGER).write_text(text)

    def alive(self) -> dict[str, str]:
        """Returns 'running' for every process of ours that is there."""
        listed = subprocess.run(
            ["ps", "-e", "-ww", "-o", "pid=,stat=,args="],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        found = {}
        for line in listed.splitlines():
            pid, state, *words = line.split(maxsplit=2)
            ours = words and words[0].endswith(
                f"-m submitit.local._local {self._folder}"
            )
            if ours and not state.startswith("Z"):
                found[pid] = "running"
        return found

    def find(self, submission: str, index: int) -> str | None:
        """Returns None: a process that runs says so itself."""
        return None

    def cause(self, job: str) -> tuple[str, str] | None:
        """Returns None: what ended a process is not kept."""
        return None

    def stop(self, jobs: Sequence[str]) -> None:
        """Sends SIGTERM, which the job's processes get too."""
        alive = self.alive()
        for job in jobs:
            if job in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(job), signal.SIGTERM)

    def log(self, job: str) -> pathlib.Path:
        """Returns the log of a job's process 0."""
        return self._folder / f"{job}_0_log.out"


def gpus() -> list[int]:
    """Returns the numbers of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [int(word) for word in visible.split(",") if word.strip().isdigit()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(
        ["nvidia-smi", "-L"], capture_output=True, text=True, check=False
    ).stdout
    return list(range(sum(line.startswith("GPU ") for line in listed.splitlines())))


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
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
