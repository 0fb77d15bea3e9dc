"""Pairs of noise and the teacher's sample, for objectives that learn the map itself.

An objective that asks for `num_pairs` of them trains on these in the place of the data.
They are drawn once, before the first step, with the copy of the teacher that the run
keeps, and lie in `<run>/pairs`:

    about.json   how many, the seed, the sampler, the guidance, a digest of the teacher
    part_*.npy   some of the pairs, until all of them are there
    pairs.npy    float32 `[N, 2, ...]`: the noise, and the sample it becomes

Pair i is a function of (seed, i) alone, and its label is i mod num_classes. The noise
is standard normal: the sampler starts from it times the standard deviation of z_1. A
part is written whole or not at all, so drawing goes on where it was stopped. Like
the checkpoints the folder has to be seen by every process.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlab import checks, inference, keys, multihost, sharding, workdir
from diffusionlab.distillation.base import teach
from diffusionlab.experiment import Experiment
from diffusionlab.samplers import base
from diffusionlab.samplers.inverse import is_deterministic
from diffusionlab.types import DataSpec

FOLDER = "pairs"
PART = 1024
"""Pairs of a part: what a start that is killed loses at most."""


def check(experiment: Experiment) -> None:
    """Checks that the pairs an objective asks for can be drawn.

    Raises:
      ValueError: there is no sampler, it draws noise at its steps or does not suit the
        process; or the data would be augmented, which pairs are not.
    """
    objective = experiment.objective
    if not number(objective):
        return
    path, sampler = "config.objective.sampler", objective.sampler
    if sampler is None:
        raise ValueError(
            f"{path}: missing; give the sampler that solves the teacher's ODE, such as "
            "{'name': 'ddim', 'num_steps': 64}."
        )
    checks.check_sampler(sampler, experiment, path)
    if not is_deterministic(sampler, experiment.process, experiment.spec.shape):
        raise ValueError(
            f"{path}: {type(sampler).__name__} draws fresh noise, so its samples do "
            "not follow from the noise they start from; take a deterministic one, as "
            "'ddim' with eta=0."
        )
    if experiment.augment:
        raise ValueError(
            "config.data.augment: pairs of noise and sample are not augmented; leave "
            "it out."
        )


def number(objective: Any) -> int:
    """Returns how many pairs an objective asks for; 0 is none."""
    return getattr(objective, "num_pairs", 0)


class Pairs:
    """The pairs of a run as a data source: 'x', 'noise', and 'label' with classes.

    Args:
      stored: `[N, 2, ...]`.
      spec: of the samples.
    """

    def __init__(self, stored: np.ndarray, spec: DataSpec):
        self._stored, self.spec = stored, spec

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch = self.__getitems__(np.asarray([index]))
        return {key: value[0] for key, value in batch.items()}

    def __getitems__(self, indices) -> dict[str, np.ndarray]:
        indices = np.asarray(indices)
        rows = self._stored[indices]
        batch = {"x": rows[:, 1], "noise": rows[:, 0]}
        if self.spec.num_classes:
            batch["label"] = (indices % self.spec.num_classes).astype(np.int32)
        return batch


def prepare(
    experiment: Experiment,
    mesh,
    frozen: Mapping[str, Any],
    folder: pathlib.Path,
) -> Pairs:
    """Returns the pairs of a run; draws those that are not there yet.

    All processes call it together, under the mesh.

    Args:
      experiment: its objective asks for pairs.
      mesh: where they are drawn.
      frozen: has the parameters of the teacher, see `teachers.load`.
      folder: of the run.

    Raises:
      WorkdirError: what lies there is damaged, or belongs to other pairs.
    """
    out = folder / FOLDER
    timeout = experiment.checkpoint.barrier_timeout
    multihost.on_main(
        "claim the pairs", lambda: _claim(out, _about(experiment, frozen)), timeout
    )
    if not (out / "pairs.npy").is_file():
        starts = range(0, number(experiment.objective), PART)
        todo = [start for start in starts if not _part(out, start).is_file()]
        # No part is written before each process has seen which are there.
        multihost.barrier("look for pairs", timeout)
        _draw(experiment, mesh, frozen["teacher"], out, todo)
        multihost.on_main("join the pairs", lambda: _join(out, starts), timeout)
    multihost.barrier("all pairs are there", timeout)
    return Pairs(_read(out, experiment), experiment.spec)


def make_draw(experiment: Experiment, mesh) -> Callable[..., np.ndarray]:
    """Returns `draw(params, seed, indices, labels) -> [B, 2, ...]`, compiled once.

    `params` are the teacher's, by role; the guidance is the objective's.
    """
    objective, process = experiment.objective, experiment.process
    shape, batch = experiment.spec.shape, sharding.batch_sharding(mesh)

    def draw(params, seed, indices, labels):
        base_key = keys.key(seed, FOLDER)
        own = jax.vmap(lambda i: jax.random.fold_in(base_key, i))(indices)
        cond = {"label": labels} if experiment.spec.num_classes else {}

        def predict(z_t, t):
            t = jnp.broadcast_to(t, z_t.shape[:1])
            return teach(objective, params, z_t, t, cond)

        # As `base.sample` draws it: use 0 of a sample's key.
        noise = base.normal(base.fold(own, 0), shape)
        x = base.sample(objective.sampler, process, predict, own, shape, noise)
        return jnp.stack([noise, x], axis=1)

    compiled = jax.jit(draw, out_shardings=batch)
    timeout = experiment.checkpoint.barrier_timeout

    def run(params, seed, indices, labels):
        given = [
            jax.make_array_from_callback(a.shape, batch, lambda rows, a=a: a[rows])
            for a in (np.asarray(indices, np.int32), np.asarray(labels, np.int32))
        ]
        with multihost.together("a batch of pairs", timeout):
            return inference.to_numpy(compiled(params, seed, *given))

    return run


def _about(experiment: Experiment, frozen: Mapping[str, Any]) -> dict[str, Any]:
    objective = experiment.objective
    return {
        "num_pairs": number(objective),
        "seed": experiment.seed,
        "shape": list(experiment.spec.shape),
        "num_classes": experiment.spec.num_classes,
        "sampler": experiment.config["objective"]["sampler"],
        "guidance_scale": objective.guidance_scale,
        "teacher": inference.digest(frozen["teacher"]),
    }


def _claim(out: pathlib.Path, about: dict[str, Any]) -> None:
    file = out / "about.json"
    if not file.is_file():
        out.mkdir(parents=True, exist_ok=True)
        workdir.write_json(file, about)
        return
    found = workdir.read_json(file)
    if differing := [name for name in about if found.get(name) != about[name]]:
        raise workdir.WorkdirError(
            f"--workdir: '{out}' holds other pairs (differs in "
            f"{', '.join(differing)}); give another --workdir, or remove that folder."
        )


def _part(out: pathlib.Path, start: int) -> pathlib.Path:
    return out / f"part_{start:08d}.npy"


def _draw(experiment, mesh, params, out, todo) -> None:
    draw, num = make_draw(experiment, mesh), number(experiment.objective)
    size = min(experiment.data.batch_size, PART)
    for start in todo:
        indices = np.arange(start, min(start + PART, num))
        labels = inference.labels_in_turn(experiment, indices)
        found = inference.draw_many(
            draw, mesh, params, experiment.seed, indices, labels, size
        )
        multihost.on_main(
            "write pairs",
            lambda start=start, found=found: _write(_part(out, start), found),
            experiment.checkpoint.barrier_timeout,
        )
        if multihost.is_main():
            print(f"pairs {indices[-1] + 1:,}/{num:,}", flush=True)


def _write(file: pathlib.Path, array: np.ndarray) -> None:
    if not np.all(np.isfinite(array)):
        raise workdir.WorkdirError(
            f"{file}: the teacher's samples are not finite; see "
            "config.objective.sampler and config.objective.guidance_scale."
        )
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with open(temporary, "wb") as opened:
        np.save(opened, array)
    os.replace(temporary, file)


def _join(out: pathlib.Path, starts) -> None:
    """One file out of all parts, without ever holding more than one part."""
    files = [_part(out, start) for start in starts]
    shape = list(_load(files[0]).shape)
    shape[0] = sum(len(_load(file)) for file in files)
    temporary = out / f".pairs.npy.{os.getpid()}"
    joined = np.lib.format.open_memmap(temporary, "w+", np.float32, tuple(shape))
    for start, file in zip(starts, files, strict=True):
        joined[start : start + PART] = _load(file)
    joined.flush()
    os.replace(temporary, out / "pairs.npy")
    for file in files:
        file.unlink()


def _read(out: pathlib.Path, experiment: Experiment) -> np.ndarray:
    stored = _load(out / "pairs.npy")
    shape = (number(experiment.objective), 2, *experiment.spec.shape)
    if stored.shape != shape:
        raise workdir.WorkdirError(
            f"--workdir: '{out / 'pairs.npy'}' has shape {stored.shape}, not {shape}; "
            "remove it to have the pairs drawn again."
        )
    return stored


def _load(file: pathlib.Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise workdir.WorkdirError(
            f"--workdir: '{file}' is damaged ({error}); remove it to have the pairs "
            "drawn again."
        ) from None
