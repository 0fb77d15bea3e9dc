"""Parameters to samples, predictions, losses: what sampling and evaluation share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from diffusionlab import averages, ema, keys, multihost, sharding
from diffusionlab import state as state_lib
from diffusionlab.checkpoint import Checkpoints
from diffusionlab.experiment import Experiment, Reference, check_noise
from diffusionlab.guidance import base as guidance
from diffusionlab.samplers import base
from diffusionlab.state import TrainState
from diffusionlab.types import Inputs, Params, Prediction, Sampler

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
    return _restore_roles(built, checkpoints, step, name, mesh, roles, path)


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
    found = _restore_roles(experiment, checkpoints, step, name, mesh, roles)
    if any(experiment.references):
        found |= of_references(experiment, mesh)
    return found


def _restore_roles(experiment, checkpoints, step, name, mesh, roles, path="--ema"):
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


def check_samples(experiment: Experiment) -> None:
    """Raises ValueError where the objective makes no predictions to sample with."""
    if not hasattr(experiment.objective, "predict"):
        raise ValueError(
            f"config.objective: '{experiment.config['objective']['name']}' has nothing "
            "to sample; such a run is evaluated (--mode=eval), or guides another."
        )


def make_predict(experiment: Experiment) -> Callable:
    """Returns `predict(params, z_t, t, cond) -> Prediction` with guidance applied.

    Raises:
      ValueError: there is nothing to sample from this run.
    """
    check_samples(experiment)

    def predict(params, z_t, t, cond):
        references = [
            reference
            and functools.partial(
                getattr(reference.experiment.objective, reference.asks),
                params[REFERENCES][i],
            )
            for i, reference in enumerate(experiment.references)
        ]
        guided = guidance.compose(
            experiment.guide,
            functools.partial(experiment.objective.predict, params),
            experiment.process,
            experiment.spec,
            references,
        )
        return guided(z_t, t, cond)

    return predict


def make_draw(
    experiment: Experiment, mesh, sampler: Sampler | None = None
) -> Callable[..., np.ndarray]:
    """Returns `draw(params, seed, indices, labels) -> x`, compiled once per batch size.

    It samples as the config says, or with another `sampler`. Sample i is a function
    of (seed, i) and its label alone. All processes call it together, and each
    gets the whole batch `[B, ...]` as numpy. `predict` gets as cond the 'label' `[B]`
    of data with classes, and 'key' `[B]`, the key of each sample, for guidance that
    draws noise of its own.

    Raises:
      ValueError: the sampler cannot work with this guidance.
    """
    predict = make_predict(experiment)
    sampler = sampler or experiment.sampler
    check_noise(sampler, experiment, f"the sampler {type(sampler).__name__}")

    def draw(params, seed, indices, labels):
        sample_keys = keys.sample_keys(seed, indices)
        cond = {"key": sample_keys}
        if experiment.spec.num_classes:
            cond["label"] = labels
        return base.sample(
            sampler,
            experiment.process,
            lambda z, t: predict(params, z, t, cond),
            sample_keys,
            experiment.spec.shape,
        )

    batch = sharding.batch_sharding(mesh)
    compiled = jax.jit(
        draw, in_shardings=(None, None, batch, batch), out_shardings=batch
    )

    timeout = experiment.checkpoint.barrier_timeout

    def run(params, seed, indices, labels):
        given = [np.asarray(a, np.int32) for a in (indices, labels)]
        given = [
            jax.make_array_from_callback(a.shape, batch, lambda where, a=a: a[where])
            for a in given
        ]
        with multihost.together("a batch of samples", timeout):
            return to_numpy(compiled(params, seed, *given))

    run.lower = compiled.lower
    return run


def to_numpy(x: jax.Array) -> np.ndarray:
    """Returns the whole of a sharded array on every process."""
    if jax.process_count() == 1:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def draw_many(
    draw: Callable, mesh, params, seed: int, indices, labels, batch_size: int
) -> np.ndarray:
    """Draws any number of samples in batches of one size, the last one padded.

    Args:
      draw: from `make_draw`.
      mesh: a batch is split over it.
      params: by role.
      seed: of the samples.
      indices, labels: `[N]`.
      batch_size: rounded up to what the mesh divides.
    """
    indices, labels = np.asarray(indices), np.asarray(labels)
    shards = sharding.batch_shards(mesh)
    size = -(-min(batch_size, len(indices)) // shards) * shards
    found = []
    for start in range(0, len(indices), size):
        chosen = np.arange(start, start + size)
        # Padding repeats the last sample; it depends on its index only.
        chosen = np.minimum(chosen, len(indices) - 1)
        found.append(draw(params, seed, indices[chosen], labels[chosen]))
    return np.concatenate(found)[: len(indices)]


def make_loss(experiment: Experiment, mesh) -> Callable:
    """Returns `loss(params, batch, index) -> Metrics`, jitted: the loss of phase 0.

    Every process gets the whole result.
    """
    name = experiment.objective.phase(0)
    phase = experiment.objective.phases[name]

    def loss(params, batch, index):
        inputs = Inputs(
            batch=batch,
            key=keys.key(experiment.seed, "eval", index),
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema={},
        )
        return phase.loss(params, inputs)[1]

    return jax.jit(loss, out_shardings=sharding.replicated(mesh))


def make_plain_predict(experiment: Experiment, mesh) -> Callable[..., Prediction]:
    """Returns `predict(params, z_t, t, label)`, jitted and without guidance.

    Every process gets the whole result.
    """

    def predict(params, z_t, t, label):
        check_samples(experiment)
        cond = {} if label is None else {"label": label}
        return experiment.objective.predict(params, z_t, t, cond)

    return jax.jit(predict, out_shardings=sharding.replicated(mesh))


def make_compute(experiment: Experiment, mesh) -> Callable[..., Any]:
    """Returns `compute(params, function, *arrays, guided) -> numpy`, jitted.

    It is `function(predict, *arrays)` with `predict(z_t, t, cond) -> Prediction`, with
    guidance or without; it is compiled once per function object, `guided` and shapes.
    Where its cond has no 'key', guidance gets the keys of the first samples of the run.
    """

    def with_keys(params, z_t, t, cond):
        if "key" not in cond:
            indices = jnp.arange(z_t.shape[0])
            cond = {**cond, "key": keys.sample_keys(experiment.seed, indices)}
        return make_predict(experiment)(params, z_t, t, cond)

    def plain(*arguments):
        check_samples(experiment)
        return experiment.objective.predict(*arguments)

    predicts = {True: with_keys, False: plain}

    @functools.partial(
        jax.jit, static_argnums=(0, 1), out_shardings=sharding.replicated(mesh)
    )
    def call(function, guided, params, *arrays):
        return function(functools.partial(predicts[guided], params), *arrays)

    def compute(params, function, *arrays, guided: bool = False):
        return jax.device_get(call(function, guided, params, *arrays))

    return compute


def labels_in_turn(experiment: Experiment, indices, label: int | None = None):
    """Returns `label` for every sample, or without it the classes in turn."""
    indices = np.asarray(indices)
    if label is not None:
        return np.full_like(indices, label)
    return indices % max(experiment.spec.num_classes, 1)


def sampler_record(experiment: Experiment) -> Mapping[str, Any]:
    """What of the config decides how samples are drawn."""
    return {k: experiment.config[k] for k in ("sampler", "guidance")}
