"""Parameters to samples, predictions, losses: what sampling and evaluation share."""

from __future__ import annotations

import functools
import hashlib
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from diffusionlab import experiment as experiment_lib
from diffusionlab import keys, multihost, restore, sharding
from diffusionlab.checkpoint import Checkpoints
from diffusionlab.checks import check_noise
from diffusionlab.experiment import Experiment
from diffusionlab.features.base import Room, cache_folder
from diffusionlab.guidance import base as guidance
from diffusionlab.samplers import base
from diffusionlab.types import Inputs, Prediction, Sampler, path_name


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
                params[restore.REFERENCES][i],
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
    """Returns `draw(params, seed, indices, labels, noise=None) -> x`.

    It is compiled once per batch size. It samples as the config says, or with another
    `sampler`. Sample i is a function of (seed, i) and its label alone; with `noise`
    `[B, ...]`, standard normal, in the place of the noise it starts from. All processes
    call it together, and each gets the whole batch `[B, ...]` as numpy. `predict` gets
    as cond the 'label' `[B]` of data with classes, and 'key' `[B]`, the key of each
    sample, for guidance that draws noise of its own.

    Raises:
      ValueError: the sampler cannot work with this guidance.
    """
    predict = make_predict(experiment)
    sampler = sampler or experiment.sampler
    check_noise(sampler, experiment, f"the sampler {type(sampler).__name__}")

    def draw(params, seed, indices, labels, noise=None):
        sample_keys = keys.sample_keys(seed, indices)
        cond = {"key": sample_keys}
        if experiment.spec.num_classes:
            cond["label"] = labels
        made = base.sample(
            sampler,
            experiment.process,
            lambda z, t: predict(params, z, t, cond),
            sample_keys,
            experiment.spec.shape,
            noise,
        )
        return experiment.process.decode(made)

    batch = sharding.batch_sharding(mesh)
    compiled = jax.jit(draw, out_shardings=batch)
    timeout = experiment.checkpoint.barrier_timeout

    def run(params, seed, indices, labels, noise=None):
        given = [np.asarray(a, np.int32) for a in (indices, labels)]
        given += [] if noise is None else [np.asarray(noise, np.float32)]
        given = [_split(a, batch) for a in given]
        with multihost.together("a batch of samples", timeout):
            return to_numpy(compiled(params, seed, *given))

    run.lower = compiled.lower
    return run


def _split(a: np.ndarray, where) -> jax.Array:
    """The rows of an array that every process has, over the devices."""
    return jax.make_array_from_callback(a.shape, where, lambda index: a[index])


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
    size = _rounded(min(batch_size, len(indices)), mesh)
    found = []
    for start in range(0, len(indices), size):
        chosen = np.arange(start, start + size)
        # Padding repeats the last sample; it depends on its index only.
        chosen = np.minimum(chosen, len(indices) - 1)
        found.append(draw(params, seed, indices[chosen], labels[chosen]))
    return np.concatenate(found)[: len(indices)]


def _rounded(size: int, mesh) -> int:
    shards = sharding.batch_shards(mesh)
    return -(-size // shards) * shards


def stream(
    experiment: Experiment,
    mesh,
    draw: Callable,
    params,
    num: int,
    start: int = 0,
    sobol: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (x, label) of samples `start` to `num` - 1 in batches of one size.

    The size is `logging.num_samples`, or `num` if that is less, rounded up to what the
    mesh divides; the last batch is cut. Samples and labels are those that
    `Evaluation.draw_examples` returns.

    Args:
      experiment: with the seed; its classes come in turn.
      mesh: a batch is split over it.
      draw: from `make_draw`.
      params: by role.
      num: samples in all.
      start: first sample to yield.
      sobol: start from the quantiles of a scrambled Sobol sequence instead of pseudo-
        random noise: sample i starts from its point i (Chong and Forsyth 2020, arXiv
        1911.07023).
    """
    size = _rounded(min(experiment.logging.num_samples, num), mesh)
    points = _sobol(experiment, start) if sobol else None
    for first in range(start, num, size):
        indices = np.arange(first, first + size)
        labels = labels_in_turn(experiment, indices)
        noise = () if points is None else (points(size),)
        x = draw(params, experiment.seed, indices, labels, *noise)
        keep = min(size, num - first)
        yield x[:keep], labels[:keep].astype(np.int32)


def _sobol(experiment: Experiment, start: int) -> Callable[[int], np.ndarray]:
    """Returns `points(n)`: the next n of the sequence as standard normal noise."""
    from scipy import special
    from scipy.stats import qmc

    shape = experiment.spec.shape
    sequence = qmc.Sobol(int(np.prod(shape)), rng=experiment.seed, bits=32)
    if start:
        sequence.fast_forward(start)

    def points(num: int) -> np.ndarray:
        with warnings.catch_warnings():
            # It wants powers of two; the sequence as a whole is what is used.
            warnings.simplefilter("ignore", UserWarning)
            uniform = sequence.random(num)
        # Cells of 2^-32, taken at their middle: none is 0 or 1.
        uniform = uniform + 2.0**-33
        return special.ndtri(uniform).reshape(num, *shape).astype(np.float32)

    return points


def make_apply(mesh, timeout: float) -> Callable[..., Any]:
    """Returns `apply(function, params, x) -> numpy`, see `EvalContext`.

    Rows are padded to what the mesh divides, and the padding is cut off again. The
    parameters of the last call stay on the devices.
    """
    batch, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    call = jax.jit(
        lambda function, params, x: function(params, x),
        static_argnums=0,
        out_shardings=everywhere,
    )
    placed: list[Any] = [None, None]

    def apply(function, params, x):
        if placed[0] is not params:
            placed[:] = [params, jax.device_put(params, everywhere)]
        size = _rounded(len(x), mesh)
        padded = x[np.minimum(np.arange(size), len(x) - 1)] if size != len(x) else x
        with multihost.together("a batch of features", timeout):
            found = jax.device_get(call(function, placed[1], _split(padded, batch)))
        return jax.tree.map(lambda rows: rows[: len(x)], found)

    return apply


def make_loss(experiment: Experiment, mesh) -> Callable:
    """Returns `loss(params, batch, index) -> Metrics`, jitted: the loss of phase 0.

    Every process gets the whole result.
    """
    name = experiment.objective.phase(0)
    phase = experiment.objective.phases[name]

    def loss(params, batch, index):
        if experiment.teacher is not None:
            raise ValueError(
                "the loss of the objective "
                f"'{experiment.config['objective']['name']}' needs its teacher; leave "
                "out the evaluators that ask for it, such as 'denoising_loss'."
            )
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


def make_room(mesh, timeout: float) -> Room:
    """Returns what feature networks are loaded with; see `features/base.py`."""

    def restored(folder: pathlib.Path, step: int | None):
        built = experiment_lib.of_run(folder, "run")
        checkpoints = Checkpoints(folder)
        steps = checkpoints.steps()
        if step is not None and step not in steps:
            raise ValueError(
                f"step: no checkpoint of step {step} in '{folder}'; there are: {steps}."
            )
        newest = steps[-1] if step is None else step
        chosen = multihost.all_of("which checkpoint", newest, timeout)[0]
        average = restore.default_ema(built)
        params = restore.restore(built, checkpoints, chosen, average, mesh)
        about = {
            "network": built.config["networks"],
            "shape": list(built.spec.shape),
            "weights": digest(params),
            "step": chosen,
            "ema": average,
        }
        return built, params, about

    def open_run(folder: pathlib.Path, step: int | None):
        built, params, about = restored(folder, step)
        return params, built.objective.features, about

    def open_language_model(folder: pathlib.Path, step: int | None):
        built, params, about = restored(folder, step)
        params = jax.tree.map(to_numpy, params)
        return params, built.objective.token_log_probs, built.train_source, about

    return Room(cache_folder(), open_run, timeout, open_language_model)


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    """A number of each leaf that any change of a bit or of places changes.

    Sums of integers modulo 2^32: the same however the leaf is divided over devices.
    """

    def checksum(leaf):
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        place = jnp.uint32(1)
        for axis, size in enumerate(bits.shape):
            along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            place = place * jnp.uint32(size) + along
        # Odd factors: multiplication by one of them loses nothing.
        odd = (jnp.uint32(2654435761) * place) | jnp.uint32(1)
        return jnp.sum(bits * odd, dtype=jnp.uint32)

    return [checksum(leaf) for leaf in leaves]


def digest(params: Any) -> str:
    """Returns 64 hex digits of all parameters, whatever the mesh they lie on."""
    found = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get(_checksums([leaf for _, leaf in found]))
    text = [
        f"{path_name(path)} {leaf.shape} {int(number)}"
        for (path, leaf), number in zip(found, sums, strict=True)
    ]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def labels_in_turn(experiment: Experiment, indices, label: int | None = None):
    """Returns `label` for every sample, or without it the classes in turn."""
    indices = np.asarray(indices)
    if label is not None:
        return np.full_like(indices, label)
    return indices % max(experiment.spec.num_classes, 1)


def sampler_record(experiment: Experiment) -> Mapping[str, Any]:
    """What of the config decides how samples are drawn."""
    return {k: experiment.config[k] for k in ("sampler", "guidance")}
