"""Ten steps equal five, a restart and five more, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from diffusionlab import compiled, main, train, workdir, writers
from diffusionlab import state as state_lib
from diffusionlab.checkpoint import Checkpoints

# name -> config, overrides, where the first start ends, and how: asked to stop, or by
# an accident two steps after the checkpoint, when it has written a row too many.
CASES = {
    "mixture, an accident": ("mixture", (), 7, "accident"),
    "digits, asked to stop": (
        "digits",
        (
            "networks.denoiser.dropout=0.1",
            "train.micro_batches=2",
            "data.augment={'translate': {'max_shift': 1}}",
        ),
        5,
        "asked",
    ),
    # Rows at 3, 6, 9, 10: both the save at 5 and the stop at 7 fall between two.
    "rows between saves": (
        "mixture",
        (
            "logging.every=3",
            "ema.long={'name': 'power', 'sigma_rel': 0.1}",
            "optim.denoiser.name='adamw'",
            "optim.denoiser.weight_decay=0.1",
        ),
        7,
        "asked",
    ),
}


class Accident(Exception):
    pass


def _stop_at(patch, step, how):
    """Makes the next run end before step `step`."""
    if how == "asked":
        patch.setattr(train.Preemption, "reached", lambda self, now: now == step)
        return

    call = compiled.Steps.__call__

    def wreck(self, now, *args):
        if now == step:
            raise Accident
        return call(self, now, *args)

    patch.setattr(compiled.Steps, "__call__", wreck)


def _never(*_):
    raise AssertionError("parameters were initialised, to be thrown away")


@pytest.fixture(scope="module", params=CASES)
def pair(request, smoke, rows, tmp_path_factory):
    """The same run unbroken and in two starts; and its config."""
    name, overrides, step, how = CASES[request.param]
    config = smoke(name, *overrides, "checkpoint.keep=3")
    folder = tmp_path_factory.mktemp("resume")
    whole, broken = folder / "whole", folder / "broken"
    assert train.train(config, whole) == train.DONE
    with pytest.MonkeyPatch.context() as patch:
        _stop_at(patch, step, how)
        if how == "asked":
            assert train.train(config, broken) == train.PREEMPTED
        else:
            with pytest.raises(Accident):
                train.train(config, broken)
            assert max(row["step"] for row in rows(broken)) > 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_lib, "init", _never)
        assert train.train(config, broken) == train.DONE
    return config, whole, broken


def test_a_restart_changes_no_bit(pair, contents, same):
    config, whole, broken = pair
    for step in (5, 10):
        found = contents(config, whole, step)
        assert same(found, contents(config, broken, step))
    for part in (
        "params",
        "opt_state",
        "ema/main",
        *(f"ema/{n}" for n in config["ema"]),
    ):
        assert any(name.startswith(f"state/{part}") for name in found)
    assert found["data/step"] == 10


def test_a_restart_neither_repeats_nor_drops_a_row(pair, rows):
    config, whole, broken = pair
    every = config["logging"]["every"]
    assert [r["step"] for r in rows(whole)] == sorted({*range(every, 11, every), 10})
    assert rows(whole) == rows(broken)


def test_a_finished_run_is_left_alone(pair, capsys):
    config, whole, _ = pair
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert train.train(config, whole) == train.DONE
    assert "this run is finished: 10 steps" in capsys.readouterr().out
    after = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    changed = {p.name for p in after if before.get(p) != after[p]}
    # A start is on record, even one that did nothing.
    records = {"overrides.json", "environment.json", "metrics.jsonl"}
    assert changed <= records | {"lock"}


@pytest.fixture(scope="module")
def finished(smoke, tmp_path_factory):
    config, folder = smoke("mixture"), tmp_path_factory.mktemp("finished") / "run"
    assert train.train(config, folder) == train.DONE
    return config, folder


@pytest.fixture
def run(finished, tmp_path):
    """The config and the folder of a finished run of ten steps."""
    config, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    return config, tmp_path / "run"


def test_more_steps_go_on_from_the_last(run, smoke, rows, steps_of, capsys):
    config, folder = run
    longer = smoke("mixture", "train.num_steps=12", "logging.every=1")
    before = rows(folder)
    assert train.train(longer, folder) == train.DONE
    assert "resumed from step 10" in capsys.readouterr().out
    assert rows(folder)[: len(before)] == before
    assert [row["step"] for row in rows(folder)[len(before) :]] == [11, 12]
    assert steps_of(folder) == [10, 12]
    assert json.loads((folder / "config.0.json").read_text()) == config
    assert json.loads((folder / "config.json").read_text()) == longer
    assert len(json.loads((folder / "environment.json").read_text())) == 2
    assert json.loads((folder / "result.json").read_text())["step"] == 12


def test_a_run_that_lost_its_checkpoints_is_refused(run):
    config, folder = run
    shutil.rmtree(folder / "checkpoints")
    before = _picture(folder)
    with pytest.raises(workdir.WorkdirError, match="its checkpoints are gone"):
        train.train(config, folder)
    assert _picture(folder) == before


def test_a_run_that_ends_before_its_first_save_starts_again(
    finished, rows, tmp_path, monkeypatch, capsys
):
    config, whole = finished
    with monkeypatch.context() as patch:
        _stop_at(patch, 4, "accident")
        with pytest.raises(Accident):
            train.train(config, tmp_path / "run")
    assert rows(tmp_path / "run")
    assert "no checkpoint yet" not in capsys.readouterr().out
    assert train.train(config, tmp_path / "run") == train.DONE
    assert "no checkpoint yet: starting at step 0" in capsys.readouterr().out
    assert rows(tmp_path / "run") == rows(whole)


def test_a_second_start_is_refused_while_the_first_one_trains(
    smoke, tmp_path, monkeypatch
):
    config, said = smoke("mixture"), []

    def start_again(self, step):
        if step == 3:
            with pytest.raises(workdir.WorkdirError, match="is being trained in") as e:
                train.train(config, tmp_path / "run")
            said.append(str(e.value))
        return False

    monkeypatch.setattr(train.Preemption, "reached", start_again)
    assert train.train(config, tmp_path / "run") == train.DONE
    assert f"pid {os.getpid()}, since" in said[0]


@pytest.mark.parametrize("stop", [None, 7])
def test_rows_are_on_the_disk_before_a_save(smoke, rows, stop, tmp_path, monkeypatch):
    """Also at the last step, and where SIGTERM asks for one."""
    write, save, found = writers.MetricsFile.scalars, Checkpoints.save, {}

    def slow(self, *args):
        time.sleep(0.05)
        write(self, *args)

    def look(self, step, *args):
        found[step] = [row["step"] for row in rows(tmp_path / "run")]
        save(self, step, *args)

    monkeypatch.setattr(writers.MetricsFile, "scalars", slow)
    monkeypatch.setattr(Checkpoints, "save", look)
    if stop:
        _stop_at(monkeypatch, stop, "asked")
    train.train(smoke("mixture", "logging.every=1"), tmp_path / "run")
    last = stop or 10
    assert found == {k: list(range(1, k + 1)) for k in (5, last)}


def test_old_checkpoints_go_and_milestones_stay(smoke, steps_of, tmp_path):
    saves = ("checkpoint.keep=1", "checkpoint.keep_every=4", "checkpoint.every=2")
    assert train.train(smoke("mixture", *saves), tmp_path / "run") == train.DONE
    assert steps_of(tmp_path / "run") == [4, 8, 10]


def test_fewer_steps_than_there_are_is_refused(run, smoke, steps_of):
    _, folder = run
    before = _picture(folder)
    with pytest.raises(workdir.WorkdirError, match=r"train\.num_steps.*7.*10"):
        train.train(smoke("mixture", "train.num_steps=7"), folder)
    assert _picture(folder) == before


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("optim.denoiser.learning_rate.value=0.5",), "learning_rate.value"),
        (("networks.denoiser.width=32",), "networks.denoiser.width: 16 -> 32"),
        (("seed=3",), "seed: 0 -> 3"),
        (("data.batch_size=32",), "data.batch_size"),
        (("ema.more={'name': 'power', 'sigma_rel': 0.1}",), "ema.more"),
        (("train.micro_batches=2",), "train.micro_batches"),
    ],
)
def test_another_config_is_refused_and_named(run, flags, overrides, named):
    _, folder = run
    before = _picture(folder)
    with pytest.raises(workdir.WorkdirError) as error:
        main.run(flags("mixture", folder, *overrides))
    assert named in str(error.value)
    assert str(folder) in str(error.value)
    assert _picture(folder) == before


def test_never_refuses_to_resume(run, flags):
    _, folder = run
    before = _picture(folder)
    with pytest.raises(workdir.WorkdirError, match="resume=never"):
        main.run([*flags("mixture", folder), "--resume=never"])
    assert _picture(folder) == before


def test_a_folder_of_something_else_is_refused(smoke, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(workdir.WorkdirError, match="not empty and holds no run"):
        train.train(smoke("mixture"), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def _picture(folder):
    """Every file with its content."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_ends_the_run(
    root, flags, smoke, contents, same, rows, tmp_path
):
    overrides = ("train.num_steps=500", "checkpoint.every=1000", "logging.every=30")
    command = [sys.executable, "-m", "diffusionlab.main"]
    command += flags("mixture", tmp_path / "broken", *overrides)
    # The test process has eight devices, and so do these.
    process = subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        if line.startswith("step 30/"):
            break
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == train.PREEMPTED == 75, said
    assert "SIGTERM: saved step" in said
    (saved,) = (int(p.name) for p in (tmp_path / "broken/checkpoints").iterdir())
    assert 30 <= saved < 500
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"resumed from step {saved}" in done.stdout

    config = smoke("mixture", *overrides)
    assert train.train(config, tmp_path / "whole") == train.DONE
    assert rows(tmp_path / "whole") == rows(tmp_path / "broken")
    whole = contents(config, tmp_path / "whole", 500)
    assert same(whole, contents(config, tmp_path / "broken", 500))


def test_sigterm_while_nothing_is_unsaved_ends_at_once(smoke, tmp_path, monkeypatch):
    """After the last save, as in a long evaluation, there is nothing to wait for."""

    def evaluate(self, step, state):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(train.hooks.Hooks, "finish", evaluate)
    with pytest.raises(SystemExit) as end:
        train.train(smoke("mixture"), tmp_path / "run")
    assert end.value.code == train.PREEMPTED
    monkeypatch.undo()
    assert train.train(smoke("mixture"), tmp_path / "run") == train.DONE
    assert (tmp_path / "run" / "result.json").is_file()
