import io
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tarfile

import pytest
from recorded import stand_in

from launch import trial
from launch.engines import EngineError, Job, Resources
from launch.tpu import OPTIONS, Tpu

PLACE = {"project": "p", "zone": "us-east5-b"}
BASE = {
    **PLACE,
    "accelerator_type": "v6e-16",
    "runtime_version": "v2-alpha-tpuv6e",
    "code": "gs://bucket/code.tar.gz",
}
RUN = "/gcs/rates/runs/0003-ab12cd34"
JOB = Job(pathlib.Path(RUN), "rates/0003-ab12cd34")
NAME = "rates-0003-ab12cd34-4298c219-0"
ALL = dict(
    spot="1",
    service_account="runner@p.iam.gserviceaccount.com",
    network="inner",
    subnetwork="inner-east5",
    valid_until_duration="6h",
)


def engine(nodes=1, folder="/gcs/rates/jobs", **options):
    resources = Resources(nodes=nodes, options={**BASE, **options})
    return Tpu(resources, pathlib.Path(folder))


def rendered(here, *jobs):
    """The words of each command line, and the other files."""
    files = here.render(jobs or [JOB], 1)
    lines = files.pop("tpu.sh").splitlines()
    return [shlex.split(line) for line in lines], files


def test_the_command_of_one_slice():
    [words], files = rendered(engine(spot="1"))
    assert words == [
        *("gcloud", "compute", "tpus", "queued-resources", "create", NAME),
        *("--project=p", "--zone=us-east5-b", f"--node-id={NAME}"),
        *("--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e"),
        "--labels=launcher=diffusionlab,trial=2bc01c5c,submission=4298c219",
        f"--metadata-from-file=startup-script={NAME}.startup.sh",
        *("--spot", "--async"),
    ]
    assert list(files) == [f"{NAME}.startup.sh"]


def test_several_slices_are_counted_and_every_option_is_passed_on():
    [words], _ = rendered(engine(nodes=3, **ALL))
    assert "--node-count=3" in words and f"--node-prefix={NAME}" in words
    assert not any(word.startswith("--node-id") for word in words)
    assert {
        "--service-account=runner@p.iam.gserviceaccount.com",
        "--network=inner",
        "--subnetwork=inner-east5",
        "--valid-until-duration=6h",
    } <= set(words)
    [words], _ = rendered(engine(reserved="1"))
    assert "--reserved" in words and "--spot" not in words


@pytest.mark.skipif(
    shutil.which("gcloud") is None,
    reason="needs the command gcloud (cloud.google.com/sdk), which is no package of "
    "Python's; the words are compared without it",
)
def test_gclouds_own_parser_takes_every_command(tmp_path, monkeypatch):
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "cloud"))
    monkeypatch.setenv("CLOUDSDK_CORE_DISABLE_USAGE_REPORTING", "1")

    def is_right(line):
        lint = ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={line}"]
        said = json.loads(subprocess.run(lint, capture_output=True, check=True).stdout)
        return [one["success"] for one in said] == [True]

    here = engine(nodes=3, **ALL)
    (tmp_path / "bin").mkdir()
    path = tmp_path / "bin" / "gcloud"
    path.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/said\necho "[]"\n')
    path.chmod(0o755)
    with monkeypatch.context() as context:
        context.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
        here.check()
        here.stop(["some-slice"])
    listed, deleted = (tmp_path / "said").read_text().splitlines()
    assert " list " in listed and " delete " in deleted
    lines = [f"gcloud {listed}", f"gcloud {deleted}"]
    lines += [shlex.join(rendered(h)[0][0]) for h in (here, engine(reserved="1"))]
    lines += [here_log(path, monkeypatch)]
    assert [line for line in lines if not is_right(line)] == []
    assert not is_right(lines[0].replace("--zone", "--zome"))


def here_log(path, monkeypatch):
    """The command for the log of a slice that is there."""
    item = slice_of("a", "ACTIVE")
    path.write_text(f"#!/bin/sh\ncat <<'X'\n{json.dumps([item])}\nX\n")
    with monkeypatch.context() as context:
        context.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
        here = engine()
        assert here.log("a") is None
        here.alive()
        return here.log("a")


def slice_of(name, state, labels=None, **more):
    place = "projects/p/locations/us-east5-b/queuedResources"
    node = {"labels": labels or {"trial": "x"}}
    return {
        "name": f"{place}/{name}",
        "state": {"state": state, **more},
        "tpu": {"nodeSpec": [{"node": node}]},
    }


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return stand_in.World(tmp_path, "gcloud", slices={}, refuses="")


def set_state(world, name, state, **more):
    slices = world.read()["slices"]
    slices[name]["state"] = {"state": state, **more}
    world.change(slices=slices)


def did(world, verb):
    return [call[5] for call in world.calls() if call[4] == verb]


def test_a_suspended_slice_is_deleted_and_created_again(world, tmp_path):
    run = trial.Trial(tmp_path / "rates" / "runs" / "0003-ab12cd34")
    run.create({"overrides": {}, "num_steps": 20})
    job = Job(run.folder, "rates/0003-ab12cd34")
    here = engine(folder=tmp_path / "rates" / "jobs", spot="1")
    here.check()
    run.record("submitting", submission="one", index=0)
    [first] = here.submit([job], "one", 1)
    run.record("submitted", submission="one", job=first)
    assert (
        f"python -m launch.worker {run.folder}"
        in (world.read()["slices"][first]["script"])
    )
    assert here.alive() == {first: "waiting"}
    set_state(world, first, "PROVISIONING")
    assert here.alive() == {first: "waiting"}
    set_state(world, first, "ACTIVE")
    assert here.alive() == {first: "running"} and here.cause(first) is None
    assert here.find("one", 0) == first and here.find("two", 0) is None
    run.record("started", job=first, submission="one")

    # It may still write while it is being suspended.
    set_state(world, first, "SUSPENDING")
    assert here.alive() == {first: "running"}
    set_state(world, first, "SUSPENDED")
    assert here.alive() == {} and here.find("one", 0) is None
    assert here.log(first) is None
    assert trial.state(None, run.events(), here.alive(), 2) == "gone"
    cause, message = here.cause(first)
    assert (cause, message) == (trial.PREEMPTED, "slice was suspended")
    # Asking again must give the same answer: this driver may be killed here.
    assert here.cause(first) == (cause, message) and did(world, "delete") == []
    run.record("ended", job=first, cause=cause, message=message)
    assert trial.failures(run.events()) == 0
    assert trial.state(None, run.events(), here.alive(), 2) == "waiting"

    [second] = here.submit([job], "two", 1)
    assert did(world, "delete") == [first] and second != first
    assert list(world.read()["slices"]) == [second]
    run.record("submitted", submission="two", job=second)
    set_state(world, second, "ACTIVE")
    run.record("started", job=second, submission="two")
    assert trial.state(None, run.events(), here.alive(), 2) == "running"
    run.record("ended", job=second, cause=trial.DONE, step=20)
    here.stop([second])
    assert here.alive() == {}
    assert trial.state({"step": 20}, run.events(), here.alive(), 2) == "done"


def test_what_is_left_of_other_trials_stays(world, tmp_path):
    other = Job(tmp_path / "runs" / "0001", "rates/0001")
    here = engine(folder=tmp_path / "jobs")
    [left, running] = here.submit([other, JOB], "one", 2)
    set_state(world, left, "FAILED")
    set_state(world, running, "ACTIVE")
    here.submit([JOB], "two", 1)
    assert did(world, "delete") == []
    here.submit([other], "three", 1)
    assert did(world, "delete") == [left]


def test_a_slice_that_could_not_be_had_counts_as_lost(world, tmp_path):
    here = engine(folder=tmp_path / "jobs")
    [job] = here.submit([JOB], "one", 1)
    error = {"code": 8, "message": "There is no more capacity in us-east5-b."}
    set_state(world, job, "FAILED", failedData={"error": error})
    assert here.alive() == {}
    assert here.cause(job) == (trial.LOST, error["message"])
    set_state(world, job, "FAILED")
    assert here.cause(job) == (trial.LOST, "the request for machines failed")
    here.stop([job])
    assert here.cause(job) is None


def test_a_slice_that_is_being_deleted_lives_until_it_is_gone(world, tmp_path):
    here = engine(folder=tmp_path / "jobs")
    [job] = here.submit([JOB], "one", 1)
    set_state(world, job, "DELETING")
    assert here.alive() == {job: "running"}
    here.stop([job, "gone-long-ago"])


def test_a_job_that_cannot_be_submitted_takes_the_others_back(world, tmp_path):
    jobs = [Job(tmp_path / "runs" / f"{i:04d}", f"rates/{i:04d}") for i in range(3)]
    world.change(refuses="create rates-0001")
    with pytest.raises(EngineError) as error:
        engine(folder=tmp_path / "jobs").submit(jobs, "one", 3)
    assert "PERMISSION_DENIED: not allowed" in str(error.value)
    assert "\n" not in str(error.value)
    assert world.read()["slices"] == {} and len(did(world, "create")) == 2


def test_a_slice_that_cannot_be_deleted_is_an_error(world, tmp_path):
    here = engine(folder=tmp_path / "jobs")
    [job] = here.submit([JOB], "one", 1)
    world.change(refuses="delete")
    with pytest.raises(EngineError, match=f"{job} could not be ended: .*DENIED"):
        here.stop([job])


def test_a_cloud_that_does_not_answer_has_no_dead_slices(world):
    world.change(refuses="list")
    here = engine()
    for ask in (here.alive, here.check, lambda: here.cause("x")):
        with pytest.raises(EngineError, match="PERMISSION_DENIED") as error:
            ask()
        assert "\n" not in str(error.value)


COMMAND = """#!{python}
import json, os, pathlib, sys
here = pathlib.Path({folder!r})
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
variables = {{k: v for k, v in os.environ.items() if k.startswith("LAUNCH_")}}
where = sorted(os.listdir("."))
with (here / "calls").open("a") as file:
    file.write(json.dumps([name, words, variables, where]) + "\\n")
if name == "curl":
    sys.stdout.write({attributes!r}[words[-1].rpartition("/")[2]])
elif name == "gcloud" and words[:2] == ["storage", "cat"]:
    sys.stdout.buffer.write((here / "code").read_bytes())
elif name == "python":
    left = json.loads((here / "statuses").read_text())
    (here / "statuses").write_text(json.dumps(left[1:]))
    sys.exit(left[0])
"""


def run_script(folder, statuses, worker="0", tpu_env="ZONE: 'z'\n", **options):
    """Runs a startup script with commands that only note what they are told."""
    folder.mkdir()
    attributes = {"agent-worker-number": worker, "tpu-env": tpu_env}
    for name in ("curl", "gcloud", "python", "sleep"):
        text = COMMAND.format(
            python=sys.executable, folder=str(folder), attributes=attributes
        )
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "statuses").write_text(json.dumps(statuses))
    code = io.BytesIO()
    with tarfile.open(fileobj=code, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("setup.py"))
    (folder / "code").write_bytes(code.getvalue())
    _, files = rendered(engine(**options))
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "TMPDIR": str(folder)}
    script = files[f"{NAME}.startup.sh"]
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True)
    assert done.stderr == b""
    return [json.loads(s) for s in (folder / "calls").read_text().splitlines()]


def of(calls, name):
    return [words for called, words, *_ in calls if called == name]


def test_the_startup_script_goes_on_after_75_and_deletes_the_slice(tmp_path):
    calls = run_script(tmp_path / "a", [75, 75, 0], setup="export LAUNCH_SETUP=yes")
    assert of(calls, "python") == [["-m", "launch.worker", RUN]] * 3
    _, _, variables, where = next(call for call in calls if call[0] == "python")
    assert variables == {
        "LAUNCH_SETUP": "yes",
        "LAUNCH_JOB": NAME,
        "LAUNCH_SUBMISSION": "SUBMISSION",
        "LAUNCH_COORDINATOR": "auto",
        "LAUNCH_RANK": "0",
    }
    assert where == ["setup.py"]
    fetched, deleted = of(calls, "gcloud")
    assert fetched == ["storage", "cat", "gs://bucket/code.tar.gz"]
    assert deleted == [
        *("compute", "tpus", "queued-resources", "delete", NAME),
        *("--project=p", "--zone=us-east5-b", "--force", "--async", "--quiet"),
    ]
    assert ["600"] not in of(calls, "sleep")


def test_a_failure_of_process_0_ends_the_slice_at_once(tmp_path):
    calls = run_script(tmp_path / "a", [1])
    assert len(of(calls, "python")) == 1 and len(of(calls, "gcloud")) == 2
    assert ["600"] not in of(calls, "sleep")


@pytest.mark.parametrize(
    "worker, tpu_env, rank",
    [("3", "", "3"), ("0", "A: 'b'\nMEGASCALE_SLICE_ID: '2'\nC: 'd'\n", "2000")],
)
def test_other_processes_leave_the_slice_to_process_0(tmp_path, worker, tpu_env, rank):
    calls = run_script(tmp_path / "a", [0], worker, tpu_env)
    python = next(call for call in calls if call[0] == "python")
    assert python[2]["LAUNCH_RANK"] == rank
    assert len(of(calls, "gcloud")) == 1
    # Unless it does not see, for ten minutes, that they failed.
    calls = run_script(tmp_path / "b", [1], worker, tpu_env)
    assert of(calls, "sleep")[-1] == ["600"]
    assert of(calls, "gcloud")[-1][3] == "delete"


@pytest.mark.parametrize(
    "options, resources, folder, words",
    [
        (dict(zone=""), {}, "/gcs/s/jobs", "--zone: --engine=tpu needs it"),
        (dict(code=""), {}, "/gcs/s/jobs", "--code: --engine=tpu needs it"),
        (dict(code="code.tar.gz"), {}, "/gcs/s/jobs", "--code: must be gs://"),
        (dict(spot="true"), {}, "/gcs/s/jobs", "--spot: must be 1 or left out"),
        ({}, dict(gpus_per_node=8), "/gcs/s/jobs", "--gpus_per_node: "),
        ({}, dict(minutes=8), "/gcs/s/jobs", "--time: "),
        ({}, dict(tasks_per_node=4), "/gcs/s/jobs", "--tasks_per_node: "),
        ({}, {}, "/here/gs:/bucket/s/jobs", "mount the bucket"),
        ({}, {}, "/a,b/jobs", "'/a,b/jobs': "),
    ],
)
def test_what_cannot_be_had_is_one_line(options, resources, folder, words):
    with pytest.raises(ValueError) as error:
        Tpu(Resources(options={**BASE, **options}, **resources), pathlib.Path(folder))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_option_names_all_there_are():
    with pytest.raises(ValueError) as error:
        engine(partition="gpu")
    assert all(name in str(error.value) for name in OPTIONS)


def test_a_missing_gcloud_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match="no gcloud on PATH; install the Google") as e:
        engine().check()
    assert "\n" not in str(e.value)


def test_a_command_that_asks_is_not_waited_for(process):
    ask = "from launch import cloud; print(cloud.call('cat').strip() or 'nothing')"
    assert process("-c", ask, input="yes").stdout.strip() == "nothing"


def test_a_job_that_waits_for_others_is_refused(world, tmp_path):
    here = engine(folder=tmp_path / "jobs")
    with pytest.raises(EngineError, match="'s/2' is to wait for other jobs"):
        here.submit([Job(JOB.folder, "s/2", ("s-1",))], "one", 1)
    assert world.calls() == []
