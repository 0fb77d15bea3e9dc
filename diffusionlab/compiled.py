"""The compiled step of each phase: its shapes, shardings and FLOPs."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from diffusionlab import experiment as experiment_lib
from diffusionlab import flops, optim, sharding, train_step
from diffusionlab import state as state_lib
from diffusionlab.experiment import Experiment
from diffusionlab.state import TrainState


class Steps:
    """The compiled step of each phase, and the metrics each has gathered.

    Args:
      experiment: what is trained.
      mesh: where.
      frozen: the parameters that never change, or their shapes; see `teachers`.
    """

    def __init__(self, experiment: Experiment, mesh, frozen: Any = None):
        self.objective = experiment.objective
        whole, batch = sharding.replicated(mesh), sharding.batch_sharding(mesh)
        where = state_lib.shardings(experiment, mesh)
        self.state = state_lib.abstract(experiment, mesh)
        self.batch = abstract_batch(experiment, mesh)
        self.frozen = frozen or {}
        self.accumulators = {
            name: train_step.abstract_accumulator(
                experiment, name, self.state, self.batch, self.frozen
            )
            for name in experiment.objective.phases
        }
        frozen_where = jax.tree.map(lambda s: s.sharding, self.frozen)
        self._functions = {
            name: jax.jit(
                train_step.make_train_step(experiment, name),
                in_shardings=(where, whole, batch, frozen_where, whole),
                out_shardings=(where, whole),
                donate_argnums=(0, 1),
            )
            for name in experiment.objective.phases
        }
        self._transitions = {
            name: jax.jit(
                train_step.make_transition(experiment, name),
                in_shardings=(where,),
                out_shardings=where,
            )
            for name in getattr(experiment.objective, "transitions", {})
        }
        self._whole = whole
        self._peaks = jax.device_put(optim.peaks(experiment.optim), whole)
        self._compiled: dict[str, Any] = {}

    def empty(self) -> dict[str, Any]:
        """Returns the metrics of no steps, by phase."""
        made = {n: train_step.empty(a) for n, a in self.accumulators.items()}
        return jax.device_put(made, self._whole)

    def abstract_gathered(self) -> dict[str, Any]:
        """Returns the shapes of `empty`, for a restore."""
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=self._whole),
            self.accumulators,
        )

    def __call__(self, step: int, state: TrainState, gathered: dict, batch):
        """Runs optimiser step `step`; consumes `state` and the metrics of its phase.

        A transition that is due before this step comes first.
        """
        change = self._transitions and self.objective.transition(step)
        if change:
            state = self._transitions[change](state)
        name = self.objective.phase(step)
        state, gathered[name] = self._compiled[name](
            state, gathered[name], batch, self.frozen, self._peaks
        )
        return state

    def compile(self) -> dict[str, Any]:
        """Compiles the step of each phase, and returns them; a second call is free."""
        if not self._compiled:
            gathered = self.abstract_gathered()
            self._compiled = {
                name: function.lower(
                    self.state, gathered[name], self.batch, self.frozen, self._peaks
                ).compile()
                for name, function in self._functions.items()
            }
        return self._compiled


def abstract_batch(experiment: Experiment, mesh) -> dict[str, Any]:
    """Returns the shapes of a global batch; pairs have a noise, see `pairs.py`."""
    size, spec = experiment.data.batch_size, experiment.spec
    where = sharding.batch_sharding(mesh)
    kind = np.int32 if spec.num_tokens else np.float32
    shapes = {"x": ((size, *spec.shape), kind)}
    if spec.num_classes:
        shapes["label"] = ((size,), np.int32)
    if getattr(experiment.objective, "num_pairs", 0):
        shapes["noise"] = shapes["x"]
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
        for name, (shape, dtype) in shapes.items()
    }


def flops_of_step(experiment: Experiment, steps: Steps) -> int:
    """Returns the model FLOPs of a step, averaged over a hundred steps' phases.

    Rematerialisation repeats work, so it is left out: the same config without it.
    """
    config = dict(experiment.config)
    config["networks"] = {
        name: {k: "" if k == "remat" else v for k, v in block.items()}
        for name, block in config["networks"].items()
    }
    if config["networks"] != experiment.config["networks"]:
        experiment = experiment_lib.build(config)
    per_phase = {
        name: flops.count(
            train_step.make_gradients(experiment, name),
            steps.state,
            steps.batch,
            steps.frozen,
        )
        for name in experiment.objective.phases
    }
    names = [experiment.objective.phase(step) for step in range(100)]
    return round(sum(per_phase[name] for name in names) / len(names))
