"""Cloud TPUs without Kubernetes as an engine: queued resources, by the command gcloud.

A job is a queued resource: one slice, or several, which run the job from the startup
script of their machines and delete themselves at its end. Nothing brings a preempted
slice back: it stays SUSPENDED, its job counts as preempted, and when the driver submits
the trial again the old slice is deleted.

As with xpk the run directory must be one path here and on the machines; the option
'setup' is the place to mount it there.
"""

from __future__ import annotations

import json
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from launch import cloud, trial
from launch.engines import Job, Resources

OPTIONS = {
    "project": "of Google Cloud; needed",
    "zone": "such as us-east5-b; needed",
    "accelerator_type": "of each slice, such as v6e-16; needed",
    "runtime_version": "system of the machines, such as v2-alpha-tpuv6e; needed",
    "code": "gs://….tar.gz of the code, diffusionlab at its top; needed",
    "setup": "shell lines before the job: install, mount the run directory",
    "spot": "1: spot machines",
    "reserved": "1: machines of a reservation",
    "service_account": "who the machines are; it may delete queued resources",
    "network": "of the machines",
    "subnetwork": "of the machines",
    "valid_until_duration": "how long to wait for machines at most, such as 6h",
}
_NEEDED = ("project", "zone", "accelerator_type", "runtime_version", "code")
_PASSED = (
    "accelerator_type",
    "runtime_version",
    "service_account",
    "network",
    "subnetwork",
    "valid_until_duration",
)
_SWITCHES = ("spot", "reserved")

_GCLOUD = ("gcloud", "compute", "tpus", "queued-resources")
_LAUNCHER = "launcher=diffusionlab"
_RUNNING = ("ACTIVE", "SUSPENDING", "DELETING")
_ENDED = ("SUSPENDED", "FAILED")


_SCRIPT = """\
#!/bin/bash
# Every machine of the slice runs this when it starts.
attribute() {{
  curl -sf -H 'Metadata-Flavor: Google' \\
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}}
cd "$(mktemp -d)"
gcloud storage cat {code} | tar -xz
{setup}
slice=$(attribute tpu-env | sed -n "s/^MEGASCALE_SLICE_ID: *'\\([0-9]*\\)'.*/\\1/p")
export LAUNCH_RANK=$((${{slice:-0}} * 1000 + $(attribute agent-worker-number)))
export LAUNCH_JOB={name} LAUNCH_SUBMISSION={submission} LAUNCH_COORDINATOR=auto
status=75
while [ "$status" = 75 ]; do
  {worker}
  status=$?
  sleep 5
done
if [ "$LAUNCH_RANK" != 0 ]; then
  if [ "$status" = 0 ]; then exit; fi
  # Process 0 notices that another failed, and writes so, before the slice goes.
  sleep 600
fi
{delete}
"""


class Tpu:
    """Creates queued resources.

    Args:
      resources: `nodes`, the number of slices, alone, and `options` as in `OPTIONS`.
      folder: for the startup scripts.

    Raises:
      ValueError: an option is unknown or missing, or a resource cannot be had.
    """

    ends_with_driver = False
    queues = False

    def __init__(self, resources: Resources, folder: pathlib.Path):
        self._nodes = cloud.whole_machines(resources, "tpu")
        self._options = cloud.chosen(resources.options, OPTIONS, _NEEDED, "tpu")
        self._place = cloud.passed(self._options, ("project", "zone"))
        self._folder, self._listed = folder, set()
        if not (code := self._options["code"]).startswith("gs://"):
            raise ValueError(f"--code: must be gs://….tar.gz, got '{code}'.")
        cloud.plain_path(folder, "tpu")

    def check(self) -> None:
        """Raises EngineError where there is no gcloud, or it may not list slices."""
        cloud.need("gcloud", "tpu")
        self.alive()

    def render(self, jobs: Sequence[Job], parallel: int) -> dict[str, str]:
        """Returns the commands, and the startup script of each job."""
        files, lines = {}, []
        for index, job in enumerate(jobs):
            name = cloud.job_name(job, "SUBMISSION", index)
            script = f"{name}.startup.sh"
            lines.append(shlex.join(self._create(job, name, "SUBMISSION", script)))
            files[script] = self._script(job, name, "SUBMISSION")
        return {"tpu.sh": "\n".join(lines) + "\n", **files}

    def submit(self, jobs: Sequence[Job], submission: str, parallel: int) -> list[str]:
        """See `Engine`; what is left of earlier slices of these trials is deleted."""
        creates = {}
        self._folder.mkdir(parents=True, exist_ok=True)
        for index, job in enumerate(jobs):
            name = cloud.job_name(job, submission, index)
            path = self._folder / f"{name}.startup.sh"
            path.write_text(self._script(job, name, submission))
            creates[name] = self._create(job, name, submission, str(path))
        trials = {cloud.tag(str(job.folder)) for job in jobs}
        for name, item in self._list().items():
            labels = item["tpu"]["nodeSpec"][0]["node"]["labels"]
            if _state(item) in _ENDED and labels["trial"] in trials:
                self.stop([name])
        return cloud.create_all(creates, self.stop)

    def _create(self, job: Job, name: str, submission: str, script: str) -> list[str]:
        trial_of = (
            f"trial={cloud.tag(str(job.folder))},submission={cloud.tag(submission)}"
        )
        several = [f"--node-count={self._nodes}", f"--node-prefix={name}"]
        return [
            *(*_GCLOUD, "create", name, *self._place),
            *(several if self._nodes > 1 else [f"--node-id={name}"]),
            *cloud.passed(self._options, _PASSED),
            f"--labels={_LAUNCHER},{trial_of}",
            f"--metadata-from-file=startup-script={script}",
            *(f"--{key}" for key in _SWITCHES if key in self._options),
            "--async",
        ]

    def _delete(self, name: str) -> list[str]:
        more = ("--force", "--async", "--quiet")
        return [*_GCLOUD, "delete", name, *self._place, *more]

    def _script(self, job: Job, name: str, submission: str) -> str:
        return _SCRIPT.format(
            code=shlex.quote(self._options["code"]),
            setup=self._options.get("setup", ""),
            name=name,
            submission=shlex.quote(submission),
            worker=shlex.join(cloud.worker(job, "tpu")),
            delete=shlex.join(self._delete(name)),
        )

    def alive(self) -> dict[str, str]:
        """See `Engine`; all that this launcher has created in the zone."""
        return {
            name: "running" if _state(item) in _RUNNING else "waiting"
            for name, item in self._list().items()
            if _state(item) not in _ENDED
        }

    def find(self, submission: str, index: int) -> str | None:
        """See `Engine`: the names of jobs tell their submission and index."""
        return cloud.named(self.alive(), submission, index)

    def cause(self, job: str) -> tuple[str, str] | None:
        """See `Engine`; of a slice that is deleted nothing is known."""
        item = self._list().get(job, {})
        if _state(item) == "SUSPENDED":
            return trial.PREEMPTED, "slice was suspended"
        if _state(item) == "FAILED":
            error = item["state"].get("failedData", {}).get("error", {})
            return trial.LOST, error.get("message", "the request for machines failed")
        return None

    def stop(self, jobs: Sequence[str]) -> None:
        """Deletes slices; their processes get SIGTERM as the machines shut down.

        Raises:
          EngineError: one lives on.
        """
        cloud.delete_all(
            {job: self._delete(job) for job in jobs},
            lambda: [n for n, i in self._list().items() if _state(i) != "DELETING"],
        )

    def log(self, job: str) -> str | None:
        """Returns the command that shows it while the slice is there."""
        if job not in self._listed:
            return None
        node = f"{job}-0" if self._nodes > 1 else job
        ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *self._place]
        show = "--command=sudo journalctl -u google-startup-scripts"
        return shlex.join([*ssh, "--worker=0", show])

    def _list(self) -> dict[str, dict[str, Any]]:
        """Returns what this launcher has created, by name."""
        said = cloud.call(
            *(*_GCLOUD, "list", *self._place),
            *(f"--filter=tpu.nodeSpec.node.labels.{_LAUNCHER}", "--format=json"),
        )
        found = {item["name"].rpartition("/")[2]: item for item in json.loads(said)}
        self._listed = {n for n, item in found.items() if _state(item) not in _ENDED}
        return found


def _state(item: Mapping[str, Any]) -> str:
    return item.get("state", {}).get("state", "")
