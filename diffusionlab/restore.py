"""Parameters out of checkpoints and states: of a role, of an average, of other runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusionlab import averages, ema, multihost, sharding
from diffusionlab import state as state_lib
from diffusionlab.checkpoint import Checkpoints
from diffusionlab.experiment import Experiment, Reference
from diffusionlab.state import TrainState
from diffusionlab.types import Params

RAW = averages.RAW
REFERENCES = "guidance"
"""Beside the roles in `params`: the parameters of other runs, one entry a transform."""


def default_ema(experiment: Experiment) -> str:
    """Returns 'main' if the config keeps an average of this name, else 'none'."""
    return "main" if "main" in experiment.ema else RAW


def check_ema(experiment: Experiment, name: str) -> None:
    """Checks the name of an average: of the config, 'none', or 'sigma_rel=WIDTH'.

    Raises:
      ValueError: there is no such average; lists those there are.
    """
    averages.check(experiment.ema, name, "--ema")


def of_state(experiment: Experiment, state: TrainState, name: str) -> dict[str, Params]:
    """Returns the parameters of inference, by role, out of a train state.

    They are those of samples and of the loss of phase 0, and `REFERENCES` where
    guidance uses other runs.
    """
    source = state.params if name == RAW else {**state.params, **state.ema[name]}
    params = {role: source[role] for role in _roles(experiment)}
    if any(experiment.references):
        params |= of_references(experiment, sharding.make_mesh(experiment.mesh))
    return params


def _roles(experiment: Experiment) -> tuple[str, ...]:
    objective = experiment.objective
    if experiment.teacher is not None:
        return objective.samples_from
    trained = objective.phases[objective.phase(0)].trains
    return tuple(dict.fromkeys([*objective.samples_from, *trained]))


@functools.lru_cache(maxsize=1)
def of_references(experiment: Experiment, mesh) -> dict[str, tuple]:
    """Restores what guidance uses of other runs, once per experiment.

    Returns:
      `{REFERENCES: ...}` with parameters by role for each transform, `{}` for one that
      uses no other run.
    """
    steps = reference_steps(experiment)
    parts = map(_of_reference, experiment.references, steps, [mesh] * len(steps))
    return {REFERENCES: tuple(parts)}


@functools.lru_cache(maxsize=1)
def reference_steps(experiment: Experiment) -> tuple[int | None, ...]:
    """Returns for each transform the step at which it uses another run, or None.

    It is chosen once per experiment: the other run may go on meanwhile.
    """
    timeout, steps = experiment.checkpoint.barrier_timeout, []
    for reference in experiment.references:
        step = reference and reference.step
        if reference and step is None:
            # The other run may save between the looks of two processes.
            newest = Checkpoints(reference.folder).steps()[-1]
            step = multihost.all_of("which reference", newest, timeout)[0]
        steps.append(step)
    return tuple(steps)


def _of_reference(reference: Reference | None, step, mesh) -> dict[str, Params]:
    if reference is None:
        return {}
    built, checkpoints = reference.experiment, Checkpoints(reference.folder)
    name, roles = reference.ema or default_ema(built), built.objective.samples_from
    path = f"{reference.path}.ema"
    return of_roles(built, checkpoints, step, name, mesh, roles, path)


def _updates(experiment: Experiment, role: str, steps: Sequence[int]) -> dict[int, int]:
    """Returns step -> updates of a role that were finished then.

    An average runs on these, not on the steps of other phases; see `train_step`.
    """
    phases, phase_of = experiment.objective.phases, experiment.objective.phase
    training = {name for name, phase in phases.items() if role in phase.trains}
    found, done, start = {}, 0, 0
    for step in sorted(steps):
        done += sum(phase_of(k) in training for k in range(start, step))
        found[step], start = done, step
    return found


def restore(
    experiment: Experiment, checkpoints: Checkpoints, step: int, name: str, mesh
) -> dict[str, Params]:
    """Restores the parameters that `of_state` returns, and nothing else.

    Args:
      experiment: of the run.
      checkpoints: of the run.
      step: of the checkpoint; with 'sigma_rel=WIDTH', the step at which the
        reconstructed average ends: every checkpoint up to it takes part.
      name: of the average; see `check_ema`.
      mesh: where the parameters go.

    Raises:
      ValueError: what is stored does not reach 'sigma_rel=WIDTH'; names what does.
    """
    roles = _roles(experiment)
    found = of_roles(experiment, checkpoints, step, name, mesh, roles)
    if any(experiment.references):
        found |= of_references(experiment, mesh)
    return found


def of_roles(
    experiment: Experiment,
    checkpoints: Checkpoints,
    step: int,
    name: str,
    mesh,
    roles: Sequence[str],
    path: str = "--ema",
) -> dict[str, Params]:
    """Restores the parameters of some roles; as `restore`.

    Args:
      roles: which.
      path: of the name of the average, for messages.
    """
    abstract = state_lib.abstract(experiment, mesh)
    if not averages.is_reconstructed(name):
        return _restore_one(checkpoints, step, abstract, roles, name)
    found = {}
    for role in roles:
        powers = {
            n: e.sigma_rel
            for n, e in experiment.ema.items()
            if isinstance(e, ema.Power) and role in abstract.ema[n]
        }
        if powers:
            width = averages.width(name, path)
            try:
                terms = _terms(experiment, checkpoints, step, role, powers, width)
            except ValueError as error:
                raise ValueError(f"{path}: role '{role}', {error}") from None
        else:
            terms = [(step, RAW, 1.0)]
        for at, average, coefficient in terms:
            part = _restore_one(checkpoints, at, abstract, (role,), average)[role]
            part = jax.tree.map(lambda p, c=coefficient: jnp.float32(c) * p, part)
            found[role] = (
                jax.tree.map(jnp.add, found[role], part) if role in found else part
            )
    return found


def _terms(experiment, checkpoints, step, role, powers, width):
    """Returns (checkpoint, name of a stored average, coefficient) of one role."""
    steps = [s for s in checkpoints.steps() if 0 < s <= step]
    updates = _updates(experiment, role, [*steps, step])
    # Where a role did not train in between, two checkpoints hold the same averages.
    latest = {updates[s]: s for s in steps if updates[s]}
    stored = [(count, n) for count in latest for n in powers]
    coefficients = ema.reconstruction(
        [(count, powers[n]) for count, n in stored], updates[step], width
    )
    return [
        (latest[count], n, coefficient)
        for (count, n), coefficient in zip(stored, coefficients, strict=True)
    ]


def _restore_one(checkpoints, step, abstract, roles, name) -> dict[str, Params]:
    """Roles of which no average is kept come as they are."""
    averaged = {} if name == RAW else abstract.ema[name]
    part: dict[str, Any] = {}
    for role in roles:
        if role in averaged:
            part.setdefault("ema", {}).setdefault(name, {})[role] = averaged[role]
        else:
            part.setdefault("params", {})[role] = abstract.params[role]
    found = checkpoints.restore_part(step, part)
    return {**found.get("params", {}), **found.get("ema", {}).get(name, {})}
