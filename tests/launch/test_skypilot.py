import dataclasses
import importlib
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from launch import engines, worker
from launch.engines import EngineError, Job, Resources
from launch.skypilot import OPTIONS, Skypilot
from launch.trial import Trial

BASE = {"accelerators": "H100:8", "bucket": "gs://bucket/rates"}
RUN = "/gcs/rates/runs/0003-ab12cd34"
JOB = Job(pathlib.Path(RUN), "rates/0003-ab12cd34")
NAME = "rates-0003-ab12cd34-4298c219-0"


def engine(nodes=1, folder="/gcs/rates/jobs", **options):
    resources = Resources(nodes=nodes, options={**BASE, **options})
    return Skypilot(resources, pathlib.Path(folder))


def task(*jobs, **given):
    files = engine(**given).render(jobs or [JOB], 1)
    return yaml.safe_load(files[f"{NAME}.yaml"])


def test_the_task_of_a_job():
    found = task(nodes=2, infra="gcp/us-east5", spot="1", setup='a "b"\nc: d')
    run = found.pop("run")
    assert found == {
        "name": NAME,
        "num_nodes": 2,
        "resources": {
            "accelerators": "H100:8",
            "infra": "gcp/us-east5",
            "use_spot": True,
            "job_recovery": {"recover_on_exit_codes": [75]},
        },
        "workdir": ".",
        "file_mounts": {"/gcs/rates": {"source": "gs://bucket/rates", "mode": "MOUNT"}},
        "setup": 'a "b"\nc: d',
    }
    assert run.splitlines()[-1] == f"python -m launch.worker {RUN}"


def test_each_job_has_a_file():
    files = engine().render([JOB, Job(JOB.folder, "rates/0004")], 1)
    assert set(files) == {f"{NAME}.yaml", "rates-0004-4298c219-1.yaml"}


@pytest.mark.parametrize(
    "accelerators, where", [("H100:8", "10.0.0.1:6002"), ("tpu-v6e-8", "auto")]
)
def test_the_processes_find_each_other(tmp_path, accelerators, where):
    """The rendered lines are run, with a python that says what it was given."""
    (tmp_path / "python").write_text(
        f"#!{sys.executable}\n"
        "import os, sys\n"
        "names = ('LAUNCH_JOB', 'LAUNCH_COORDINATOR', 'NNODES', 'NODE_RANK')\n"
        "print(*[os.environ[n] for n in names], *sys.argv[1:])\n"
        "sys.exit(75)\n"
    )
    (tmp_path / "python").chmod(0o755)
    given = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    script = task(nodes=2, accelerators=accelerators)["run"]
    done = subprocess.run(["bash", "-c", script], env=given, capture_output=True)
    said = f"{NAME} {where} 2 1 -m launch.worker {RUN}\n"
    assert (done.returncode, done.stdout.decode(), done.stderr) == (75, said, b"")


ASKED = json.dumps({"config": 'it\'s a "b".py', "overrides": {"config.a": [1, None]}})


def test_the_task_brings_what_was_asked(tmp_path, monkeypatch):
    job = Job(tmp_path / "run", JOB.name, asked=ASKED)
    command = shlex.split(task(job)["run"].splitlines()[-1])
    assert command[:3] == ["python", "-m", "launch.worker"]
    monkeypatch.setattr(sys, "argv", command[2:])
    assert worker._from_flags() == str(job.folder)
    assert Trial(job.folder).asked() == json.loads(ASKED)


READ = """
import sys, yaml
import sky
from sky.utils import common_utils, schemas

task = yaml.safe_load(sys.stdin)
common_utils.validate_schema(task, schemas.get_task_schema(), "wrong: ")
# The bucket would be looked for.
del task["file_mounts"]
print(sky.Task.from_yaml_config(task).num_nodes)
"""


@pytest.mark.skipif(
    shutil.which("sky") is None,
    reason="needs the command sky, from an environment of its own (its pins fight with "
    "JAX's); the task is checked key by key without it",
)
def test_skypilot_reads_the_task(tmp_path):
    job = dataclasses.replace(JOB, asked=ASKED)
    text = engine(nodes=2, spot="1", infra="gcp").render([job], 1)[f"{NAME}.yaml"]
    python = pathlib.Path(shutil.which("sky")).parent / "python"

    def read(given):
        env = {**os.environ, "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
        env |= {"HOME": str(tmp_path)}
        return subprocess.run(
            [python, "-c", READ], input=given, env=env, capture_output=True, text=True
        )

    assert read(text).stdout.split()[-1] == "2"
    assert "job_recover" in read(text.replace("job_recovery", "job_recover")).stderr


def test_nothing_is_submitted():
    here = engine()
    for ask in (here.check, lambda: here.submit([JOB], "one", 1)):
        with pytest.raises(EngineError) as error:
            ask()
        said = str(error.value)
        assert "rendered only" in said and "`sky jobs launch FILE`" in said
        assert "--render=FOLDER" in said and "\n" not in said
    assert here.alive() == {} and here.cause("a") is None and here.find("a", 0) is None
    here.stop([])
    with pytest.raises(EngineError, match="sky jobs cancel"):
        here.stop(["a"])


@pytest.mark.parametrize(
    "options, resources, folder, words",
    [
        (
            dict(accelerators=""),
            {},
            "/g/jobs",
            "--accelerators: --engine=skypilot needs",
        ),
        (dict(bucket=""), {}, "/g/jobs", "--bucket: --engine=skypilot needs it"),
        (dict(spot="0"), {}, "/g/jobs", "--spot: must be 1 or left out"),
        ({}, dict(gpus_per_node=8), "/g/jobs", "--gpus_per_node: "),
        ({}, dict(minutes=8), "/g/jobs", "--time: "),
        ({}, {}, "/here/gs:/bucket/jobs", "mount the bucket"),
    ],
)
def test_what_cannot_be_had_is_one_line(options, resources, folder, words):
    given = Resources(options={**BASE, **options}, **resources)
    with pytest.raises(ValueError) as error:
        Skypilot(given, pathlib.Path(folder))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_option_names_all_there_are():
    with pytest.raises(ValueError) as error:
        engine(partition="gpu")
    assert all(name in str(error.value) for name in OPTIONS)


@pytest.mark.parametrize("name", ["xpk", "tpu", "skypilot"])
def test_the_commands_have_all_that_an_engine_has(name):
    module, _, found = engines.ENGINES[name].partition(":")
    cls = getattr(importlib.import_module(module), found)
    methods = [m for m in vars(engines.Engine) if m[0] != "_"]
    wanted = {*methods, *engines.Engine.__annotations__}
    assert len(wanted) > 8 and [m for m in wanted if not hasattr(cls, m)] == []
