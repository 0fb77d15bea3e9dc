"""Slurm as an engine, through submitit; a batch of trials is one array of jobs.

A job that SIGTERM stops has two minutes to save before its time limit, and puts itself
back into the queue; so does one that is preempted, or whose node goes down.
"""

from __future__ import annotations

import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

import submitit

from launch import engines, trial, worker
from launch.engines import EngineError, Job, Resources

OPTIONS = {
    "partition": "where to run",
    "account": "who pays",
    "qos": "quality of service",
    "constraint": "features of the nodes",
    "nodelist": "these nodes",
    "exclude": "not these nodes",
    "exclusive": "1: nobody else on the nodes",
    "gres": "generic resources, such as gpu:h100:8",
    "setup": "shell line before the job, such as 'module load cuda'",
    "signal_seconds": "notice before the time limit, 120",
    "container": "prefix of the job's command, such as 'apptainer exec image.sif'",
}

_CAUSES = {
    "CANCELLED": trial.CANCELLED,
    "NODE_FAIL": trial.PREEMPTED,
    "PREEMPTED": trial.PREEMPTED,
    "BOOT_FAIL": trial.PREEMPTED,
    "OUT_OF_MEMORY": trial.OUT_OF_MEMORY,
    "TIMEOUT": trial.KILLED,
    "FAILED": trial.KILLED,
}


class Slurm:
    """Submits to Slurm; works with and without its accounting.

    Args:
      resources: of each job; `options` as in `OPTIONS`.
      folder: for submitit's files and the logs; all nodes must see it.
    """

    ends_with_driver = False
    queues = True

    def __init__(self, resources: Resources, folder: pathlib.Path):
        self._resources, self._folder = resources, folder.resolve()
        self._options = engines.options(resources.options, OPTIONS, "slurm")

    def check(self) -> None:
        """Raises EngineError where there is no Slurm, or it refuses such a job."""
        for program in ("sbatch", "squeue", "srun", "scontrol", "scancel"):
            if shutil.which(program) is None:
                raise EngineError(
                    f"--engine=slurm: there is no {program} here; run this on a login "
                    "node, or use --render=FOLDER."
                )
        self.alive()
        text = self._text([Job(self._folder / "trial", "check")], "check", 1)
        script = "\n".join(
            line for line in text.splitlines() if "--dependency" not in line
        )
        with engines.outside_step():
            done = subprocess.run(
                ["sbatch", "--test-only"],
                input=script,
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode:
            raise EngineError(f"--engine=slurm: {_said(done.stderr)}")

    def render(self, jobs: Sequence[Job], parallel: int) -> dict[str, str]:
        """Returns the batch script of the array."""
        text = self._text(jobs, "SUBMISSION", parallel)
        text += "# trials, by the index of the array:\n"
        text += "".join(f"#   {k}: {job.folder}\n" for k, job in enumerate(jobs))
        return {"array.sbatch": text}

    def submit(self, jobs: Sequence[Job], submission: str, parallel: int) -> list[str]:
        """See `Engine`."""
        executor = self._executor(jobs, submission, parallel)
        try:
            with engines.outside_step():
                found = executor.map_array(
                    worker.main, [str(job.folder) for job in jobs]
                )
        except submitit.core.utils.FailedJobError as error:
            raise EngineError(f"--engine=slurm: {_said(str(error))}") from None
        return [job.job_id for job in found]

    def _executor(self, jobs, submission, parallel) -> submitit.SlurmExecutor:
        have, options = self._resources, dict(self._options)
        python = shlex.quote(sys.executable)
        if container := options.pop("container", ""):
            python = f"{container} python"
        executor = _Executor(self._folder, python=python)
        setup = [f"export LAUNCH_SUBMISSION={submission}"]
        if line := options.pop("setup", ""):
            setup.append(line)
        notice = options.pop("signal_seconds", "120")
        after = jobs[0].after
        executor.update_parameters(
            job_name=jobs[0].name.partition("/")[0],
            # None leaves these to the cluster.
            time=have.minutes or None,
            cpus_per_task=have.cpus_per_task or None,
            gpus_per_node=have.gpus_per_node or None,
            mem=f"{round(have.memory_gb * 1024)}M" if have.memory_gb else None,
            nodes=have.nodes,
            ntasks_per_node=have.tasks_per_node,
            setup=setup,
            comment=submission,
            array_parallelism=parallel,
            # Not afterok: a teacher that fails is started again, as another job.
            dependency=f"afterany:{':'.join(after)}" if after else None,
            stderr_to_stdout=True,
            srun_args=["--kill-on-bad-exit=1"],
            additional_parameters={
                "requeue": True,
                # JAX listens to SIGTERM only.
                "signal": f"TERM@{notice}",
            },
            **options,
        )
        return executor

    def _text(self, jobs: Sequence[Job], submission: str, parallel: int) -> str:
        executor = self._executor(jobs, submission, parallel)
        if len(jobs) > 1:
            executor.parameters["map_count"] = len(jobs)
        return executor._make_submission_file_text(executor._submitit_command_str, "")

    def alive(self) -> dict[str, str]:
        """See `Engine`."""
        return {job: state for job, state, _ in self._queue()}

    def find(self, submission: str, index: int) -> str | None:
        """See `Engine`: the comment of a job is its submission."""
        for job, _, comment in self._queue():
            _, underscore, own = job.partition("_")
            if comment == submission and (not underscore or int(own) == index):
                return job
        return None

    def _queue(self) -> list[tuple[str, str, str]]:
        """Returns job, state and comment of what of this user has not ended."""
        command = ["squeue", "--me", "--all", "-h", "-r", "-o", "%i|%T|%k"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EngineError(
                f"--engine=slurm: the scheduler does not answer: {_said(done.stderr)}"
            )
        found = []
        for line in done.stdout.splitlines():
            job, state, comment = line.split("|", 2)
            waits = state in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD")
            found.append((job, "waiting" if waits else "running", comment))
        return found

    def cause(self, job: str) -> tuple[str, str] | None:
        """See `Engine`; Slurm forgets jobs after a while."""
        command = ["scontrol", "show", "job", "-o", job]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        match = re.search(r"JobState=(\w+) Reason=(\S+)", said.stdout)
        if match is None or match[1] not in _CAUSES:
            return None
        status = re.search(r"ExitCode=(\S+)", said.stdout)
        return _CAUSES[match[1]], f"Slurm: {match[1]}, {match[2]}, exit {status[1]}"

    def stop(self, jobs: Sequence[str]) -> None:
        """Cancels jobs: SIGTERM, and SIGKILL after the cluster's KillWait."""
        if jobs:
            subprocess.run(["scancel", *jobs], capture_output=True, check=False)

    def log(self, job: str) -> pathlib.Path:
        """Returns the log of a job's process 0."""
        return self._folder / f"{job}_0_log.out"


class _Executor(submitit.SlurmExecutor):
    """One that writes its script where there is no Slurm, too."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _said(text: str) -> str:
    """The last line of what a program of Slurm's said that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("sbatch: error: ") if lines else "it said nothing"
