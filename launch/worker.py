"""The process of a trial, the same under every engine: python -m launch.worker FOLDER

It joins the other processes of its job, goes on with the run from its newest
checkpoint, and writes how it ended. Exit status 0: finished. 75: stopped by SIGTERM and
saved, to be started again at no cost. Another: a failure, which counts.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

from diffusionlab import explain, workdir
from launch import definition, trial

DONE, PREEMPTED, FAILED = 0, 75, 1
_REQUEUED_WITHIN = 60.0
_STARTS = 5
_LETTING_GO = 240.0
"""Seconds that an earlier attempt has to end: clusters start a job again while the
process on a node that they gave up still lives. Its other processes wait for 300."""

_RANKS = (
    "SUBMITIT_LOCAL_GLOBALID",
    "SLURM_PROCID",
    "LAUNCH_RANK",
    "NODE_RANK",
    "JOB_COMPLETION_INDEX",
    "TPU_WORKER_ID",
)
_COUNTS = ("SUBMITIT_LOCAL_NTASKS", "SLURM_NTASKS", "NNODES")


def rank(environ: Mapping[str, str]) -> int:
    """Returns which process of its job this is: the first variable that says so."""
    slice_id = int(environ.get("MEGASCALE_SLICE_ID", 0))
    own = next((int(environ[name]) for name in _RANKS if name in environ), 0)
    # Only whether it is 0 matters where several slices count from 0 each.
    return own if slice_id == 0 else max(own, 1)


def joining(environ: Mapping[str, str]) -> list[str]:
    """Returns the flags by which diffusionlab joins the processes of this job.

    LAUNCH_COORDINATOR is 'auto' where JAX reads the machine's own environment (TPU), or
    'host:port' where the engine knows it. Under Slurm JAX reads the step's variables.
    """
    count = next((int(environ[n]) for n in _COUNTS if n in environ), 1)
    coordinator = environ.get("LAUNCH_COORDINATOR", "")
    if coordinator == "auto":
        return ["--coordinator=auto"]
    if count == 1:
        return []
    if "SLURM_PROCID" in environ:
        return ["--coordinator=auto"]
    return [
        f"--coordinator={coordinator}",
        f"--num_processes={count}",
        f"--process_id={rank(environ)}",
    ]


def job_of(environ: Mapping[str, str]) -> str | None:
    """Returns the engine's name of this job, as its `submit` gave it."""
    if "LAUNCH_JOB" in environ:
        return environ["LAUNCH_JOB"]
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def command(folder: pathlib.Path, asked: Mapping[str, Any]) -> list[str]:
    """Returns the flags of diffusionlab for a trial."""
    flags = [f"--config={asked['config']}", f"--workdir={folder}"]
    overrides = {**asked["overrides"], **asked.get("point", {})}
    for key, value in definition.settled(overrides, folder).items():
        if key == definition.TEACHER and isinstance(value, str):
            value = _teacher(pathlib.Path(value))
        flags.append(f"--{definition.word(key, value)}")
    return [*flags, *asked.get("flags", ())]


class Unready(RuntimeError):
    """The teacher has not finished: to be started again at no cost."""


def _teacher(folder: pathlib.Path) -> str:
    """Returns the directory of a finished teacher: of a sweep, its best trial."""
    if definition.is_sweep(folder):
        from launch import table  # needs pandas

        try:
            return str(table.best(folder))
        except ValueError as error:
            raise Unready(f"config.teacher: {error}") from None
    if (folder / trial.TRIAL_FILE).is_file() and trial.Trial(folder).result() is None:
        raise Unready(f"config.teacher: '{folder}' is not finished.")
    return str(folder)


def run(folder: str) -> int:
    """Runs a trial to its end, or to SIGTERM; returns the exit status.

    A finished one is left alone: engines start jobs once more that have ended well.
    """
    path = pathlib.Path(folder).resolve()
    one, environ = trial.Trial(path), os.environ
    asked = one.asked()
    if one.result() is not None:
        print(f"{path}: this run is finished")
        return DONE
    recorder = one if rank(environ) == 0 else None
    job = job_of(environ)
    if recorder and _is_stuck(one, job):
        message = f"started {_STARTS} times without a step of progress"
        one.record("ended", job=job, cause=trial.FAILED, message=message)
        return FAILED

    def ended(status: int, cause: str, message: str = "") -> None:
        # From here on it is not to be ended before it has written how it ended.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if recorder:
            told = dict(job=job, cause=cause, status=status, step=one.step())
            told |= {"message": message} if message else {}
            recorder.record("ended", **told)

    def stopped(*_) -> None:
        # No exception: what is being imported may swallow it, or make it another.
        ended(PREEMPTED, trial.PREEMPTED)
        _leave(PREEMPTED)

    # Until the program listens itself there is nothing to save.
    signal.signal(signal.SIGTERM, stopped)
    # submitit's notice of its own time limit.
    signal.signal(signal.SIGUSR2, lambda *_: signal.raise_signal(signal.SIGTERM))
    if "LAUNCH_GPUS" in environ:
        environ["CUDA_VISIBLE_DEVICES"] = environ["LAUNCH_GPUS"]
    elif "SUBMITIT_LOCAL_JOB_ID" in environ:  # submitit hides them
        environ.pop("CUDA_VISIBLE_DEVICES", None)
    if "LAUNCH_CORES" in environ:  # before JAX counts them
        os.sched_setaffinity(0, map(int, environ["LAUNCH_CORES"].split(",")))
    if recorder:
        recorder.record(
            "started",
            job=job,
            submission=environ.get("LAUNCH_SUBMISSION"),
            host=socket.gethostname(),
            pid=os.getpid(),
            saved=_saved(path),
            kills=kills(),
        )
        _wait_for_the_last(path)
    status, cause, message = _train(path, asked, joining(environ))
    ended(status, cause, message)
    return status


def _wait_for_the_last(folder: pathlib.Path) -> None:
    """Returns when no other process trains here, or it has had its time."""
    since, said = time.monotonic(), False
    while time.monotonic() - since < _LETTING_GO:
        try:
            with workdir.lock(folder):
                return
        except workdir.InUseError as error:
            if not said:
                print(f"{error} Waiting.", flush=True)
            said = True
        time.sleep(1)


def _is_stuck(one: trial.Trial, job: str | None) -> bool:
    """Whether an engine starts this job again and again, and it gets nowhere.

    Kubernetes restarts a process that ran out of memory for ever.
    """
    count = 0
    for event in one.events():
        if event["event"] in ("ended", "retry"):
            count = 0
        elif event["event"] == "started" and event.get("job") == job:
            count = count + 1 if event.get("saved") == _saved(one.folder) else 0
    return count >= _STARTS


def _saved(folder: pathlib.Path) -> int:
    return max(workdir.saved_steps(folder), default=0)


def _train(path, asked, joined) -> tuple[int, str, str]:
    """Returns exit status, cause and message of the program."""
    try:
        if asked.get("cwd") and pathlib.Path(asked["cwd"]).is_dir():
            # Paths in the config are as the user wrote them.
            os.chdir(asked["cwd"])
            sys.path.insert(0, asked["cwd"])
        from diffusionlab import main

        status = main.run([*command(path, asked), *joined])
    except Unready as error:
        print(f"launch: {error}", file=sys.stderr)
        return FAILED, trial.PREEMPTED, str(error)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else FAILED
    except BaseException as error:
        said = explain.explain(error)
        if said:
            print(f"diffusionlab: error: {said}", file=sys.stderr)
        else:
            traceback.print_exc()
        memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
        first = (said or f"{type(error).__name__}: {error}").splitlines()[0]
        return FAILED, trial.OUT_OF_MEMORY if memory else trial.FAILED, first
    causes = {DONE: trial.DONE, PREEMPTED: trial.PREEMPTED}
    return status, causes.get(status, trial.FAILED), ""


def kills() -> int | None:
    """Returns how many processes this machine ended for want of memory, if known."""
    try:
        lines = pathlib.Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("oom_kill ")]
    return int(found[0]) if found else None


def _requeue(job: str) -> None:
    """Asks Slurm to start this job again: one that exits by itself is not."""

    def ask(*words: str):
        return subprocess.run(words, capture_output=True, text=True, check=False)

    # Of one that was cancelled the state is COMPLETING by now.
    if ask("squeue", "-h", "-j", job, "-o", "%T").stdout.strip() != "RUNNING":
        return
    done = ask("scontrol", "requeue", job)
    if done.returncode:
        print(f"scontrol requeue {job}: {done.stderr.strip()}", file=sys.stderr)
        return
    time.sleep(_REQUEUED_WITHIN)


def _from_flags() -> str:
    """Returns the folder; writes trial.json there if the command brings it."""
    flags = argparse.ArgumentParser("launch.worker", allow_abbrev=False)
    flags.add_argument("folder")
    flags.add_argument("--asked", help="trial.json as text, if the folder has none")
    args = flags.parse_args()
    if args.asked and rank(os.environ) == 0:
        trial.Trial(pathlib.Path(args.folder)).create(json.loads(args.asked))
    path = pathlib.Path(args.folder) / trial.TRIAL_FILE
    while args.asked and not path.is_file():  # process 0 is about to write it
        time.sleep(1)
    return args.folder


def main(folder: str | None = None) -> None:
    """Entry point, and what submitit calls; ends the process with its status."""
    if folder is None:
        folder = _from_flags()
    status = run(folder)
    if status:
        # submitit would write a traceback of SystemExit's, and no library may linger.
        _leave(status)


def _leave(status: int) -> NoReturn:
    """Ends the process; a job of Slurm's that is to go on is put back first."""
    sys.stdout.flush()
    sys.stderr.flush()
    job = job_of(os.environ)
    if status == PREEMPTED and "SLURM_PROCID" in os.environ and job:
        # Put back, Slurm ends the job by this signal, and has its patience otherwise.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if rank(os.environ) == 0:
            _requeue(job)
        else:
            time.sleep(_REQUEUED_WITHIN)
    os._exit(status)


if __name__ == "__main__":
    main()
