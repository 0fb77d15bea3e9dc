import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from manifests import check_jobs, check_jobset, strip
from recorded import stand_in

from launch import trial
from launch.engines import EngineError, Job, Resources
from launch.xpk import OPTIONS, Xpk, explain

# The first line of each is our command; the rest is what xpk 1.16.0 wrote when it got
# that with --dry-run and --output-manifest-file, without keys that hold nothing.
RECORDED = pathlib.Path(__file__).parent / "recorded"
BASE = dict(
    project="p", zone="us-east5-b", cluster="c1", docker_image="gcr.io/p/image:1"
)
KINDS = {
    "tpu": dict(nodes=2, tpu_type="v6e-16", termination_grace_period_seconds="120"),
    "gpu": dict(nodes=2, device_type="h100-80gb-8", priority="low"),
}
RUN = "/gcs/rates/runs/0003-ab12cd34"
JOB = Job(pathlib.Path(RUN), "rates/0003-ab12cd34")
NAME = "rates-0003-ab12cd34-4298c219-0"


def engine(nodes=1, folder="/gcs/rates/jobs", **options):
    resources = Resources(nodes=nodes, options={**BASE, **options})
    return Xpk(resources, pathlib.Path(folder))


def examine(manifest, kind):
    """Asserts that a manifest is valid, and what the launcher relies on in it."""
    check_jobset(manifest)
    check_jobs(manifest)
    assert manifest["metadata"]["name"] == NAME
    assert manifest["metadata"]["labels"]["xpk.google.com/workload"] == NAME
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 1000
    [part] = manifest["spec"]["replicatedJobs"]
    spec = part["template"]["spec"]
    codes = spec["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert codes["operator"] == "NotIn" and 75 in codes["values"]
    assert 1 not in codes["values"]
    pod = spec["template"]
    assert pod["metadata"]["labels"]["xpk.google.com/workload"] == NAME
    [container] = pod["spec"]["containers"]
    script = container["command"][-1]
    assert f"python -m launch.worker {RUN}) &" in script
    assert f"LAUNCH_JOB={NAME} LAUNCH_SUBMISSION=SUBMISSION" in script
    if kind == "tpu":
        assert part["replicas"] == 2 and spec["parallelism"] == 4
        assert "LAUNCH_COORDINATOR=auto" in script
        assert pod["spec"]["terminationGracePeriodSeconds"] == 120
        return
    assert part["replicas"] == 1 and spec["parallelism"] == 2
    variables = {v["name"] for v in container["env"]}
    assert {"NNODES", "NODE_RANK"} <= variables
    assert "$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT" in script
    assert {"JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT"} <= variables


@pytest.mark.parametrize("kind", KINDS)
def test_the_recorded_manifest_is_of_todays_command_and_valid(kind, monkeypatch):
    monkeypatch.setenv("PATH", "")
    text = (RECORDED / f"xpk_{kind}.yaml").read_text()
    files = engine(**KINDS[kind]).render([JOB], 1)
    assert list(files) == ["xpk.sh"]
    remark, command = files["xpk.sh"].splitlines()
    assert remark.startswith("# No manifests: there is no xpk here; install it")
    assert text.splitlines()[0] == f"# {command}"
    examine(yaml.safe_load(text), kind)


@pytest.fixture
def real_xpk(monkeypatch, tmp_path):
    if shutil.which("xpk") is None:
        pytest.skip(
            "needs the command xpk, from an environment of its own (its pins fight "
            "with JAX's); the manifests it wrote for these commands are in recorded/"
        )
    monkeypatch.setenv("TELEMETRY_ENABLED", "false")
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_xpk_takes_the_command_and_its_manifest_is_valid(kind, real_xpk):
    files = engine(**KINDS[kind]).render([JOB], 1)
    assert set(files) == {"xpk.sh", f"{NAME}.yaml"}
    examine(strip(yaml.safe_load(files[f"{NAME}.yaml"])), kind)


def test_what_xpk_says_against_a_command_is_one_line(real_xpk):
    with pytest.raises(EngineError) as error:
        engine(tpu_type="v6e-9").render([JOB], 1)
    assert "invalid choice: 'v6e-9'" in str(error.value)
    assert "\n" not in str(error.value)


_JOB = ("spec", "replicatedJobs", 0, "template", "spec")


@pytest.mark.parametrize(
    "check, path, error",
    [
        (check_jobset, ("spec", "sucessPolicy"), "a field is unknown"),
        (check_jobset, (*_JOB[:3], "replica"), "a field is unknown"),
        (check_jobset, (*_JOB[:3], "name"), "validation error"),
        (check_jobs, (*_JOB, "paralelism"), "'paralelism' was unexpected"),
        (
            check_jobs,
            (*_JOB, "template", "spec", "volumez"),
            "'volumez' was unexpected",
        ),
        (check_jobs, (*_JOB, "template", "spec", "containers"), "is not of type"),
    ],
)
def test_an_error_in_a_manifest_is_caught(check, path, error):
    manifest = yaml.safe_load((RECORDED / "xpk_tpu.yaml").read_text())
    check(manifest)
    inner = manifest
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = 1
    with pytest.raises(Exception, match=error):
        check(manifest)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    things = dict(jobsets={}, pods={}, contexts=["gke_p_us-east5_c1"], refuses="")
    return stand_in.World(tmp_path, "xpk", "kubectl", **things)


def set_status(world, name, suspend=False, **status):
    jobsets = world.read()["jobsets"]
    jobsets[name] |= {"spec": {"suspend": suspend}, "status": status}
    world.change(jobsets=jobsets)


def condition(kind, reason="", message=""):
    return {"type": kind, "status": "True", "reason": reason, "message": message}


FAILED, COMPLETED = condition("Failed", "FailedJobs", "it did"), condition("Completed")
DISRUPTED = condition("DisruptionTarget", "PreemptionByScheduler", "higher priority")


def pod(code=1, reason="Error", *conditions):
    ended = {"terminated": {"exitCode": code, "reason": reason}}
    containers = [{"name": "jax-tpu", "state": ended}]
    status = {"conditions": conditions, "containerStatuses": containers}
    return {"metadata": {"name": "w-0"}, "status": status}


OOM, TAKEN = pod(137, "OOMKilled"), pod(1, "Error", DISRUPTED)


def test_a_preempted_job_is_submitted_again_and_finishes(world, tmp_path):
    run = trial.Trial(tmp_path / "rates" / "runs" / "0003-ab12cd34")
    run.create({"overrides": {}, "num_steps": 20})
    job = Job(run.folder, "rates/0003-ab12cd34")
    here = engine(tpu_type="v6e-16", folder=tmp_path / "rates" / "jobs")
    here.check()
    run.record("submitting", submission="one", index=0)
    [first] = here.submit([job], "one", 1)
    run.record("submitted", submission="one", job=first)
    assert here.alive() == {first: "waiting"}
    set_status(world, first, replicatedJobsStatus=[{"name": "slice-job", "ready": 0}])
    assert here.alive() == {first: "waiting"}
    set_status(world, first, replicatedJobsStatus=[{"name": "slice-job", "ready": 1}])
    assert here.alive() == {first: "running"} and here.cause(first) is None
    set_status(world, first, suspend=True, replicatedJobsStatus=[{"ready": 1}])
    assert here.alive() == {first: "waiting"}
    assert here.find("one", 0) == first and here.find("one", 1) is None
    log = shlex.split(here.log(first))
    assert log[:2] == ["kubectl", "--context=gke_p_us-east5_c1"]
    assert f"xpk.google.com/workload={first}," in log[-1]
    run.record("started", job=first, submission="one")

    resumed = {"type": "Suspended", "status": "False"}
    set_status(world, first, conditions=[resumed, FAILED])
    world.change(pods={first: [pod(143), TAKEN]})
    assert here.alive() == {} and here.find("one", 0) is None
    assert trial.state(None, run.events(), here.alive(), 2) == "gone"
    cause, message = here.cause(first)
    assert cause == trial.PREEMPTED and "higher priority" in message
    run.record("ended", job=first, cause=cause, message=message)
    assert trial.failures(run.events()) == 0
    assert trial.state(None, run.events(), here.alive(), 2) == "waiting"

    [second] = here.submit([job], "two", 1)
    assert second != first and here.alive() == {second: "waiting"}
    set_status(world, second, terminalState="Completed")
    assert here.alive() == {}
    set_status(world, second, conditions=[COMPLETED])
    assert here.alive() == {}
    cause, message = here.cause(second)
    assert cause == trial.FAILED and "same storage" in message
    here.stop([first, second, "gone-long-ago"])
    assert world.read()["jobsets"] == {} and here.cause(second) is None


@pytest.mark.parametrize(
    "pods, condition, cause, words",
    [
        ([OOM], FAILED, trial.OUT_OF_MEMORY, "exit status 137, OOMKilled"),
        ([pod(), TAKEN, OOM], FAILED, trial.OUT_OF_MEMORY, "OOMKilled"),
        ([pod(143), pod(1)], FAILED, trial.FAILED, "exit status 1, Error"),
        ([pod(137), pod(0)], FAILED, trial.KILLED, "exit status 137"),
        ([pod(75)], FAILED, trial.PREEMPTED, "exit status 75"),
        ([pod(), TAKEN], FAILED, trial.PREEMPTED, "higher priority"),
        ([], FAILED, trial.FAILED, "JobSet: FailedJobs: it did"),
        ([pod(0, "Completed")], COMPLETED, trial.FAILED, "not seen here"),
    ],
)
def test_the_cause_is_what_drew_the_other_pods_along(pods, condition, cause, words):
    told = explain({"status": {"conditions": [condition]}}, pods)
    assert told[0] == cause and words in told[1]


def test_a_job_that_cannot_be_submitted_takes_the_others_back(world):
    jobs = [Job(JOB.folder, f"rates/{i:04d}") for i in range(3)]
    world.change(refuses="create --workload=rates-0001")
    with pytest.raises(EngineError, match="xpk workload create: ERROR: PERM"):
        engine(tpu_type="v6e-16").submit(jobs, "one", 3)
    assert world.read()["jobsets"] == {}
    did = [(c[2], c[3].split("-")[-3]) for c in world.calls() if c[0] == "xpk"]
    begun = [("create", "0000"), ("create", "0001")]
    assert did == [*begun, ("delete", "0000"), ("delete", "0001")]


def test_a_job_that_cannot_be_stopped_is_an_error(world):
    here = engine(tpu_type="v6e-16")
    [job] = here.submit([JOB], "one", 1)
    world.change(refuses="delete")
    with pytest.raises(EngineError, match=f"{job} could not be ended: .*DENIED"):
        here.stop([job])


def test_a_cluster_that_does_not_answer_has_no_dead_jobs(world):
    here = engine(tpu_type="v6e-16")
    here.submit([JOB], "one", 1)
    world.change(refuses="get jobsets")
    for ask in (here.alive, here.check, lambda: here.find("one", 0)):
        with pytest.raises(EngineError, match="DENIED") as error:
            ask()
        assert "\n" not in str(error.value)


def test_another_cluster_of_the_same_name_is_not_asked(world):
    here = engine(tpu_type="v6e-16")
    world.change(contexts=["gke_p_us-east5_c1", "gke_p_us-east5-b_c1"])
    with pytest.raises(EngineError):  # The stand-in answers for the regional one.
        here.alive()
    assert "--context=gke_p_us-east5-b_c1" in world.calls()[-1]
    world.change(contexts=[])
    with pytest.raises(EngineError) as error:
        engine(tpu_type="v6e-16").alive()
    said = str(error.value)
    assert "get-credentials c1 --project=p --location=us-east5" in said
    assert "\n" not in said and world.calls()[-1][1:3] == ["config", "get-contexts"]


def test_names_are_short_and_each_their_own(monkeypatch):
    monkeypatch.setenv("PATH", "")
    job = Job(JOB.folder, "a-sweep-with-quite-a-long-name/0003-ab12cd34")
    files = engine(tpu_type="v6e-16").render([job, job], 1)
    lines = [shlex.split(s) for s in files["xpk.sh"].splitlines() if s[0] != "#"]
    names = [line[3].removeprefix("--workload=") for line in lines]
    assert len(set(names)) == 2 and max(map(len, names)) <= 39
    assert all("0003-ab12cd34" in name for name in names)


def test_the_worker_gets_sigterm_in_the_shell_of_the_pod(tmp_path):
    """The recorded script is run, with a python that says what it was given."""
    manifest = yaml.safe_load((RECORDED / "xpk_gpu.yaml").read_text())
    part = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    script = part["template"]["spec"]["containers"][0]["command"][-1]
    # The end of xpk's script writes a file for its side containers.
    script = script.replace("/usr/share/workload/", f"{tmp_path}/")
    (tmp_path / "python").write_text(
        f"#!{sys.executable}\n"
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print(os.environ['LAUNCH_COORDINATOR'], *sys.argv[1:], flush=True)\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "sleep").write_text("#!/bin/sh\nexec /bin/sleep 0.1\n")
    for name in ("python", "sleep"):
        (tmp_path / name).chmod(0o755)
    env = {"JAX_COORDINATOR_ADDRESS": "first.w", "JAX_COORDINATOR_PORT": "6002"}
    env["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    bash = subprocess.Popen(
        ["bash", "-c", script], env=env, stdout=subprocess.PIPE, text=True
    )
    try:
        said = [bash.stdout.readline() for _ in range(2)]
        assert said[1] == f"first.w:6002 -m launch.worker {RUN}\n"
        bash.terminate()
        assert bash.wait(timeout=30) == 75
    finally:
        bash.kill()
        bash.stdout.close()


@pytest.mark.parametrize(
    "options, resources, folder, words",
    [
        ({}, {}, "/gcs/s/jobs", "--engine=xpk: needs --tpu_type"),
        (dict(tpu_type="v6e-8", device_type="l4-1"), {}, "/gcs/s/jobs", "or else"),
        (dict(tpu_typ="v6e-8"), {}, "/gcs/s/jobs", "--tpu_typ: "),
        (dict(project=""), {}, "/gcs/s/jobs", "--project: --engine=xpk needs it"),
        (dict(docker_image=""), {}, "/gcs/s/jobs", "--docker_image: "),
        (dict(tpu_type="v6e-8", spot="yes"), {}, "/gcs/s/jobs", "--spot: must be 1"),
        (dict(tpu_type="v6e-8"), dict(gpus_per_node=8), "/g/jobs", "--gpus_per_node: "),
        (dict(tpu_type="v6e-8"), dict(memory_gb=8), "/g/jobs", "--memory_gb: "),
        (dict(tpu_type="v6e-8"), dict(minutes=8), "/g/jobs", "--time: "),
        (dict(tpu_type="v6e-8"), dict(tasks_per_node=2), "/g/jobs", "--tasks_per_no"),
        (dict(tpu_type="v6e-8"), {}, "/here/gs:/bucket/s/jobs", "mount the bucket"),
        (dict(tpu_type="v6e-8"), {}, "/my runs/jobs", "'/my runs/jobs': "),
        (dict(tpu_type="v6e-8"), {}, "runs/jobs", "an absolute path"),
    ],
)
def test_what_cannot_be_had_is_one_line(options, resources, folder, words):
    with pytest.raises(ValueError) as error:
        Xpk(Resources(options={**BASE, **options}, **resources), pathlib.Path(folder))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_option_names_all_there_are():
    with pytest.raises(ValueError) as error:
        engine(tpu_type="v6e-8", partition="gpu")
    assert all(name in str(error.value) for name in OPTIONS)


def test_missing_commands_say_how_to_install_them(monkeypatch, tmp_path):
    here = engine(tpu_type="v6e-16")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match="^[^\n]* no xpk on PATH; install it [^\n]*$"):
        here.check()
    (tmp_path / "xpk").write_text("#!/bin/sh\n")
    (tmp_path / "xpk").chmod(0o755)
    with pytest.raises(EngineError, match="no kubectl on PATH; install it: gcloud"):
        here.check()
    with pytest.raises(EngineError, match="no kubectl on PATH"):
        here.alive()


def test_a_namespace_and_spot_are_passed_on(world):
    here = engine(tpu_type="v6e-16", namespace="mine", spot="1")
    [job] = here.submit([JOB], "one", 1)
    here.stop([job])
    create, delete = world.calls()
    assert {"--namespace=mine", "--spot"} <= set(create)
    assert delete == [
        *("xpk", "workload", "delete", f"--workload={job}"),
        *("--project=p", "--zone=us-east5-b", "--cluster=c1", "--namespace=mine"),
    ]
    with pytest.raises(EngineError, match="AssertionError"):  # The stand-in's.
        here.alive()
    assert "--namespace=mine" in world.calls()[-1]


def test_a_job_that_waits_for_others_is_refused(world):
    with pytest.raises(EngineError, match="'s/2' is to wait for other jobs"):
        engine(tpu_type="v6e-16").submit([Job(JOB.folder, "s/2", ("s-1",))], "one", 1)
    assert world.calls() == []
