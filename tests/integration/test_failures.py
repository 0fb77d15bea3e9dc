"""What goes wrong is named, and costs no more than the steps since the last save."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import time

import jax
import pytest
from jax.experimental import multihost_utils

from diffusionlab import (
    checkpoint,
    evaluate,
    experiment,
    main,
    multihost,
    sharding,
    train,
)
from diffusionlab.checkpoint import CheckpointError, DamagedError


@pytest.fixture(scope="module")
def finished(smoke, tmp_path_factory):
    """A run with checkpoints 5 and 10: its config and its folder."""
    config, folder = smoke("mixture"), tmp_path_factory.mktemp("finished") / "run"
    assert train.train(config, folder) == train.DONE
    return config, folder


@pytest.fixture
def command(root, flags):
    """`command(folder, *overrides)`: how a run is started as a process."""

    def make(folder, *overrides):
        program = [sys.executable, "-m", "diffusionlab.main"]
        return [*program, *flags("mixture", folder, *overrides)]

    return make


def _finish(command, root):
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save(
    command, root, smoke, contents, same, rows, steps_of, tmp_path
):
    overrides = ("train.num_steps=30", "logging.every=4", "checkpoint.every=3")
    broken = tmp_path / "broken"
    kills = 0
    for _ in range(3):
        process = subprocess.Popen(
            command(broken, *overrides),
            cwd=root,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before = _unfinished(broken)
        while process.poll() is None and not (_unfinished(broken) - before):
            time.sleep(0.001)
        process.kill()
        process.wait()
        # Half a checkpoint: there is one, and it was not finished.
        kills += bool(_unfinished(broken))
        if kills and steps_of(broken):
            break
    assert kills, "no kill hit a save"
    assert max(steps_of(broken), default=0) < 30
    _finish(command(broken, *overrides), root)
    assert not _unfinished(broken), "half a checkpoint was left lying"

    config = smoke("mixture", *overrides)
    assert train.train(config, tmp_path / "whole") == train.DONE
    assert rows(tmp_path / "whole") == rows(broken)
    whole = contents(config, tmp_path / "whole", 30)
    assert same(whole, contents(config, broken, 30))


def test_half_a_checkpoint_is_no_checkpoint_and_is_cleared_away(
    finished, contents, same, tmp_path, capsys
):
    """Also of a step at which nothing will be saved again, as after SIGTERM."""
    config, whole = finished
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    half = folder / "checkpoints" / "7.orbax-checkpoint-tmp"
    (folder / "checkpoints" / "10").rename(half)
    (half / "commit_success.txt").unlink()
    assert train.train(config, folder) == train.DONE
    assert "resumed from step 5" in capsys.readouterr().out
    assert not _unfinished(folder)
    assert same(contents(config, whole, 10), contents(config, folder, 10))


def _unfinished(folder):
    return {p.name for p in folder.glob("checkpoints/*") if not p.name.isdigit()}


def _kinds(checkpoint):
    """One file of each kind: names that are hashes count as one."""
    kinds = {}
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file():
            name = file.relative_to(checkpoint)
            kind = str(name.parent if file.parent.name == "d" else name)
            kinds.setdefault(kind, []).append(file)
    return kinds


def test_a_truncated_file_is_named_and_nothing_is_overwritten(
    finished, contents, same, tmp_path
):
    """Every kind of file: an error, or one that a restore needs not."""
    config, folder = finished
    whole = contents(config, folder, 10)
    damaging = set()
    for kind in _kinds(folder / "checkpoints" / "10"):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        for file in _kinds(copy / "checkpoints" / "10")[kind]:
            os.truncate(file, file.stat().st_size // 2)
        try:
            assert same(contents(config, copy, 10), whole), kind
        except CheckpointError as error:
            damaging.add(kind)
            assert str(copy / "checkpoints" / "10") in str(error)
            assert "--resume=newest_whole" in str(error)
            assert "\n" not in str(error)
        shutil.rmtree(copy)
    needed = {"state/d", "state/manifest.ocdbt", "state/_METADATA", "meta/metadata"}
    assert damaging >= needed | {"gathered/d", "data/metadata"}


def _damage(folder, step):
    (file,) = (folder / "checkpoints" / str(step) / "state" / "d").iterdir()
    os.truncate(file, file.stat().st_size // 2)
    return file


def test_a_damaged_checkpoint_stops_the_program(
    finished, command, root, steps_of, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(finished[1], folder)
    _damage(folder, 10)
    saved = _files(folder / "checkpoints")
    result = (folder / "result.json").read_bytes()
    done = subprocess.run(command(folder), cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [s for s in done.stderr.splitlines() if "diffusionlab: error" in s]
    assert f"{folder}/checkpoints/10: this checkpoint is damaged" in line
    assert "of step 5" in line
    assert _files(folder / "checkpoints") == saved
    assert (folder / "result.json").read_bytes() == result


def _files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_newest_whole_sets_the_damaged_aside_and_goes_on(
    finished, contents, same, rows, steps_of, tmp_path, capsys
):
    config, whole = finished
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    _damage(folder, 10)
    damaged = {p.name for p in _files(folder / "checkpoints" / "10")}
    assert train.train(config, folder, resume="newest_whole") == train.DONE
    said = capsys.readouterr().out
    assert f"Set aside as {folder}/damaged/10" in said
    assert "resumed from step 5" in said
    assert {p.name for p in _files(folder / "damaged" / "10")} == damaged
    assert steps_of(folder) == [5, 10]
    assert same(contents(config, whole, 10), contents(config, folder, 10))
    assert rows(whole) == rows(folder)


def test_newest_whole_with_none_left_starts_nothing(finished, steps_of, tmp_path):
    config, whole = finished
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for step in (5, 10):
        _damage(folder, step)
    with pytest.raises(CheckpointError, match=r"checkpoints/5: .*none before it"):
        train.train(config, folder, resume="newest_whole")
    assert steps_of(folder) == [5]
    assert (folder / "damaged" / "10").is_dir()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        PermissionError(errno.EACCES, "Permission denied"),
        MemoryError(),
        ValueError("RESOURCE_EXHAUSTED: Error opening a file: Too many open files"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_cannot_be_read_now_is_not_set_aside(
    finished, error, steps_of, tmp_path, monkeypatch
):
    config, whole = finished
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.CheckpointManager, "restore", fail)
        with pytest.raises(CheckpointError, match="could not be read.*stays") as raised:
            train.train(config, folder, resume="newest_whole")
    assert not isinstance(raised.value, DamagedError)
    assert steps_of(folder) == [5, 10]
    assert not (folder / "damaged").exists()
    assert train.train(config, folder) == train.DONE


@pytest.mark.parametrize("gone", ["state/_METADATA", "gathered/_METADATA", "data"])
def test_a_missing_file_is_damage(finished, contents, gone, tmp_path):
    config, whole = finished
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    path = folder / "checkpoints" / "10" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DamagedError, match="No such file"):
        contents(config, folder, 10)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [([0, 1], DamagedError), ([0, 2], CheckpointError), ([1, 2], CheckpointError)],
)
def test_processes_fail_to_restore_together(
    finished, contents, kinds, expected, monkeypatch
):
    """This one can read; what the processes say decides for all of them."""
    monkeypatch.setattr(checkpoint.multihost, "all_of", lambda *_: kinds)
    with pytest.raises(CheckpointError, match="process 1 failed") as raised:
        contents(*finished, 10)
    assert type(raised.value) is expected


def test_every_wait_for_other_processes_is_limited(smoke, tmp_path, monkeypatch):
    built = experiment.build(smoke("mixture"))
    evaluation = evaluate.Evaluation(built, sharding.make_mesh(built.mesh), tmp_path)
    names = []

    def waiting(what, seconds, who):
        names.append((what, seconds, who))
        return contextlib.nullcontext()

    monkeypatch.setattr(multihost, "waiting", waiting)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda step: False
    )
    monkeypatch.setattr(evaluation, "_loss", lambda *_: 1.0)
    monkeypatch.setattr(evaluation, "_predict", lambda *_: 2.0)
    assert not train.Preemption(600).reached(3)
    context = evaluation._context({}, 0, {}, tmp_path)
    assert (context.loss({}, 0), context.predict(None, None)) == (1.0, 2.0)
    assert names == [
        ("whether to stop at step 3", 600, "0/2"),
        ("a batch of losses", 600, "0/2"),
        ("a batch of predictions", 600, "0/2"),
    ]


@pytest.mark.parametrize("wrong", ["a file", "in a file", "torn"])
def test_a_run_directory_that_cannot_be_used_is_one_line(
    flags, wrong, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    if wrong == "torn":
        folder.mkdir()
        (folder / "config.json").write_text('{"seed": ')
    else:
        folder.write_text("")
        folder = folder / "below" if wrong == "in a file" else folder
    monkeypatch.setattr(sys, "argv", ["diffusionlab", *flags("mixture", folder)])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"diffusionlab: error: --workdir: '{folder}" in line
    assert ("is damaged" in line) if wrong == "torn" else ("Not a directory" in line)


# Below the size of a checkpoint's arrays, above that of everything else.
LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
os.execv(sys.executable, sys.argv[1:])
"""


def _check_full(done, folder, contents, smoke):
    """The line says which checkpoint, and that before it is whole."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [s for s in done.stderr.splitlines() if "diffusionlab: error" in s]
    assert f"{folder}/checkpoints: checkpoint 10 could not be written" in line
    assert "free space" in line
    assert not (folder / "checkpoints" / "10").exists()
    assert contents(smoke("mixture"), folder, 5)


def test_a_disk_that_takes_no_more(
    command, root, smoke, contents, same, finished, rows, tmp_path
):
    folder = tmp_path / "run"
    assert train.train(smoke("mixture", "train.num_steps=5"), folder) == train.DONE
    before = rows(folder)
    limited = [sys.executable, "-c", LIMITED, *command(folder)]
    done = subprocess.run(limited, cwd=root, capture_output=True, text=True)
    _check_full(done, folder, contents, smoke)
    assert "resumed from step 5" in _finish(command(folder), root)
    assert rows(folder)[: len(before)] == before
    config, whole = finished
    assert same(contents(config, whole, 10), contents(config, folder, 10))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of two megabytes; to mount one takes an administrator."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if (
        not shutil.which("mount")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("cannot mount a small disk here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(command, root, smoke, contents, small_disk):
    folder = small_disk / "run"
    # Saves come first, rows of metrics only at the end: both meet the full disk.
    overrides = ("logging.every=100",)
    config = smoke("mixture", "train.num_steps=5", *overrides)
    assert train.train(config, folder) == train.DONE
    filler = small_disk / "filler"
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(bytes(free - 60_000))
    done = subprocess.run(
        command(folder, *overrides), cwd=root, capture_output=True, text=True
    )
    _check_full(done, folder, contents, smoke)
    filler.unlink()
    assert "resumed from step 5" in _finish(command(folder, *overrides), root)
    assert contents(smoke("mixture", *overrides), folder, 10)
