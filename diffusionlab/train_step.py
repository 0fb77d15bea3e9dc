"""The train step: one pure function for every objective.

Micro-batches, gradients for the roles of the phase, one optimiser per role, averages,
metrics. A phase is one compiled function; `objective.phase(step)` chooses on the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from diffusionlab import ema, keys, optim
from diffusionlab import state as state_lib
from diffusionlab.experiment import Experiment
from diffusionlab.state import TrainState
from diffusionlab.types import Array, Batch, Inputs, Metrics

Accumulator = dict[str, dict[str, Any]]
"""'sums': name -> (sum, count) since the last row; 'nonfinite': name -> bad step."""

NEVER = jnp.iinfo(jnp.int32).max


def make_train_step(
    experiment: Experiment, phase_name: str
) -> Callable[..., tuple[TrainState, Accumulator]]:
    """Returns the pure step of one phase.

    `step(state, accumulator, batch, frozen, peaks)` takes the state, the metrics
    gathered since the last row, the global batch, parameters that never change (see
    `Inputs.params`), and learning rates (see `optim.peaks`; without them, the
    config's); it returns the first two, updated. Donate these.
    """
    gradients = make_gradients(experiment, phase_name)

    def step(state, accumulator, batch, frozen=None, peaks=None):
        peaks = peaks or {}
        optimizers = state_lib.optimizers_at(experiment, peaks)
        rates = {
            role: optim.learning_rate(block, f"config.optim.{role}", peaks.get(role))
            for role, block in experiment.optim.items()
        }
        grads, metrics = gradients(state, batch, frozen)
        params, opt_state = dict(state.params), dict(state.opt_state)
        for role, grad in grads.items():
            updates, opt_state[role] = optimizers[role].update(
                grad, opt_state[role], params[role]
            )
            params[role] = optax.apply_updates(params[role], updates)
            metrics[f"grad_norm/{role}"] = _one(optax.tree.norm(grad))
            rate = rates[role](_count(state.opt_state[role]))
            metrics[f"learning_rate/{role}"] = _one(rate)
        # An average follows the updates of its role, not the steps of the others.
        averages = {
            name: {
                role: ema.update(
                    average,
                    params[role],
                    experiment.ema[name].rate(_count(opt_state[role])),
                )
                if role in grads
                else average
                for role, average in by_role.items()
            }
            for name, by_role in state.ema.items()
        }
        finished = state.step + 1
        new_state = TrainState(finished, params, opt_state, averages)
        return new_state, accumulate(accumulator, metrics, finished)

    return step


@functools.cache
def make_gradients(experiment: Experiment, phase_name: str) -> Callable:
    """Returns `gradients(state, batch, frozen) -> ({role: gradient}, Metrics)`.

    It is traced once, whoever asks: for shapes, for FLOPs, or to be compiled.

    With n micro-batches the gradient is the mean of theirs, computed one after the
    other, so that activations of one micro-batch only are in memory.
    """
    phase = experiment.objective.phases[phase_name]
    num = experiment.train.micro_batches

    def micro_gradients(state, frozen, batch, index):
        inputs = Inputs(
            batch=batch,
            key=keys.key(experiment.seed, f"loss/{phase_name}", state.step, index),
            step=state.step,
            params=jax.lax.stop_gradient({**state.params, **(frozen or {})}),
            ema=state.ema,
        )
        trained = {role: state.params[role] for role in phase.trains}
        grad = jax.value_and_grad(phase.loss, has_aux=True)
        (_, metrics), grads = grad(trained, inputs)
        return grads, metrics

    def gradients(state, batch, frozen=None):
        if num == 1:
            return micro_gradients(state, frozen, batch, 0)
        pieces = jax.tree.map(lambda leaf: _split(leaf, num), batch)
        first = jax.tree.map(lambda leaf: leaf[0], pieces)
        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype),
            jax.eval_shape(micro_gradients, state, frozen, first, 0),
        )

        def body(total, piece):
            micro_batch, index = piece
            found = micro_gradients(state, frozen, micro_batch, index)
            return jax.tree.map(jnp.add, total, found), None

        (grads, metrics), _ = jax.lax.scan(body, zeros, (pieces, jnp.arange(num)))
        return jax.tree.map(lambda g: g / num, grads), metrics

    return jax.jit(gradients, inline=True)


def make_transition(
    experiment: Experiment, name: str
) -> Callable[[TrainState], TrainState]:
    """Returns the pure function of one of the objective's transitions."""
    change = experiment.objective.transitions[name]
    optimizers = state_lib.optimizers(experiment)

    def origin(state: TrainState, where: str):
        role, _, average = where.partition("@")
        return state.ema[average][role] if average else state.params[role]

    def transition(state: TrainState) -> TrainState:
        new = {role: origin(state, where) for role, where in change.copy.items()}
        params = {**state.params, **new}
        fresh = {role: optimizers[role].init(params[role]) for role in change.restart}
        averages = {
            name: {
                role: params[role] if role in change.restart else average
                for role, average in by_role.items()
            }
            for name, by_role in state.ema.items()
        }
        # Outputs may not share their buffers.
        return jax.tree.map(
            jnp.copy,
            TrainState(state.step, params, {**state.opt_state, **fresh}, averages),
        )

    return transition


def _split(leaf: Array, num: int) -> Array:
    """`[B, ...] -> [num, B / num, ...]`, every device keeping its own examples."""
    pieces = leaf.reshape(leaf.shape[0] // num, num, *leaf.shape[1:]).swapaxes(0, 1)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return pieces
    spec = PartitionSpec(None, ("data", "fsdp"))
    return jax.lax.with_sharding_constraint(pieces, NamedSharding(mesh, spec))


def _one(value: Array) -> tuple[Array, Array]:
    return jnp.asarray(value, jnp.float32), jnp.ones((), jnp.float32)


def _count(opt_state) -> Array:
    """Updates this optimiser has made: the count that its schedule reads."""
    return optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]


def accumulate(accumulator: Accumulator, metrics: Metrics, step: Array) -> Accumulator:
    """Adds a step's metrics, and notes the first step at which one is not finite."""
    sums = jax.tree.map(jnp.add, accumulator["sums"], metrics)
    nonfinite = {
        name: jnp.where(
            jnp.all(jnp.isfinite(total)),
            accumulator["nonfinite"][name],
            jnp.minimum(accumulator["nonfinite"][name], step),
        )
        for name, (total, _) in metrics.items()
    }
    return {"sums": sums, "nonfinite": nonfinite}


def abstract_accumulator(
    experiment: Experiment,
    phase_name: str,
    state: TrainState,
    batch: Batch,
    frozen: Mapping[str, Any] | None = None,
) -> Accumulator:
    """Returns the shapes of the accumulator of one phase.

    Args:
      state, batch, frozen: shapes.
    """
    gradients = make_gradients(experiment, phase_name)
    _, metrics = jax.eval_shape(gradients, state, batch, frozen)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    for role in experiment.objective.phases[phase_name].trains:
        metrics[f"grad_norm/{role}"] = (scalar, scalar)
        metrics[f"learning_rate/{role}"] = (scalar, scalar)
    steps = {name: jax.ShapeDtypeStruct((), jnp.int32) for name in metrics}
    return {"sums": metrics, "nonfinite": steps}


def empty(accumulator: Accumulator) -> Accumulator:
    """Returns the accumulator of no steps, for shapes like these."""
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), accumulator["sums"])
    never = {name: jnp.full((), NEVER, jnp.int32) for name in accumulator["nonfinite"]}
    return {"sums": zeros, "nonfinite": never}
