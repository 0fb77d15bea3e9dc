"""Google Kubernetes Engine as an engine: TPUs and GPUs by the commands xpk and kubectl.

xpk writes the JobSet of a job and puts it into the cluster's queue; the cluster starts
it again after exit status 75, and when a machine goes. What became of it is asked of
kubectl, as JSON: xpk's own list is a table for people, without statuses and reasons.

The launcher reads what trials write, so their directories must be one path here and in
the pods, of the same storage: a bucket mounted with gcsfuse, or Filestore. Nothing can
see beforehand that it is not; a job that ends well and leaves no result says so.
"""

from __future__ import annotations

import json
import pathlib
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from launch import cloud, trial
from launch.engines import EngineError, Job, Resources

OPTIONS = {
    "project": "of Google Cloud; needed",
    "zone": "of the cluster, such as us-east5-b; needed",
    "cluster": "its name; needed",
    "docker_image": "with diffusionlab in its working directory; needed",
    "tpu_type": "of each slice, such as v6e-16; --nodes is the number of slices",
    "device_type": "of each GPU machine, such as h100-80gb-8",
    "storage": "name of the xpk storage to mount",
    "namespace": "of Kubernetes, 'default'",
    "priority": "in the queue, from very-low to very-high",
    "termination_grace_period_seconds": "time to save after SIGTERM, 30",
    "spot": "1: spot machines, where the cluster makes its nodes as they are needed",
}
_NEEDED = ("project", "zone", "cluster", "docker_image")
_PASSED = (
    "tpu_type",
    "device_type",
    "docker_image",
    "storage",
    "namespace",
    "priority",
    "termination_grace_period_seconds",
)
_LABEL = "xpk.google.com/workload"


class Xpk:
    """Submits to a GKE cluster that xpk has made.

    Args:
      resources: `nodes` alone, and `options` as in `OPTIONS`.
      folder: in the storage that the pods see too; nothing is kept there.

    Raises:
      ValueError: an option is unknown or missing, or a resource cannot be had.
    """

    ends_with_driver = False
    queues = False

    def __init__(self, resources: Resources, folder: pathlib.Path):
        self._nodes = cloud.whole_machines(resources, "xpk")
        self._options = cloud.chosen(resources.options, OPTIONS, _NEEDED, "xpk")
        if ("tpu_type" in self._options) == ("device_type" in self._options):
            raise ValueError(
                "--engine=xpk: needs --tpu_type=... for TPUs, or else "
                "--device_type=... for GPUs."
            )
        self._cluster = cloud.passed(self._options, _NEEDED[:3])
        self._known_context = ""
        cloud.plain_path(folder, "xpk")

    def check(self) -> None:
        """Raises EngineError where a command is missing or the cluster is silent."""
        for program in ("xpk", "kubectl"):
            cloud.need(program, "xpk")
        self.alive()

    def render(self, jobs: Sequence[Job], parallel: int) -> dict[str, str]:
        """Returns the commands and, where xpk is installed, each job's manifest."""
        files, lines = {}, []
        if shutil.which("xpk") is None:
            how = cloud.INSTALL["xpk"]
            lines.append(f"# No manifests: there is no xpk here; {how}.")
        for index, job in enumerate(jobs):
            name = cloud.job_name(job, "SUBMISSION", index)
            create = self._create(job, name, "SUBMISSION")
            lines.append(shlex.join(create))
            if shutil.which("xpk") is not None:
                files[f"{name}.yaml"] = _manifest(create)
        return {"xpk.sh": "\n".join(lines) + "\n", **files}

    def submit(self, jobs: Sequence[Job], submission: str, parallel: int) -> list[str]:
        """See `Engine`; at most `parallel` jobs are to be handed over at a time."""
        names = [cloud.job_name(job, submission, i) for i, job in enumerate(jobs)]
        creates = {
            name: self._create(job, name, submission)
            for job, name in zip(jobs, names, strict=True)
        }
        return cloud.create_all(creates, self.stop)

    def _create(self, job: Job, name: str, submission: str) -> list[str]:
        options = self._options
        size = f"--num-nodes={self._nodes}"
        # These are variables of xpk's GPU pods, like NNODES and NODE_RANK.
        where = "$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT"
        if "tpu_type" in options:
            size, where = f"--num-slices={self._nodes}", "auto"
        # One plain command: xpk's shell then becomes it, and SIGTERM arrives.
        worker = shlex.join(cloud.worker(job, "xpk"))
        variables = (
            f"LAUNCH_JOB={name} LAUNCH_SUBMISSION={submission} "
            f"LAUNCH_COORDINATOR={where}"
        )
        return [
            *("xpk", "workload", "create", f"--workload={name}", *self._cluster),
            *(*cloud.passed(options, _PASSED), size),
            *(["--spot"] if "spot" in options else []),
            *("--max-restarts=1000", "--restart-on-exit-codes=75"),
            f"--command=env {variables} {worker}",
        ]

    def alive(self) -> dict[str, str]:
        """See `Engine`; all that xpk has put into the cluster's namespace."""
        jobsets = self._get("jobsets", _LABEL)
        return {
            item["metadata"]["name"]: "running" if _runs(item) else "waiting"
            for item in jobsets
            if not _end(item)
        }

    def find(self, submission: str, index: int) -> str | None:
        """See `Engine`: the names of jobs tell their submission and index."""
        return cloud.named(self.alive(), submission, index)

    def cause(self, job: str) -> tuple[str, str] | None:
        """See `Engine`; what has ended is kept for twelve hours, if not deleted."""
        jobsets = self._get("jobsets", _LABEL)
        found = [item for item in jobsets if item["metadata"]["name"] == job]
        if not found or not _end(found[0]):
            return None
        return explain(found[0], self._get("pods", f"{_LABEL}={job}"))

    def stop(self, jobs: Sequence[str]) -> None:
        """Deletes jobs; their processes get SIGTERM and the pods' grace period.

        Raises:
          EngineError: one lives on.
        """
        more = [*self._cluster, *cloud.passed(self._options, ("namespace",))]
        words = ("xpk", "workload", "delete")
        cloud.delete_all(
            {job: [*words, f"--workload={job}", *more] for job in jobs}, self.alive
        )

    def log(self, job: str) -> str:
        """Returns the command that shows it, as long as the job is kept."""
        context = f"--context={self._known_context} " if self._known_context else ""
        namespace = self._options.get("namespace", "default")
        return (
            f"kubectl {context}--namespace={namespace} logs --tail=-1 --selector="
            f"{_LABEL}={job},batch.kubernetes.io/job-completion-index=0"
        )

    def _get(self, kind: str, selector: str) -> list[dict[str, Any]]:
        namespace = self._options.get("namespace", "default")
        where = [f"--context={self._context()}", f"--namespace={namespace}"]
        said = cloud.call(
            "kubectl", *where, "get", kind, f"--selector={selector}", "-o", "json"
        )
        return json.loads(said)["items"]

    def _context(self) -> str:
        """Returns kubectl's name of the cluster.

        The current one may be another cluster, where no job would be found alive.
        """
        if self._known_context:
            return self._known_context
        project, zone, cluster = (self._options[k] for k in _NEEDED[:3])
        region = zone.rpartition("-")[0]
        known = cloud.call("kubectl", "config", "get-contexts", "-o", "name").split()
        for location in (zone, region):
            if (context := f"gke_{project}_{location}_{cluster}") in known:
                self._known_context = context
                return context
        raise EngineError(
            f"--engine=xpk: kubectl does not know cluster '{cluster}'; run: gcloud "
            f"container clusters get-credentials {cluster} --project={project} "
            f"--location={region} (or, of a cluster in one zone, --location={zone})."
        )


def _manifest(create: Sequence[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "manifest.yaml"
        cloud.call(*create, "--dry-run", f"--output-manifest-file={path}")
        return path.read_text()


def _end(jobset: Mapping[str, Any]) -> str:
    """Returns 'Completed' or 'Failed' of a JobSet that has ended, else ''."""
    status = jobset.get("status", {})
    true = {c["type"] for c in status.get("conditions", []) if c["status"] == "True"}
    ended = {status.get("terminalState", ""), *true} & {"Completed", "Failed"}
    return next(iter(ended), "")


def _runs(jobset: Mapping[str, Any]) -> bool:
    parts = jobset.get("status", {}).get("replicatedJobsStatus", [])
    queued = jobset.get("spec", {}).get("suspend", False)
    return not queued and any(part.get("ready") for part in parts)


def explain(
    jobset: Mapping[str, Any], pods: Sequence[Mapping[str, Any]]
) -> tuple[str, str]:
    """Returns cause and message of a JobSet that has ended.

    Where pods tell different things, what drew the others along counts.
    """
    found = [told for pod in pods for told in _pod_causes(pod)]
    for cause in (trial.OUT_OF_MEMORY, trial.PREEMPTED, trial.FAILED, trial.KILLED):
        for told in found:
            if told[0] == cause:
                return told
    if _end(jobset) == "Completed":
        return trial.FAILED, (
            "the job ended well, but its result is not seen here: the run directory "
            "must be a mount of the same storage in the pods and here"
        )
    said = [c for c in jobset["status"].get("conditions", []) if c["type"] == "Failed"]
    why = f"{said[0].get('reason', '')}: {said[0].get('message', '')}" if said else ""
    return trial.FAILED, f"JobSet: {why or 'failed, and its pods are gone'}"


def _pod_causes(pod: Mapping[str, Any]) -> list[tuple[str, str]]:
    name, status, found = pod["metadata"]["name"], pod.get("status", {}), []
    for condition in status.get("conditions", []):
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            why = f"{condition.get('reason', '')}: {condition.get('message', '')}"
            found.append((trial.PREEMPTED, f"pod {name}: {why}"))
    for container in status.get("containerStatuses", []):
        ended = container.get("state", {}).get("terminated")
        if not ended or not ended["exitCode"]:
            continue
        code, reason = ended["exitCode"], ended.get("reason", "")
        if reason == "OOMKilled":
            cause = trial.OUT_OF_MEMORY
        elif code == 75:
            cause = trial.PREEMPTED
        else:
            cause = trial.KILLED if code > 128 else trial.FAILED
        found.append((cause, f"pod {name}: exit status {code}, {reason}"))
    return found
