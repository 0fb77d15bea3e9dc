"""The teacher of a run: its parameters, and the copy of them that the run keeps.

A run takes them from the teacher's directory once, at its first start. From then on
`<run>/teacher` has all that is needed:

    params/      what a train step gets as `frozen`, see `Inputs.params`
    about.json   run, step and average they are from, and a digest of them

So a run goes on whatever becomes of its teacher's directory, and never with another
teacher's parameters.
"""

from __future__ import annotations

import functools
import pathlib
import shutil
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffusionlab import (
    averages,
    inference,
    multihost,
    registry,
    restore,
    stored_tree,
    workdir,
)
from diffusionlab import config as config_lib
from diffusionlab import experiment as experiment_lib
from diffusionlab import state as state_lib
from diffusionlab.checkpoint import Checkpoints
from diffusionlab.experiment import Experiment
from diffusionlab.types import Params

FOLDER = "teacher"
_SECOND_MOMENT = "second_moment"
_ADAM = ("adam", "adamw", "nadam", "nadamw", "radam")


def abstract(experiment: Experiment, mesh) -> dict[str, Any]:
    """Returns shapes and shardings of what the train step gets as `frozen`."""
    teacher = experiment.teacher
    if teacher is None:
        return {}
    state = state_lib.abstract(teacher, mesh)
    roles = teacher.objective.samples_from
    found = {"teacher": {role: state.params[role] for role in roles}}
    if _needs_second_moment(experiment):
        found[_SECOND_MOMENT] = found["teacher"]
    return found


def _needs_second_moment(experiment: Experiment) -> bool:
    return getattr(experiment.objective, "needs_second_moment", False)


def load(experiment: Experiment, mesh, folder: pathlib.Path) -> dict[str, Any]:
    """Returns `frozen`: of the copy in `folder`, or at a first start of the teacher.

    Raises:
      FileNotFoundError: there is no copy, and the teacher's directory has gone.
      ValueError: the teacher has no such step, no such average, or no second moments.
      WorkdirError: the copy is damaged, or has been lost by a run with checkpoints.
    """
    if experiment.teacher is None:
        return {}
    copy = folder / FOLDER
    if not (copy / "about.json").is_file():
        if workdir.saved_steps(folder):
            raise workdir.WorkdirError(
                f"--workdir: '{folder}' has checkpoints, but its copy of the teacher "
                f"is gone: there is no '{copy / 'about.json'}'; put it back, or give "
                "another --workdir."
            )
        return _of_run(experiment, mesh)
    found = stored_tree.read(copy / "params", abstract(experiment, mesh))
    about = workdir.read_json(copy / "about.json")
    if inference.digest(found) != about["digest"]:
        raise workdir.WorkdirError(
            f"--workdir: '{copy}' is damaged: its parameters are not those of the "
            f"teacher '{about['run']}'; give another --workdir."
        )
    return found


def keep(
    experiment: Experiment, frozen: Mapping[str, Any], folder: pathlib.Path
) -> None:
    """Writes the copy of the teacher, unless it is there; all processes together."""
    copy = folder / FOLDER
    if experiment.teacher is None or (copy / "about.json").is_file():
        return
    timeout = experiment.checkpoint.barrier_timeout
    block = experiment.config["teacher"]
    about = {
        "run": block["run"],
        "step": _step(experiment),
        "ema": _ema(experiment),
        "digest": inference.digest(frozen),
    }

    def clear():
        # Of a start that was killed while it wrote.
        if copy.exists():
            shutil.rmtree(copy)
        copy.mkdir(parents=True)

    multihost.on_main("make room for the teacher", clear, timeout)
    stored_tree.write(copy / "params", frozen)
    write = lambda: workdir.write_json(copy / "about.json", about)  # noqa: E731
    multihost.on_main("keep the teacher", write, timeout)


def check_start(config: Mapping[str, Any]) -> None:
    """Checks the data of `teacher.start`, whose network may not fit any others.

    So it comes before anything is built.

    Raises:
      FileNotFoundError: there is no such run.
      ValueError: it is of another process or other data; says in what it differs.
    """
    start = (config.get("teacher") or {}).get("start", "")
    if start in ("", "random"):
        return
    path = "config.teacher.start"
    folder = workdir.find_run(start, path)
    stored = config_lib.completed(workdir.read_config(folder))
    whose = f"{path}: the run in '{start}'"
    pairs = []
    for block, of in ((stored, whose), (config, "config.data.source")):
        spec = registry.build("source", block["data"]["source"], of).spec
        process = registry.build("process", block["process"], of, spec=spec)
        pairs.append((process, spec))
    other, ours = pairs
    other = types.SimpleNamespace(process=other[0], spec=other[1])
    experiment_lib.check_same(other, *ours, whose)


def starting(
    experiment: Experiment, mesh, frozen: Mapping[str, Any], folder: pathlib.Path
) -> Params | None:
    """Returns the parameters that students start from; None is random.

    Args:
      experiment: of the student.
      mesh: where they go.
      frozen: of the teacher, see `load`.
      folder: of the student's run, where its copy of the teacher is, if any.

    Raises:
      FileNotFoundError: there is no such run.
      ValueError: its network means something else by its inputs or its outputs.
    """
    roles = experiment.objective.roles.values()
    block = experiment.config["teacher"]
    if not any(role.init == "teacher" for role in roles) or block["start"] == "random":
        return None
    if not block["start"]:
        if experiment.teacher is None:
            return None
        whose = f"config.teacher: the run in '{block['run']}'"
        _check_network(experiment.teacher, experiment, whose)
        average, found = _average(experiment), frozen["teacher"]
        if average != _ema(experiment):
            about = folder / FOLDER / "about.json"
            kept = workdir.read_json(about)["step"] if about.is_file() else None
            found = _params(experiment, mesh, average, kept)
        return found[experiment.teacher.objective.samples_from[0]]
    run = pathlib.Path(block["start"])
    other = experiment_lib.of_run(run, "config.teacher.start")
    _check_network(other, experiment, f"config.teacher.start: the run in '{run}'")
    checkpoints = Checkpoints(run)
    newest = checkpoints.steps()[-1]
    timeout = experiment.checkpoint.barrier_timeout
    step = multihost.all_of("which start", newest, timeout)[0]
    role = other.objective.samples_from[0]
    average = restore.default_ema(other)
    return restore.of_roles(other, checkpoints, step, average, mesh, (role,))[role]


def _check_network(other: Experiment, experiment: Experiment, whose: str) -> None:
    """Raises ValueError unless a network does in both processes what it has learnt."""
    for name in ("prediction", "scale_input", "sigma_data"):
        theirs, ours = (
            getattr(process, name, None)
            for process in (other.process, experiment.process)
        )
        if theirs != ours:
            raise ValueError(
                f"{whose} has another process.{name}: {theirs} there, {ours} here; "
                "give both the same, or config.teacher.start='random'."
            )


def _run(experiment: Experiment) -> pathlib.Path:
    return workdir.find_run(experiment.config["teacher"]["run"], "config.teacher.run")


def _ema(experiment: Experiment) -> str:
    """Returns which of the teacher's parameters it is asked with.

    Raises:
      ValueError: the config asks for an average where second moments are needed.
    """
    if not _needs_second_moment(experiment):
        return _average(experiment)
    asked = experiment.config["teacher"]["ema"]
    if asked not in ("", averages.RAW):
        raise ValueError(
            f"config.teacher.ema: is '{asked}', but the second moments that "
            "config.objective asks for belong to the parameters that Adam moved; use "
            f"'{averages.RAW}', or '', where the student starts from the average."
        )
    return averages.RAW


def _average(experiment: Experiment) -> str:
    """Returns which of them a student starts from."""
    asked = experiment.config["teacher"]["ema"]
    return asked or restore.default_ema(experiment.teacher)


@functools.lru_cache(maxsize=1)
def _step(experiment: Experiment) -> int:
    """Returns the teacher's step, chosen once per start: its run may go on meanwhile.

    Raises:
      ValueError: there is no checkpoint of the one that the config asks for.
    """
    run, step = _run(experiment), experiment.config["teacher"]["step"]
    steps = workdir.saved_steps(run)
    if step is not None and step not in steps:
        raise ValueError(
            f"config.teacher.step: no checkpoint of step {step} in '{run}'; there "
            f"are: {steps}."
        )
    timeout = experiment.checkpoint.barrier_timeout
    newest = steps[-1] if step is None else step
    return multihost.all_of("which teacher", newest, timeout)[0]


def _params(
    experiment: Experiment, mesh, ema: str, step: int | None = None
) -> dict[str, Params]:
    """Restores the teacher's parameters; a `step` of None is that of this start."""
    teacher = experiment.teacher
    step = _step(experiment) if step is None else step
    checkpoints, roles = Checkpoints(_run(experiment)), teacher.objective.samples_from
    path = "config.teacher.ema"
    return restore.of_roles(teacher, checkpoints, step, ema, mesh, roles, path)


def _of_run(experiment: Experiment, mesh) -> dict[str, Any]:
    found = {"teacher": _params(experiment, mesh, _ema(experiment))}
    if _needs_second_moment(experiment):
        found[_SECOND_MOMENT] = _second_moment(experiment, mesh)
    where = jax.tree.map(lambda s: s.sharding, abstract(experiment, mesh))
    return jax.device_put(found, where)


def _second_moment(experiment: Experiment, mesh) -> dict[str, Params]:
    """Restores Adam's second moments, without its correction of their bias.

    Raises:
      ValueError: the teacher's optimiser has none, or made no step.
    """
    teacher, run = experiment.teacher, _run(experiment)
    roles = teacher.objective.samples_from
    state = state_lib.abstract(teacher, mesh)
    part = {"opt_state": {role: state.opt_state[role] for role in roles}}
    moments = {
        role: optax.tree_utils.tree_get_all_with_path(s, "nu")
        for role, s in part["opt_state"].items()
    }
    named = all(teacher.optim[role].name in _ADAM for role in roles)
    if not named or not all(len(found) == 1 for found in moments.values()):
        raise ValueError(
            f"config.teacher: the run in '{run}' was not trained by Adam, whose second "
            "moments config.objective asks for; it was trained by "
            f"'{teacher.optim[roles[0]].name}'."
        )
    step = _step(experiment)
    found = Checkpoints(run).restore_part(step, part)["opt_state"]
    moments = {
        role: optax.tree_utils.tree_get_all_with_path(found[role], "nu")[0][1]
        for role in roles
    }
    if not any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(moments)):
        raise ValueError(
            f"config.teacher: the run in '{run}' was never trained: its checkpoint of "
            f"step {step} has no second moments, which config.objective asks for; "
            "train it, or use config.objective.preconditioner='identity'."
        )
    return moments
