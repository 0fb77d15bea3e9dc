"""The process of a trial: what it does before and after the program itself."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from patience import until

from diffusionlab import workdir
from launch import worker
from launch.trial import Trial

STUBBORN = """
import pathlib, time

def get_config(variant=""):
    try:
        pathlib.Path(__file__).with_name("here").touch()
        time.sleep(100)
    except BaseException:  # as extensions do when they are imported
        raise ImportError("initialization failed") from None
"""


@pytest.fixture
def trial(tmp_path, monkeypatch):
    monkeypatch.setenv("LAUNCH_JOB", "7")
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    one = Trial(tmp_path / "run")
    one.create({"config": str(tmp_path / "stubborn.py"), "overrides": {}})
    return one


@pytest.mark.parametrize(
    "environ, expected, rank",
    [
        ({}, [], 0),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, [], 0),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "3"}, ["--coordinator=auto"], 3),
        (
            {"LAUNCH_COORDINATOR": "auto", "TPU_WORKER_ID": "2"},
            ["--coordinator=auto"],
            2,
        ),
        (
            {
                "SUBMITIT_LOCAL_NTASKS": "2",
                "SUBMITIT_LOCAL_GLOBALID": "1",
                "LAUNCH_COORDINATOR": "127.0.0.1:5",
                "SLURM_CONF": "slurm.conf",
            },
            ["--coordinator=127.0.0.1:5", "--num_processes=2", "--process_id=1"],
            1,
        ),
        ({"TPU_WORKER_ID": "0", "MEGASCALE_SLICE_ID": "1"}, [], 1),
    ],
)
def test_a_process_joins_its_job(environ, expected, rank):
    assert worker.joining(environ) == expected
    assert worker.rank(environ) == rank


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_stopped_before_the_program_listens_is_preempted(trial, number):
    command = [sys.executable, "-m", "launch.worker", str(trial.folder)]
    with subprocess.Popen(command) as process:
        until((trial.folder.parent / "here").exists)
        process.send_signal(number)
        assert process.wait(20) == worker.PREEMPTED
    (attempt,) = trial.attempts()
    assert (attempt.cause, attempt.message) == ("preempted", "")


@pytest.mark.parametrize(
    "error, cause",
    [
        ("MemoryError()", "out of memory"),
        ("RuntimeError('RESOURCE_EXHAUSTED: 3 GiB')", "out of memory"),
        ("RuntimeError('no')", "failed"),
    ],
)
def test_what_an_error_is_called(trial, handlers, error, cause):
    text = f"def get_config(variant=''):\n    raise {error}\n"
    (trial.folder.parent / "stubborn.py").write_text(text)
    assert worker.run(str(trial.folder)) == 1
    assert [a.cause for a in trial.attempts()] == [cause]


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"),
    reason="macOS binds no process to cores; the local engine tells jobs of none",
)
def test_a_job_runs_on_its_cores(trial, monkeypatch):
    text = "import os\ndef get_config(variant=''):\n"
    text += "    raise RuntimeError(f'on {os.sched_getaffinity(0)}')\n"
    (trial.folder.parent / "stubborn.py").write_text(text)
    core = max(os.sched_getaffinity(0))
    monkeypatch.setenv("LAUNCH_CORES", str(core))
    command = [sys.executable, "-m", "launch.worker", str(trial.folder)]
    assert subprocess.run(command, capture_output=True).returncode == 1
    assert trial.attempts()[0].message == f"on {{{core}}}"


@pytest.fixture
def handlers():
    numbers = signal.SIGTERM, signal.SIGUSR2
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def _train(folder, *_):
    with workdir.lock(folder):
        return 0, "done", ""


def test_waits_for_an_attempt_that_still_ends(trial, handlers, monkeypatch, capsys):
    """A cluster gives a node up and starts the job again; the process there lives."""
    with contextlib.ExitStack() as earlier:
        earlier.enter_context(workdir.lock(trial.folder))
        monkeypatch.setattr(worker.time, "sleep", lambda _: earlier.close())
        monkeypatch.setattr(worker, "_train", _train)
        assert worker.run(str(trial.folder)) == 0
    assert capsys.readouterr().out.count("is being trained in by host") == 1
    assert [a.cause for a in trial.attempts()] == ["done"]


def test_does_not_wait_for_ever(trial, handlers, monkeypatch):
    monkeypatch.setattr(worker, "_LETTING_GO", 0.05)
    monkeypatch.setattr(worker, "_train", _train)
    monkeypatch.setattr(worker.time, "sleep", lambda _: None)
    with workdir.lock(trial.folder), pytest.raises(workdir.InUseError):
        worker.run(str(trial.folder))
