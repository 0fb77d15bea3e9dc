"""The state of a run: its shapes, where they lie, and how it starts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from diffusionlab import keys, optim, sharding
from diffusionlab.experiment import Experiment
from diffusionlab.types import Array, Params, path_name


@flax.struct.dataclass
class TrainState:
    """Everything that training changes. Holds no random key: see `keys.py`.

    Attributes:
      step: int32, finished optimiser steps.
      params: by role.
      opt_state: by role.
      ema: by name of the average, then by role.
    """

    step: Array
    params: dict[str, Params]
    opt_state: dict[str, Any]
    ema: dict[str, dict[str, Params]]


# In the paths of parameters that a student has and its teacher need not: what they add
# starts at zero.
_ITS_OWN = ("condition", "noise/")


@functools.cache
def abstract_params(experiment: Experiment) -> dict[str, Any]:
    """Returns the shapes of the parameters by role."""
    return jax.eval_shape(lambda: _init_params(experiment, None))


@functools.cache
def optimizers(experiment: Experiment) -> dict[str, Any]:
    """Returns the optax transformation of each role."""
    return optimizers_at(experiment, {})


def optimizers_at(experiment: Experiment, peaks: Mapping[str, Array]) -> dict[str, Any]:
    """Returns those of learning rates given as arrays, see `optim.peaks`."""
    shapes = abstract_params(experiment)
    return {
        role: optim.make(block, shapes[role], f"config.optim.{role}", peaks.get(role))
        for role, block in experiment.optim.items()
    }


def _init_params(experiment: Experiment, start: Params | None) -> dict[str, Params]:
    params: dict[str, Params] = {}
    roles = experiment.objective.roles
    # Copies last, so that each finds its origin.
    for name, role in sorted(roles.items(), key=lambda item: ":" in item[1].init):
        kind, _, origin = role.init.partition(":")
        if kind in ("random", "teacher"):
            key = keys.key(experiment.seed, f"init/{name}")
            params[name] = experiment.networks[role.network].init(key)
            if kind == "teacher" and start is not None:
                params[name] = overlay(params[name], start)
        elif kind == "copy" and origin in params:
            params[name] = jax.tree.map(jnp.copy, params[origin])
        else:
            raise ValueError(f"role '{name}': cannot start as '{role.init}'.")
    return params


def overlay(params: Params, start: Params) -> Params:
    """Returns `params` with the values of `start` where that has a leaf of this path.

    Raises:
      ValueError: `start` has a leaf that `params` has not, of this shape, or lacks one
        that does not belong to a condition, or to noise, of the student's own.
    """
    wanted = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    given = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(start)}
    wrong = {
        name: f"{getattr(given.get(name), 'shape', 'nothing')} there, "
        f"{getattr(wanted.get(name), 'shape', 'nothing')} here"
        for name in sorted({*wanted, *given})
        if (name not in given and not any(own in name for own in _ITS_OWN))
        or name not in wanted
        or (name in given and wanted[name].shape != given[name].shape)
    }
    if wrong:
        name = next(iter(wrong))
        raise ValueError(
            "config.teacher.start: the network that the student starts from is another "
            f"one ({len(wrong)} parameters; '{name}': {wrong[name]}); leave "
            "config.networks.denoiser out to have the same, give the directory of a "
            "run of such a network, or start='random'."
        )
    return jax.tree_util.tree_map_with_path(
        lambda path, own: jnp.copy(given.get(path_name(path), own)), params
    )


def _kept(experiment: Experiment, average: str) -> list[str]:
    roles = experiment.objective.roles
    return [
        name
        for name, role in roles.items()
        if role.trainable and (role.ema is None or average in role.ema)
    ]


def create(experiment: Experiment, start: Params | None = None) -> TrainState:
    """Returns the state before the first step, a pure function of config and `start`.

    Args:
      experiment: what is trained.
      start: parameters that roles with the init 'teacher' begin with; None is random.
    """
    params = _init_params(experiment, start)
    opt_state = {r: o.init(params[r]) for r, o in optimizers(experiment).items()}
    ema = {
        name: {
            role: jax.tree.map(jnp.copy, params[role])
            for role in _kept(experiment, name)
        }
        for name in experiment.ema
    }
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, ema)


@functools.cache
def _shapes(experiment: Experiment) -> TrainState:
    """Shapes of the state. Tracing takes a while, and several places ask for them."""
    return jax.eval_shape(lambda: create(experiment))


def placements(experiment: Experiment, mesh) -> dict[str, Any]:
    """Returns where each parameter of each role lies."""
    shapes = abstract_params(experiment)
    return {
        name: sharding.place_tree(
            shapes[name],
            experiment.networks[role.network].param_axes,
            experiment.mesh.rules,
            mesh,
        )
        for name, role in experiment.objective.roles.items()
    }


def shardings(experiment: Experiment, mesh) -> TrainState:
    """Returns the sharding of every array of the state."""
    shapes = _shapes(experiment)
    places = placements(experiment, mesh)

    def follow(role, tree):
        return sharding.follow(tree, shapes.params[role], places[role], mesh)

    return TrainState(
        step=sharding.replicated(mesh),
        params={r: follow(r, tree) for r, tree in shapes.params.items()},
        opt_state={r: follow(r, tree) for r, tree in shapes.opt_state.items()},
        ema={
            name: {r: follow(r, tree) for r, tree in trees.items()}
            for name, trees in shapes.ema.items()
        },
    )


def abstract(experiment: Experiment, mesh) -> TrainState:
    """Returns shapes, dtypes and shardings of the state: what a restore fills."""
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
        _shapes(experiment),
        shardings(experiment, mesh),
    )


def init(experiment: Experiment, mesh, start: Params | None = None) -> TrainState:
    """Initialises the state, each array where it belongs; `start` as in `create`."""
    make = jax.jit(
        lambda start: create(experiment, start),
        out_shardings=shardings(experiment, mesh),
    )
    return make(start)
