"""Two processes, joined over loopback, are one program."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from diffusionlab import multihost
from launch import rehearse

# Gradients are summed over two processes in place of two devices of one: the order of
# the sums may differ, and with it the last bits of a float32.
CLOSE = dict(rtol=2e-5, atol=1e-6)
ROWS = "logging.every=1"
ONE_DEVICE = {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1")}


def _launch(root, *words, **kw):
    command = [
        sys.executable,
        "-m",
        "launch.rehearse",
        "--num_processes=2",
        "--",
        *words,
    ]
    return subprocess.run(
        command,
        cwd=root,
        env={**os.environ, **ONE_DEVICE},
        capture_output=True,
        text=True,
        timeout=240,
        **kw,
    )


@pytest.fixture(scope="module")
def joined(root, flags, tmp_path_factory):
    """A run of two processes with a device each, and what they said."""
    folder = tmp_path_factory.mktemp("joined") / "run"
    done = _launch(root, *flags("mixture", folder, ROWS))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder, done.stdout


@pytest.fixture(scope="module")
def alone(program, flags, tmp_path_factory):
    """The same run of one process with two devices."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    program(*flags("mixture", folder, ROWS), devices=2)
    return folder


def _assert_close(a, b):
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for row, other in zip(a, b, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            pair = (np.asarray(r[name], np.float64) for r in (row, other))
            np.testing.assert_allclose(*pair, **CLOSE, err_msg=name)


def test_two_processes_train_as_one(joined, alone, rows):
    assert len(rows(alone)) == 10
    _assert_close(rows(joined[0]), rows(alone))


def test_a_tensor_axis_may_span_processes(root, flags, alone, rows, tmp_path):
    """Each process then reads the whole batch, and the run is the same."""
    mesh = ("mesh.data=1", "mesh.tensor=2")
    done = _launch(root, *flags("mixture", tmp_path / "run", ROWS, *mesh))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    _assert_close(rows(alone), rows(tmp_path / "run"))


def test_two_processes_set_the_same_checkpoint_aside(
    joined, root, flags, rows, steps_of, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(joined[0], folder)
    for file in (folder / "checkpoints" / "10" / "state" / "d").iterdir():
        os.truncate(file, file.stat().st_size // 2)
    words = flags("mixture", folder, ROWS)
    done = _launch(root, *words, "--resume=newest_whole")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count(f"Set aside as {folder}/damaged/10") == 1
    assert steps_of(folder) == [5, 10]
    _assert_close(rows(joined[0]), rows(folder))


def test_one_process_prints_and_writes(joined):
    folder, said = joined
    assert said.count("first step done") == 1
    assert said.count("step 3/10") == 1
    (record,) = json.loads((folder / "environment.json").read_text())
    assert record["process_count"] == record["device_count"] == 2
    assert not [p for p in folder.rglob(".*") if p.is_file()]


def test_one_process_restores_their_checkpoint(
    joined, program, flags, smoke, rows, contents, steps_of, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(joined[0], folder)
    assert steps_of(folder) == [5, 10]
    shutil.rmtree(folder / "checkpoints" / "10")
    done = program(*flags("mixture", folder, ROWS), devices=1)
    assert "resumed from step 5" in done.stdout
    _assert_close(rows(joined[0]), rows(folder))
    config = smoke("mixture", ROWS)
    # Steps 6 to 10 of one process against the same of two.
    ours, theirs = (contents(config, f, 10) for f in (folder, joined[0]))
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_two_processes_sample_as_one(joined, root, program, tmp_path):
    words = [f"--workdir={joined[0]}", "--mode=sample", "--num_samples=24"]
    words += ["--batch_size=16"]
    found = []
    for name in ("joined", "alone"):
        out = [*words, f"--out={tmp_path / name}"]
        if name == "joined":
            done = _launch(root, *out)
            assert done.returncode == 0, done.stderr[-4000:]
        else:
            program(*out, devices=2)
        found.append(np.load(tmp_path / name / "samples.npz"))
    np.testing.assert_allclose(found[0]["x"], found[1]["x"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[0]["label"], found[1]["label"])
    assert len(found[0]["x"]) == 24


@pytest.mark.slow
def test_two_processes_evaluate_as_one(joined, root, program):
    words = [f"--workdir={joined[0]}", "--mode=eval"]
    words.append("--config.evals={'mixture': {'name': 'mixture', 'num_samples': 40}}")
    file = joined[0] / "evals" / "step_00000010_mixture.json"
    done = _launch(root, *words)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("step 10, ema main") == 1
    together = json.loads(file.read_text())["numbers"]
    program(*words, devices=2)
    alone = json.loads(file.read_text())["numbers"]
    assert together == pytest.approx(alone, rel=1e-3, abs=1e-5)


def _start_two(root, words):
    return [
        subprocess.Popen(
            command,
            cwd=root,
            env={**os.environ, **ONE_DEVICE},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in rehearse.commands(2, rehearse.free_port(), words)
    ]


def test_sigterm_to_one_makes_both_save_the_same_step(root, flags, steps_of, tmp_path):
    folder = tmp_path / "run"
    words = flags(
        "mixture", folder, "train.num_steps=20000", "checkpoint.every=100000", ROWS
    )
    first, second = _start_two(root, words)
    try:
        for line in first.stdout:
            if line.startswith("step 20/"):
                break
        second.send_signal(signal.SIGTERM)
        said = first.communicate(timeout=120)[0] + second.communicate(timeout=120)[0]
    finally:
        for process in (first, second):
            process.kill()
    assert (first.returncode, second.returncode) == (75, 75), said[-4000:]
    (step,) = steps_of(folder)
    assert 20 <= step < 20000
    assert f"SIGTERM: saved step {step}" in said


@pytest.mark.parametrize("process_id", [0, 1])
def test_a_missing_partner_is_waited_for_with_a_limit(
    program, flags, process_id, tmp_path
):
    since = time.monotonic()
    done = program(
        *flags("mixture", tmp_path / "run"),
        f"--coordinator=127.0.0.1:{rehearse.free_port()}",
        "--num_processes=2",
        f"--process_id={process_id}",
        "--join_timeout=3",
        check=False,
    )
    assert time.monotonic() - since < 45
    assert done.returncode not in (0, 75)
    assert "joining 2 processes at 127.0.0.1" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_launcher_returns_the_first_failure_and_ends_the_others(tmp_path):
    code = "import sys, time; time.sleep({}); sys.exit({})"
    processes = [
        subprocess.Popen([sys.executable, "-c", code.format(*args)])
        for args in ((0.1, 3), (60, 0))
    ]
    since = time.monotonic()
    assert rehearse.wait(processes, grace=0.5) == 3
    assert time.monotonic() - since < 20
    assert processes[1].returncode == -signal.SIGKILL


def test_the_launcher_passes_sigterm_on(root, flags, steps_of, tmp_path):
    folder = tmp_path / "run"
    words = flags("mixture", folder, "train.num_steps=20000", "checkpoint.every=100000")
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.rehearse", "--num_processes=1", "--", *words],
        cwd=root,
        env={**os.environ, **ONE_DEVICE},
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step 20/"):
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 75
    assert len(steps_of(folder)) == 1


def test_the_launcher_helps_at_once(root):
    script = (
        "import sys; sys.argv = ['rehearse', '--help']\n"
        "from launch import rehearse\n"
        "try: rehearse.main()\n"
        "except SystemExit: pass\n"
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--num_processes" in done.stdout


def test_alone_work_has_no_limit(monkeypatch):
    """A long stretch between two rows is no hang where there is nobody to wait for."""
    ended = []
    monkeypatch.setattr(multihost.os, "_exit", ended.append)
    with multihost.together("a long step", 0.01):
        time.sleep(0.1)
    assert not ended
