"""The teacher of a run: its parameters, and the copy of them that the run keeps.

A run takes them from the teacher's directory once, at its first start. From then on
`<run>/teacher` has all that is needed:

    params/      what a train step gets as `frozen`, see `Inputs.params`
    about.json   run, step and average they are from, and a digest of them

So a run goes on whatever becomes of its teacher's directory, and never with another
teacher's parameters.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import optax

from diffusionlab import (
    averages,
    inference,
    multihost,
    restore,
    stored_tree,
    workdir,
)
from diffusionlab import experiment as experiment_lib
from diffusionlab import state as state_lib
from diffusionlab.checkpoint import Checkpoints
from diffusionlab.experiment import Experiment
from diffusionlab.types import Params

FOLDER = "teacher"
_SECOND_MOMENT = "second_moment"


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
      ValueError: the teacher has no such step, or no second moments.
      WorkdirError: the copy is damaged.
    """
    if experiment.teacher is None:
        return {}
    copy = folder / FOLDER
    if not (copy / "about.json").is_file():
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


def starting(experiment: Experiment, mesh) -> Params | None:
    """Returns the parameters that students start from; None is random.

    Raises:
      FileNotFoundError: there is no such run.
      ValueError: it is of another process or other data.
    """
    roles = experiment.objective.roles.values()
    block = experiment.config["teacher"]
    if not any(role.init == "teacher" for role in roles) or block["start"] == "random":
        return None
    if not block["start"]:
        if experiment.teacher is None:
            return None
        found = _params(experiment, mesh, _ema(experiment))
        return found[experiment.teacher.objective.samples_from[0]]
    folder = pathlib.Path(block["start"])
    other = experiment_lib.of_run(folder, "config.teacher.start")
    whose = f"config.teacher.start: the run in '{folder}'"
    experiment_lib.check_same(other, experiment.process, experiment.spec, whose)
    theirs, ours = other.process.prediction, experiment.process.prediction
    if theirs != ours:
        raise ValueError(
            f"{whose} has another process.prediction: {theirs} there, {ours} here."
        )
    checkpoints = Checkpoints(folder)
    newest = checkpoints.steps()[-1]
    timeout = experiment.checkpoint.barrier_timeout
    step = multihost.all_of("which start", newest, timeout)[0]
    role = other.objective.samples_from[0]
    average = restore.default_ema(other)
    return restore.of_roles(other, checkpoints, step, average, mesh, (role,))[role]


def _run(experiment: Experiment) -> pathlib.Path:
    run = pathlib.Path(experiment.config["teacher"]["run"])
    if not workdir.saved_steps(run):
        raise FileNotFoundError(
            f"config.teacher: '{run}' holds no run with a checkpoint; give the "
            "directory of a trained one."
        )
    return run


def _ema(experiment: Experiment) -> str:
    if _needs_second_moment(experiment):
        # They belong to the parameters that Adam moved.
        return averages.RAW
    return experiment.config["teacher"]["ema"] or restore.default_ema(
        experiment.teacher
    )


def _step(experiment: Experiment) -> int:
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


def _params(experiment: Experiment, mesh, ema: str) -> dict[str, Params]:
    teacher, step = experiment.teacher, _step(experiment)
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
      ValueError: the teacher's optimiser has none.
    """
    teacher, run = experiment.teacher, _run(experiment)
    roles = teacher.objective.samples_from
    state = state_lib.abstract(teacher, mesh)
    part = {"opt_state": {role: state.opt_state[role] for role in roles}}
    moments = {
        role: optax.tree_utils.tree_get_all_with_path(s, "nu")
        for role, s in part["opt_state"].items()
    }
    if not all(len(found) == 1 for found in moments.values()):
        raise ValueError(
            f"config.teacher: the run in '{run}' was not trained by Adam, whose second "
            "moments config.objective asks for; it was trained by "
            f"'{teacher.optim[roles[0]].name}'."
        )
    found = Checkpoints(run).restore_part(_step(experiment), part)["opt_state"]
    return {
        role: optax.tree_utils.tree_get_all_with_path(found[role], "nu")[0][1]
        for role in roles
    }
