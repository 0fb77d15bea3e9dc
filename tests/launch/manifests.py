"""What Kubernetes' own models and schemas say of a manifest."""

import json


def strip(value):
    """Without keys that hold nothing: xpk's templates have some."""
    if isinstance(value, dict):
        return {k: strip(v) for k, v in value.items() if v is not None}
    return [strip(v) for v in value] if isinstance(value, list) else value


def check_jobset(manifest):
    """Raises what the model of JobSet says against a manifest."""
    from kubeflow_trainer_api import models

    manifest = json.loads(json.dumps(manifest))
    # The names are filled in by JobSet itself.
    for i, rule in enumerate(manifest["spec"]["failurePolicy"]["rules"]):
        rule.setdefault("name", f"rule{i}")
    # What the model does not know it drops without a word.
    known = models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict()
    assert known == manifest, "a field is unknown"


def check_jobs(manifest):
    """Raises what Kubernetes' own schema says against the jobs in a manifest."""
    import kubernetes_validate

    for part in manifest["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
        job["spec"] = part["template"]["spec"]
        kubernetes_validate.validate(job, "1.33", strict=True)
