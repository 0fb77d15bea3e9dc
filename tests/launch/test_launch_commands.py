"""The commands: what they refuse and render, and real runs on this machine."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest
from patience import until

from launch import commands, driver, engines, flags, table
from launch.trial import Trial

SMALL = """
from configs.mixture import denoising

def get_config(variant=""):
    config = denoising.get_config("smoke")
    config.evals = dict()
    config.logging.update(samples_every=0, tensorboard=False, every=1)
    config.train.num_steps = 4
    if variant == "slow":
        config.data.source.name = "slow_mixture:slow"
    return config

def sweep():
    for seed in (1, 2):
        yield {"config.seed": seed}

def sweep_rate():
    for rate in (1e-3, 1e-2):
        yield {"config.optim.denoiser.learning_rate.value": rate}

def sweep_wrong():
    yield {"config.optim.denoiser.learning_rate.valeu": 1.0}

def sweep_empty():
    yield from ()

def sweep_endless():
    while True:
        yield {"config.seed": 3}

def sweep_bare():
    yield {"seed": 3}

def search(trial):
    return {"config.seed": trial.suggest_int("seed", 1, 9)}
"""


@pytest.fixture
def config(tmp_path, root, monkeypatch):
    path = tmp_path / "configs" / "x" / "small.py"
    path.parent.mkdir(parents=True)
    path.write_text(SMALL)
    one = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    monkeypatch.setenv("XLA_FLAGS", one)
    monkeypatch.setenv("PYTHONPATH", f"{root}:{root / 'tests' / 'launch'}")
    return f"--config={path}"


@pytest.fixture
def refused(tmp_path, config, capsys):
    """`refused(*words)`: the one line, after which nothing has been written."""

    def run(*words):
        before = sorted(tmp_path.rglob("*"))
        assert commands.main([str(w) for w in words]) == 1
        said = capsys.readouterr()
        assert said.err.startswith("launch: error: ") and said.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return said.err

    return run


def test_a_sweep_that_is_not_there_is_refused(refused, config, tmp_path):
    where = (config, f"--root={tmp_path}", "--name=s")
    assert "did you mean 'rate'" in refused("sweep", *where, "--sweep=rat")
    assert "'empty' is empty" in refused("sweep", *where, "--sweep=empty")
    assert "keys are 'config.…'" in refused("sweep", *where, "--sweep=bare")
    assert "stands alone" in refused("sweep", *where, "--sweep=search,rate")
    assert "1 or more" in refused("sweep", *where, "--sweep=search")
    assert "1 or more" in refused("sweep", *where, "--sweep=search", "--trials=-1")
    assert "for searches" in refused("sweep", *where, "--trials=3")
    assert "sets config.seed itself" in refused("sweep", *where, "--seeds=2")
    twice = refused("sweep", *where, "--sweep=rate,rate")
    assert "learning_rate.value is set by two" in twice
    assert "more than 100,000" in refused("sweep", *where, "--sweep=endless")


def test_an_override_that_nothing_reads_is_refused(refused, config, tmp_path):
    where = (config, f"--root={tmp_path}", "--name=s")
    assert "valeu" in refused("sweep", *where, "--sweep=wrong")
    said = refused("sweep", *where, "--config.train.num_stesp=3")
    assert "did you mean 'num_steps'" in said
    assert "num_stesp" in refused(
        "run", config, f"--workdir={tmp_path / 'r'}", "--config.train.num_stesp=3"
    )


def test_a_run_that_may_still_live_is_not_asked_for_otherwise(
    refused, config, tmp_path
):
    one = Trial(tmp_path / "r")
    run = ("run", config, f"--workdir={one.folder}", "--config.seed=2")
    asked = {"config": config.partition("=")[2], "overrides": {"config.seed": 1}}
    one.create({**asked, "flags": [], "max_failures": 3, "cwd": os.getcwd()})
    with driver.alone(one.folder):  # makes its lock
        place = driver.place("local", {})
    one.record("submitting", submission="s", index=0, place=place)
    said = refused(*run)
    assert "with another overrides; cancel it first" in said
    (one.folder / "trial.json").unlink()
    one.create({**asked, "flags": [], "sweep": str(tmp_path / "s")})
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "sweep.json").write_text('{"max_failures": 3}')
    assert "is a trial of the sweep" in refused(*run)


def test_wrong_flags_are_refused(refused, config, tmp_path):
    run = ("run", config, f"--workdir={tmp_path / 'r'}")
    assert "--partition: no flag" in refused(*run, "--partition=x")
    assert "--time: expected 90m" in refused(*run, "--time=90")
    assert "--tasks_per_node: must be at least 1" in refused(*run, "--tasks-per-node=0")
    assert "--nodes: --engine=local is one machine" in refused(*run, "--nodes=2")
    assert "--gpus_per_node" in refused(*run, "--gpus_per_node=64")
    assert "--cpus_per_task" in refused(*run, "--cpus_per_task=9999")
    assert "--max_failures" in refused(*run, "--max_failures=0")
    assert "expected --NAME=VALUE" in refused(*run, "word")
    assert "no flag of `status`" in refused("status", tmp_path, "--partition=x")
    assert "no run of the launcher" in refused("status", tmp_path)
    assert "holds no sweep" in refused("table", tmp_path)


def test_an_engine_whose_tool_is_missing_is_refused(
    refused, config, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", "")
    run = ("run", config, f"--workdir={tmp_path / 'r'}")
    assert "there is no sbatch here" in refused(*run, "--engine=slurm")
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.delitem(sys.modules, "launch.slurm", raising=False)
    assert "pip install" in refused(*run, "--engine=slurm")


def test_a_directory_that_cannot_be_written(refused, config, tmp_path):
    (tmp_path / "file").write_text("")
    words = ("sweep", config, f"--root={tmp_path / 'file'}", "--name=s")
    assert "cannot be" in refused(*words)


def test_a_run_of_another_config_is_refused(refused, config, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "mine.txt").write_text("")
    said = refused("run", config, f"--workdir={tmp_path / 'r'}")
    assert "is not empty and holds no run" in said


def test_a_folder_with_something_else_is_no_sweeps(refused, config, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine.txt").write_text("")
    assert "holds no sweep" in refused(
        "sweep", config, f"--root={tmp_path}", "--name=s"
    )


def test_what_is_left_to_do_is_rendered(config, tmp_path, capsys):
    """Of a sweep that was begun: trials that wait, begun or not."""
    words = ["sweep", config, f"--root={tmp_path}", "--name=s"]
    args, overrides, options, further = flags.read(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "_drive", lambda *_, **__: 0)
        assert commands._sweep(args, overrides, options, further) == 0
    assert (
        commands.main(["resume", str(tmp_path / "s"), f"--render={tmp_path / 'o'}"])
        == 0
    )
    text = (tmp_path / "o" / "commands.sh").read_text()
    assert text.count("launch.worker") == 2 and "/runs/0001-" in text


def test_nothing_is_submitted_by_render(config, tmp_path, capsys):
    words = ["sweep", config, "--engine=slurm", "--sweep=rate", "--seeds=2"]
    words += [f"--root={tmp_path / 'runs'}", "--name=s", "--partition=gpu", "--nodes=2"]
    words += ["--gpus-per-node=8", "--time=24h", f"--render={tmp_path / 'out'}"]
    assert commands.main(words) == 0
    text = (tmp_path / "out" / "array.sbatch").read_text()
    for line in (
        *("array=0-3%1", "partition=gpu", "nodes=2", "gpus-per-node=8", "time=1440"),
        *("requeue", "open-mode=append", "signal=TERM@120", "ntasks-per-node=1"),
    ):
        assert f"#SBATCH --{line}\n" in text
    assert "--kill-on-bad-exit=1" in text and text.count("runs/s/runs/000") == 4
    assert not (tmp_path / "runs").exists()
    assert commands.main(words) == 1
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("name", commands._COMMANDS)
def test_help_of_every_command_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as end:
        commands.main([name, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "--render" in said
    assert f"example: python -m launch {name} " in said


def test_the_launcher_imports_no_jax(root):
    code = "import sys, launch.commands; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_minutes():
    assert [flags.minutes(t) for t in ("90m", "24h", "2d")] == [90, 1440, 2880]


def test_names_for_clusters():
    assert engines.plain_name("S1/0003_ab") == "s1-0003-ab"
    assert engines.plain_name("0/x") == "r-0-x"


@pytest.fixture
def launched(root, config):
    """`launched(words)`: the launcher, and its jobs, in a session of their own."""
    begun = []

    def start(words):
        process = subprocess.Popen(
            [sys.executable, "-m", "launch", *map(str, words)],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        begun.append(process)
        return process

    yield start
    for process in begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_local_sweep_survives_its_driver_and_its_user(config, launched, tmp_path):
    """Killed with -9 it leaves its trials alone; SIGTERM makes them save and end."""
    folder = tmp_path / "s"
    slow = f"{config}:slow"
    words = ["sweep", slow, f"--root={tmp_path}", "--name=s", "--max_parallel=2"]
    words += ["--poll=0.2", "--config.train.num_steps=10000000"]
    words += ["--config.checkpoint.every=10000000", "--config.logging.every=20"]
    driver = launched(words)
    trials = until(
        lambda: [Trial(p.parent) for p in folder.glob("runs/*/trial.json")][1:]
    )
    trials = [Trial(p.parent) for p in sorted(folder.glob("runs/*/trial.json"))]
    until(lambda: all(t.step() >= 20 for t in trials))
    driver.kill()
    driver.wait()
    steps = [t.step() for t in trials]
    until(lambda: all(t.step() > s for t, s in zip(trials, steps, strict=True)))
    assert commands.main(words[:5] + ["--poll=0.2"]) == 1  # of another definition
    second = launched(["resume", folder, "--poll=0.2"])
    # Of the first, which was killed, the line is still there.
    pid = f"pid {second.pid},"
    until(lambda: pid in (folder / "driver" / "lock").read_text())
    third = launched(["resume", folder])
    assert "is being driven by" in third.communicate(timeout=180)[0]
    assert third.returncode == 1
    second.send_signal(signal.SIGTERM)
    said = second.communicate(timeout=180)[0]
    assert second.returncode == 130 and "python -m launch resume" in said
    for trial in trials:
        (only,) = trial.attempts()
        assert only.cause == "preempted" and only.step > 20


@pytest.mark.slow
def test_two_processes_stop_and_go_on(config, launched, tmp_path, monkeypatch):
    # A user may be in a job of Slurm's.
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    folder = tmp_path / "run"
    words = ["run", f"{config}:slow", f"--workdir={folder}", "--tasks_per_node=2"]
    words += ["--poll=0.2"]
    words += ["--config.checkpoint.every=10000000", "--config.logging.every=20"]
    first = launched([*words, "--config.train.num_steps=10000000"])
    trial = Trial(folder)
    until(lambda: folder.is_dir() and trial.step() >= 20)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=180)[0]
    assert "SIGTERM: saved step" in said, said[-3000:]
    (attempt,) = trial.attempts()
    assert attempt.cause == "preempted" and trial.result() is None
    last = attempt.step + 40
    again = launched([*words, f"--config.train.num_steps={last}"])
    said = again.communicate(timeout=180)[0]
    assert again.returncode == 0, said[-3000:]
    assert f"resumed from step {attempt.step}" in said
    assert trial.result()["step"] == last
    assert 'process_count": 2' in (folder / "environment.json").read_text()


@pytest.mark.slow
def test_a_teacher_and_its_students_in_two_commands(config, tmp_path, capsys, root):
    """The students' sweep names the teachers' sweep, and takes its best trial."""
    words = ["sweep", config, "--sweep=rate", f"--root={tmp_path}", "--name=teachers"]
    assert commands.main([*words, "--max_parallel=2", "--poll=0.2"]) == 0
    best = table.best(tmp_path / "teachers")
    assert "2/2 done" in capsys.readouterr().out
    student = f"--config={root}/configs/distillation/multistep_consistency.py:smoke"
    words = ["run", student, f"--workdir={tmp_path / 'student'}", "--poll=0.2"]
    words += [f"--config.teacher={tmp_path / 'teachers'}", "--config.evals={}"]
    words += ["--config.train.num_steps=2", "--config.logging.samples_every=0"]
    assert commands.main(words) == 0
    stored = json.loads((tmp_path / "student" / "config.json").read_text())
    assert stored["teacher"]["run"] == str(best)
    assert commands.main(words) == 0  # again: it knows which teacher it had
    said = capsys.readouterr()
    assert commands.main([*words[:2], f"--workdir={best}", *words[3:]]) == 1
    assert "holds a run of another config" in capsys.readouterr().err, said
    assert commands.main(["status", str(best)]) == 0
    assert "done" in capsys.readouterr().out
