"""SkyPilot's task files, for `sky jobs launch`: rendered here, not sent or followed.

A managed job of SkyPilot starts again by itself after a preemption. Nobody here sees
its state: each trial is a file to launch, and `table` reads what the trials write, in a
bucket that is mounted on both sides. Their trial.json must be in the bucket before.
"""

from __future__ import annotations

import json
import pathlib
import shlex
from collections.abc import Sequence

from launch import cloud
from launch.engines import EngineError, Job, Resources

OPTIONS = {
    "accelerators": "of each machine, such as H100:8 or tpu-v6e-8; needed",
    "bucket": "gs://… or s3://…, to be mounted as the sweep's or run's folder; needed",
    "infra": "where, such as gcp/us-east5; SkyPilot chooses without it",
    "image_id": "image of the machines",
    "setup": "shell lines before the job, in the folder of the code",
    "spot": "1: spot machines",
}
_NEEDED = ("accelerators", "bucket")
_PORT = 6002


class Skypilot:
    """Writes a task for each job.

    Args:
      resources: `nodes` alone, and `options` as in `OPTIONS`.
      folder: beside the run directories; its parent is where the bucket is mounted.

    Raises:
      ValueError: an option is unknown or missing, or a resource cannot be had.
    """

    ends_with_driver = False
    queues = False

    def __init__(self, resources: Resources, folder: pathlib.Path):
        self._nodes = cloud.whole_machines(resources, "skypilot")
        self._options = cloud.chosen(resources.options, OPTIONS, _NEEDED, "skypilot")
        cloud.plain_path(folder, "skypilot")
        self._mount = str(folder.parent)

    def check(self) -> None:
        """Raises EngineError: nothing can be submitted."""
        raise EngineError(
            "--engine=skypilot: is rendered only; add --render=FOLDER, and run "
            "`sky jobs launch FILE` with each file in it."
        )

    def render(self, jobs: Sequence[Job], parallel: int) -> dict[str, str]:
        """Returns the task of each job."""
        files = {}
        for index, job in enumerate(jobs):
            name = cloud.job_name(job, "SUBMISSION", index)
            files[f"{name}.yaml"] = self._task(job, name)
        return files

    def _task(self, job: Job, name: str) -> str:
        options = self._options
        where = f'"$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{_PORT}"'
        if options["accelerators"].startswith("tpu"):
            where = "auto"
        keys = [key for key in ("accelerators", "infra", "image_id") if key in options]
        # JSON's strings are YAML's.
        lines = [
            f"name: {name}",
            f"num_nodes: {self._nodes}",
            "resources:",
            *(f"  {key}: {json.dumps(options[key])}" for key in keys),
            f"  use_spot: {json.dumps('spot' in options)}",
            "  # A preemption always recovers; 75 is a process that saved and ended.",
            "  job_recovery:",
            "    recover_on_exit_codes: [75]",
            "workdir: .",
            "file_mounts:",
            f"  {json.dumps(self._mount)}:",
            f"    source: {json.dumps(options['bucket'])}",
            "    mode: MOUNT",
            f"setup: {json.dumps(options.get('setup', ''))}",
            "run: |",
            f"  export LAUNCH_JOB={name} LAUNCH_SUBMISSION=SUBMISSION",
            "  export NNODES=$SKYPILOT_NUM_NODES NODE_RANK=$SKYPILOT_NODE_RANK",
            f"  export LAUNCH_COORDINATOR={where}",
            f"  {shlex.join(self._command(job))}",
        ]
        return "\n".join(lines) + "\n"

    def _command(self, job: Job) -> list[str]:
        """The task brings its trial.json: no driver of this engine writes one."""
        asked = [f"--asked={job.asked}"] if job.asked else []
        return [*cloud.worker(job, "skypilot"), *asked]

    def submit(self, jobs: Sequence[Job], submission: str, parallel: int) -> list[str]:
        """Raises EngineError, as `check`."""
        self.check()
        return []

    def alive(self) -> dict[str, str]:
        """Returns {}: nothing was submitted from here."""
        return {}

    def find(self, submission: str, index: int) -> str | None:
        """Returns None, as nothing was submitted from here."""
        return None

    def cause(self, job: str) -> tuple[str, str] | None:
        """Returns None, as nothing was submitted from here."""
        return None

    def stop(self, jobs: Sequence[str]) -> None:
        """Raises EngineError where there is something to stop."""
        if jobs:
            raise EngineError("--engine=skypilot: end jobs with sky jobs cancel.")

    def log(self, job: str) -> str | None:
        """Returns the command that shows it."""
        return f"sky jobs logs --name {shlex.quote(job)}"
