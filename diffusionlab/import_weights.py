"""mode=import: weights from elsewhere become a run, which can be sampled or distilled.

The run directory is that of any run before its first step: `config.json`, and a
checkpoint of step 0 whose parameters and averages are the file's. Besides it has

    weights.json   the file, its SHA-256, the architecture, what was left out

The network, the process and the shape of the data are the config's; nothing in a file
of weights says how its network was trained. Everything is checked before anything is
written.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffusionlab import compiled, machine, multihost, sharding, train, workdir
from diffusionlab import experiment as experiment_lib
from diffusionlab import state as state_lib
from diffusionlab.checkpoint import Checkpoints
from diffusionlab.experiment import Experiment
from diffusionlab.features import weights
from diffusionlab.models import imports
from diffusionlab.types import path_name

RECORD = "weights.json"


def import_weights(
    config: Mapping[str, Any],
    folder: pathlib.Path,
    file: str,
    asked: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Makes a run of a file of weights; returns its directory.

    Args:
      config: resolved; its objective samples from one network.
      folder: the run directory, with nothing in it yet.
      file: .safetensors, .npz, .pth, .pt or .bin.
      asked: config file and overrides, for the record.

    Raises:
      ValueError: the file has not the weights of this network; names the first that is
        missing, too many or of another shape, and how many there are.
      FileNotFoundError: there is no file.
      WorkdirError: the directory holds a run.
    """
    _check_empty(folder, config)
    experiment = experiment_lib.build(config)
    role, name = _target(experiment)
    arrays, digest = weights.read(file, "--weights")
    block = config["networks"][name]
    shapes = state_lib.abstract_params(experiment)[role]
    wanted = {
        path_name(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    entries = imports.of(block["name"]).entries(
        block, experiment.spec, {n: a.shape for n, a in arrays.items()}
    )
    check(arrays, entries, file)
    found = convert(arrays, entries, wanted)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: found[path_name(path)], shapes
    )
    record = {
        "file": str(pathlib.Path(file).resolve()),
        "sha256": digest,
        "architecture": block["name"],
        "parameters": int(sum(a.size for a in found.values())),
    }
    _write(experiment, folder, role, params, record, asked or {})
    print(f"{record['parameters']:,} parameters of {file} ({digest[:12]})", flush=True)
    return folder


def _check_empty(folder: pathlib.Path, config: Mapping[str, Any]) -> None:
    if workdir.saved_steps(folder):
        raise workdir.WorkdirError(
            f"--workdir: '{folder}' holds a run with checkpoints already; give another."
        )
    workdir.check(folder, config, "auto")


def _target(experiment: Experiment) -> tuple[str, str]:
    """Returns the role that takes the weights, and its network."""
    objective = experiment.objective
    roles = getattr(objective, "samples_from", ())
    name = experiment.config["objective"]["name"]
    if len(roles) != 1 or experiment.teacher is not None:
        raise ValueError(
            f"config.objective: '{name}' has not one network that weights could be "
            "for; take 'denoising'."
        )
    network = objective.roles[roles[0]].network
    try:
        imports.of(experiment.config["networks"][network]["name"])
    except ValueError as error:
        raise ValueError(f"config.networks.{network}.name: {error}.") from None
    return roles[0], network


def check(
    arrays: Mapping[str, np.ndarray], entries: Mapping[str, imports.Entry], file: str
) -> None:
    """Checks a file against the names of an architecture.

    Raises:
      ValueError: one line that names the first array that is missing, unknown, of
        another shape, not finite or another constant, and how many of them there are.
    """
    missing = [n for n, e in entries.items() if n not in arrays and not e.optional]
    unknown = [n for n in arrays if n not in entries]
    both = [n for n in arrays if n in entries]
    other = [n for n in both if arrays[n].shape != entries[n].shape]
    if missing or unknown or other:
        said = [
            f"{len(names)} {what} (the first is {describe(names[0])})"
            for names, what, describe in (
                (missing, "missing", lambda n: f"'{n}' {list(entries[n].shape)}"),
                (unknown, "unknown", lambda n: f"'{n}' {list(arrays[n].shape)}"),
                (
                    other,
                    "of another shape",
                    lambda n: (
                        f"'{n}' {list(arrays[n].shape)}, here {list(entries[n].shape)}"
                    ),
                ),
            )
            if names
        ]
        raise ValueError(
            f"--weights: {file} has not the arrays of this network: "
            f"{'; '.join(said)}. Its sizes are those of config.networks and the data."
        )
    for name in both:
        _check_values(name, arrays[name], entries[name], file)


def _check_values(name, array, entry, file) -> None:
    if not np.all(np.isfinite(array)):
        raise ValueError(f"--weights: {file}: '{name}' has values that are not finite.")
    if entry.equals is not None and np.abs(array - entry.equals).max() > 1e-4:
        raise ValueError(
            f"--weights: {file}: '{name}' is not the constant that this network has in "
            "its place."
        )


def convert(
    arrays: Mapping[str, np.ndarray],
    entries: Mapping[str, imports.Entry],
    wanted: Mapping[str, tuple[int, ...]],
) -> dict[str, np.ndarray]:
    """Returns float32 parameters by path.

    Args:
      arrays: checked by `check`.
      entries: of the architecture.
      wanted: path -> shape of every parameter of the network.

    Raises:
      ValueError: the network has a parameter, of this shape, that no array is for.
    """
    found: dict[str, np.ndarray] = {}
    left = {path: int(np.prod(shape)) for path, shape in wanted.items()}
    for name, entry in entries.items():
        for path, change in entry.put.items() if name in arrays else ():
            value = np.asarray(change(arrays[name]), np.float32)
            shape = wanted.get(path)
            if shape is None or value.shape != shape[entry.layer is not None :]:
                raise ValueError(
                    f"config.networks: the network has {shape} at '{path}', for which "
                    f"'{name}' gives {value.shape}."
                )
            if entry.layer is None:
                found[path] = value
            else:
                found.setdefault(path, np.zeros(shape, np.float32))[entry.layer] = value
            left[path] -= value.size
    if rest := [path for path, number in left.items() if number]:
        raise ValueError(
            f"config.networks: {len(rest)} parameters of the network have no array in "
            f"such a file (the first is '{rest[0]}'); leave out what the published "
            "network has not."
        )
    return found


def _write(experiment, folder, role, params, record, asked) -> None:
    mesh, config = sharding.make_mesh(experiment.mesh), experiment.config
    timeout = experiment.checkpoint.barrier_timeout
    multihost.barrier("check the run directory", timeout)
    with contextlib.ExitStack() as held, jax.set_mesh(mesh):
        state = _state(experiment, mesh, role, params)
        steps = compiled.Steps(experiment, mesh)

        def claim():
            held.enter_context(workdir.lock(folder))
            _check_empty(folder, config)
            workdir.claim(folder, config, asked, machine.environment())
            workdir.write_json(folder / RECORD, record)

        multihost.on_main("claim the run directory", claim, timeout)
        data = train.make_batches(experiment, mesh, experiment.train_source)
        checkpoints = Checkpoints(folder, experiment.checkpoint)
        meta = {
            "step": 0,
            "hooks_done": False,
            "process_count": jax.process_count(),
            "versions": machine.versions(),
        }
        checkpoints.save(0, state, steps.empty(), data.get_state(), meta)
        checkpoints.wait()
        checkpoints.close()
        data.close()


def _state(experiment, mesh, role, params) -> state_lib.TrainState:
    """The state before the first step, with these parameters and averages of them."""
    state, where = (
        make(experiment, mesh) for make in (state_lib.init, state_lib.shardings)
    )
    put = lambda: jax.device_put(params, where.params[role])  # noqa: E731
    ema = {
        name: {r: put() if r == role else tree for r, tree in by_role.items()}
        for name, by_role in state.ema.items()
    }
    return state.replace(params={**state.params, role: put()}, ema=ema)
