"""The state of a run: its shapes, where they lie, and how it starts."""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from diffusionlab import keys, optim, sharding
from diffusionlab.experiment import Experiment
from diffusionlab.types import Array, Params


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


@functools.cache
def abstract_params(experiment: Experiment) -> dict[str, Any]:
    """Returns the shapes of the parameters by role."""
    return jax.eval_shape(lambda: _init_params(experiment))


@functools.cache
def optimizers(experiment: Experiment) -> dict[str, Any]:
    """Returns the optax transformation of each role."""
    shapes = abstract_params(experiment)
    return {
        role: optim.make(block, shapes[role], f"config.optim.{role}")
        for role, block in experiment.optim.items()
    }


def _init_params(experiment: Experiment) -> dict[str, Params]:
    params: dict[str, Params] = {}
    roles = experiment.objective.roles
    # Random roles first, so that a copy finds its origin.
    for name, role in sorted(roles.items(), key=lambda item: item[1].init != "random"):
        kind, _, origin = role.init.partition(":")
        if kind == "random":
            key = keys.key(experiment.seed, f"init/{name}")
            params[name] = experiment.networks[role.network].init(key)
        elif kind == "copy" and origin in params:
            params[name] = jax.tree.map(jnp.copy, params[origin])
        else:
            raise ValueError(f"role '{name}': cannot start as '{role.init}'.")
    return params


def _kept(experiment: Experiment, average: str) -> list[str]:
    roles = experiment.objective.roles
    return [n for n, role in roles.items() if role.ema is None or average in role.ema]


def create(experiment: Experiment) -> TrainState:
    """Returns the state before the first step, a pure function of the config."""
    params = _init_params(experiment)
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


def init(experiment: Experiment, mesh) -> TrainState:
    """Initialises the state, each array where it belongs from the start."""
    make = jax.jit(
        lambda: create(experiment), out_shardings=shardings(experiment, mesh)
    )
    return make()
