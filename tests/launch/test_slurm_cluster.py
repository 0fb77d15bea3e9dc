"""The launcher on a real Slurm: started by `.ci/run`, or by tests/launch/slurm_up.sh.

Set SLURM_CONF to its slurm.conf. Jobs of this file are small, and slow on purpose:
see slow_mixture.py.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from patience import until

from launch import commands, table
from launch.trial import Trial

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

BARE = {
    "config.logging.samples_every": 0,
    "config.evals": {},
    "config.logging.tensorboard": False,
    "config.logging.every": 50,
    "config.checkpoint.every": 100_000,
}
SWEEPS = """
from configs.mixture import denoising

def get_config(variant=""):
    config = denoising.get_config("smoke")
    config.data.source.name = "slow_mixture:slow"
    return config

RATE = "config.optim.denoiser.learning_rate.value"

def sweep():
    for rate in (1e-3, 2e-3, 4e-3):
        yield {RATE: rate}

def sweep_failing():
    yield {"config.train.micro_batches": 1}
    # Of the batch of this config: the program finds out when it builds the step.
    yield {"config.mesh.data": 3}
"""


def _slurm(*words):
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A Slurm with idle nodes, or a skip; in CI a failure."""
    why = ""
    if shutil.which("sinfo") is None:
        why = "there is no Slurm"
    elif subprocess.run(["sinfo"], capture_output=True).returncode:
        why = "Slurm does not answer; set SLURM_CONF (tests/launch/slurm_up.sh FOLDER)"
    if why and os.environ.get("DIFFUSIONLAB_REQUIRE_SLURM"):
        pytest.fail(why)
    if why:
        pytest.skip(why)
    yield
    _slurm("scancel", "--me")


@pytest.fixture(scope="module")
def work(root):
    """A folder that all nodes see, and the environment of the jobs."""
    import tempfile

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        one = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
        patch.setenv("XLA_FLAGS", one)
        patch.setenv("PYTHONPATH", f"{root}:{root / 'tests' / 'launch'}")
        patch.chdir(root)
        folder = pathlib.Path(name)
        (folder / "configs" / "x").mkdir(parents=True)
        (folder / "configs" / "x" / "small.py").write_text(SWEEPS)
        yield folder


def _launch(command, *words, **overrides):
    overrides = BARE | {k.replace("__", "."): v for k, v in overrides.items()}
    flags = [f"--{key}={value}" for key, value in overrides.items()]
    if command not in ("run", "sweep"):
        flags = []
    return commands.main([command, *map(str, words), *flags])


def _run(folder, work, *words, **overrides):
    config = f"--config={work / 'configs' / 'x' / 'small.py'}"
    status = _launch(
        "run", "--engine=slurm", config, f"--workdir={folder}", *words, **overrides
    )
    assert status == 0
    return Trial(folder)


def _log(trial):
    return "\n".join(
        path.read_text() for path in (trial.folder / "jobs").glob("*_log.out")
    )


def _finished(trial, seconds=180):
    def done():
        ended = [a for a in trial.attempts() if a.cause not in (None, "preempted")]
        return trial.result() or ended

    until(done, seconds)
    assert trial.result(), _log(trial)[-4000:]
    until(lambda: trial.attempts()[-1].cause)
    return trial


def _state(folder):
    """The arrays of a run's newest checkpoint."""
    import jax
    import orbax.checkpoint as ocp

    step = max(int(p.name) for p in (folder / "checkpoints").iterdir())
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        path = (folder / "checkpoints" / str(step) / "state").resolve()
        tree = reader.metadata(path)
        tree = getattr(tree, "item_metadata", tree)
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(
            lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=one), dict(tree)
        )
        return step, jax.tree.map(np.asarray, reader.restore(path, shapes))


def _is_at(trial, step):
    return lambda: (
        trial.step() >= step
        or (
            pytest.fail(_log(trial)[-4000:])
            if trial.attempts()[-1:] and trial.attempts()[-1].cause == "failed"
            else False
        )
    )


def test_two_nodes_preempted_by_a_partition_and_resumed(work):
    """Both processes save one step; what comes out is bitwise an unbroken run's."""
    shape = ("--nodes=2",)
    more = {
        "config__train__num_steps": 300,
        "config__mesh__data": 1,
        "config__mesh__fsdp": 2,
    }
    broken = _run(work / "broken", work, "--partition=spot", *shape, **more)
    until(_is_at(broken, 50))
    nodes = _slurm("squeue", "-h", "-j", broken.attempts()[-1].job, "-o", "%N")
    _slurm(
        *("sbatch", "-p", "main", "-w", nodes, "-N2", "-n2", "--exclusive"),
        *("-o", "/dev/null", "--wrap", "sleep 1"),
    )
    until(lambda: broken.attempts()[0].cause)
    unbroken = _run(work / "unbroken", work, "--partition=main", *shape, **more)
    _finished(broken)
    _finished(unbroken)
    first, second = broken.attempts()
    assert (first.cause, second.cause) == ("preempted", "done")
    assert first.job == second.job and 50 <= first.step < 300
    log = _log(broken)
    (saved,) = {line for line in log.splitlines() if line.startswith("SIGTERM: saved")}
    (resumed,) = {line for line in log.splitlines() if line.startswith("resumed from")}
    assert saved.split()[3].rstrip(";") == resumed.split()[3]
    (step, ours), (other, theirs) = _state(broken.folder), _state(unbroken.folder)
    assert step == other == 300
    import jax

    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))
    assert [r["train/loss"] for r in broken.rows()] == [
        r["train/loss"] for r in unbroken.rows()
    ]


def test_notice_before_the_time_limit_then_node_down_then_cancel(work, capsys):
    """One job, three lives: each end saves, and nothing counts as a failure."""
    more = {"config__train__num_steps": 1_000_000}
    words = ("--time=1m", "--signal_seconds=50")
    trial = _run(work / "limit", work, *words, **more)
    # Slurm gives notice up to a minute early, here some seconds after the start.
    until(lambda: len(trial.attempts()) >= 2)
    assert trial.attempts()[0].cause == "preempted"
    job = trial.attempts()[0].job
    until(lambda: "resumed from" in _log(trial) or len(trial.attempts()) > 2)
    node = until(lambda: _slurm("squeue", "-h", "-j", job, "-t", "R", "-o", "%N"))
    _slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    lives = len(trial.attempts())
    until(lambda: len(trial.attempts()) > lives)
    # It may have come back by itself.
    subprocess.run(
        ["scontrol", "update", f"nodename={node}", "state=resume"], capture_output=True
    )
    assert trial.attempts()[-1].job == job
    assert _launch("cancel", trial.folder) == 0
    until(lambda: not _slurm("squeue", "-h", "-j", job, "-o", "%T"))
    capsys.readouterr()
    assert _launch("status", trial.folder) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[1] == "cancelled" and row[4] == "0", trial.events()


def test_a_killed_rank_ends_the_job_and_counts(work):
    trial = _run(work / "rank", work, "--nodes=2", config__train__num_steps=1_000_000)
    until(_is_at(trial, 50))
    job = trial.attempts()[0].job
    (rank,) = until(lambda: _pids(job, 1))
    os.kill(rank, signal.SIGKILL)
    until(lambda: not _slurm("squeue", "-h", "-j", job, "-o", "%T"))
    assert _launch("resume", "--detach", trial.folder) == 0
    first, second = trial.attempts()
    # Process 0 may have noticed and said so, or have been killed with the job.
    assert first.cause in ("failed", "killed") and first.message
    assert second.job != job
    assert _launch("cancel", trial.folder) == 0


def _pids(job, rank):
    """Processes of a job's rank, by their environment."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "environ").read_bytes().split(b"\0")
            if {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()} <= set(
                words
            ):
                found.append(int(folder.name))
    return found


def test_an_array_gives_the_table_of_the_local_engine(work):
    config = f"--config={work / 'configs' / 'x' / 'small.py'}"
    frames = []
    for engine in ("slurm", "local"):
        words = (f"--engine={engine}", config, f"--root={work}", f"--name={engine}")
        more = {"config__train__num_steps": 10, "config__logging__every": 1}
        assert _launch("sweep", *words, "--max-parallel=3", "--poll=0.5", **more) == 0
        frames.append(table.frame(work / engine))
    jobs = {t.attempts()[0].job for t in _trials(work / "slurm")}
    assert {job.partition("_")[2] for job in jobs} == {"0", "1", "2"}
    same = ["trial", "state", "learning_rate.value", "train/loss", "step", "attempts"]
    assert frames[0][same].equals(frames[1][same])
    assert len(set(frames[0]["train/loss"])) == 3


def _trials(sweep):
    return [Trial(p.parent) for p in sorted(sweep.glob("runs/*/trial.json"))]


KILLED = """
import os, signal, sys
from launch import commands, trial
record = trial.Trial.record
def killed(self, event, **what):
    if event == "submitted":
        os.kill(os.getpid(), signal.SIGKILL)
    record(self, event, **what)
trial.Trial.record = killed
commands.main(sys.argv[1:])
"""


def test_a_killed_driver_a_failing_trial_and_a_sweep_that_goes_on(work):
    config = f"--config={work / 'configs' / 'x' / 'small.py'}"
    words = ["sweep", "--engine=slurm", config, "--sweep=failing", f"--root={work}"]
    words += ["--name=hard", "--max-parallel=2", "--poll=0.5"]
    words += [f"--{k}={v}" for k, v in BARE.items()]
    words += ["--config.train.num_steps=10"]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    folder = work / "hard"
    assert all(a.job is None for t in _trials(folder) for a in t.attempts()[:1])
    # One is done in the end and one given up: a status that is not 0.
    assert _launch("resume", "--poll=0.5", folder) == 1
    good, bad = _trials(folder)
    assert good.result() and not bad.result()
    started = [a for a in good.attempts() if a.started]
    assert [a.cause for a in started] == ["done"]
    failed = [a for a in bad.attempts() if a.cause == "failed"]
    assert len(failed) == 2 and "does not make the 1 devices" in failed[0].message
    frame = table.frame(folder)
    assert list(frame["state"]) == ["done", "given up"]
    before = (good.folder / "result.json").stat().st_mtime_ns
    assert _launch("resume", "--poll=0.5", folder) == 1
    assert (good.folder / "result.json").stat().st_mtime_ns == before
    assert len(bad.attempts()) == len(Trial(bad.folder).attempts())


def test_bad_resources_are_refused_before_anything_is_written(work, capsys):
    config = f"--config={work / 'configs' / 'x' / 'small.py'}"
    words = ("run", "--engine=slurm", config, f"--workdir={work / 'refused'}")
    assert _launch(*words, "--partition=nowhere") == 1
    assert "Invalid partition name" in capsys.readouterr().err
    assert _launch(*words, "--nodes=9") == 1
    said = capsys.readouterr().err
    assert said.startswith("launch: error: --engine=slurm: ") and said.count("\n") == 1
    assert not (work / "refused").exists()


def test_a_scheduler_that_does_not_answer(work, capsys, monkeypatch, tmp_path):
    path = pathlib.Path(os.environ["SLURM_CONF"])
    text = path.read_text().replace("SlurmctldPort=16817", "SlurmctldPort=16818")
    text += "MessageTimeout=1\n"
    (tmp_path / "slurm.conf").write_text(text)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    config = f"--config={work / 'configs' / 'x' / 'small.py'}"
    words = ("run", "--engine=slurm", config, f"--workdir={tmp_path / 'none'}")
    assert _launch(*words) == 1
    assert "does not answer" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
