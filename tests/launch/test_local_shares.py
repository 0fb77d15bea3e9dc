"""What a job of the local engine gets of the machine."""

import os
import types

import pytest

from launch import engines, local
from launch.trial import Trial


@pytest.mark.parametrize(
    "visible, parallel, per_node, shares",
    [
        ("0,1,2,3", 2, 0, [["0", "1"], ["2", "3"], ["0", "1"]]),
        ("GPU-a,GPU-b", 8, 0, [["GPU-a"], ["GPU-b"], ["GPU-a"]]),
        ("0,1,2", 3, 2, [["0", "1"], ["2", "0"], ["1", "2"]]),
        ("", 2, 0, [[], [], []]),
    ],
)
def test_gpus_are_shared_out(
    tmp_path, monkeypatch, visible, parallel, per_node, shares
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    here = local.Local(engines.Resources(gpus_per_node=per_node), tmp_path)
    monkeypatch.setattr(here, "alive", lambda: dict.fromkeys("abc", "running"))
    for job, share in zip("abc", shares, strict=True):
        assert here._choose("gpus", local.gpus(), per_node, parallel) == share
        here._write_ledger(job, pid="1", gpus=share, folder=str(tmp_path))


def test_cores_are_shared_out(tmp_path, monkeypatch):
    """Each job of a sweep is told of its own."""
    monkeypatch.setattr(local, "_cores", lambda: ["0", "1", "2", "3"])
    told = []
    submitted = types.SimpleNamespace(job_id="1")
    monkeypatch.setattr(
        local.submitit.LocalExecutor,
        "submit",
        lambda *_: told.append(os.environ.get("LAUNCH_CORES")) or submitted,
    )
    here = local.Local(engines.Resources(), tmp_path)
    monkeypatch.setattr(here, "alive", lambda: dict.fromkeys(("s-0", "s-1"), "running"))
    jobs = [engines.Job(tmp_path / name, name) for name in ("a", "b")]
    here.submit(jobs, "s", 2)
    assert told == ["0,1", "2,3"]
    # The second has ended, and its processes are not all gone.
    Trial(jobs[1].folder).create({})
    Trial(jobs[1].folder).record("ended", job="s-1", cause="done")
    here.submit(jobs[:1], "t", 2)
    assert told[2] == "2,3"
    assert "LAUNCH_CORES" not in os.environ


def test_more_cores_than_there_are_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_cores", lambda: ["0", "1", "2"])
    resources = engines.Resources(cpus_per_task=2, tasks_per_node=2)
    with pytest.raises(ValueError, match="--cpus_per_task: 4 cores asked, .* has 3"):
        local.Local(resources, tmp_path).check()
