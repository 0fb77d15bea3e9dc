"""A config takes from its teacher's run what it does not say itself.

The whole config of that run goes into `config.teacher.config`, so that the config of a
student says all there is to know. Nothing here imports JAX.
"""

from __future__ import annotations

import pathlib
from typing import Any

import ml_collections

from diffusionlab import config as config_lib
from diffusionlab import workdir

NETWORK = "denoiser"
"""The network that students and their auxiliary networks share."""


def inherit(config: ml_collections.ConfigDict) -> None:
    """Fills in process, data and network of a config with a teacher, in place.

      teacher.config   the config of the run `teacher.run`
      process          the teacher's
      data.source      the teacher's
      networks         the `denoiser` of the run the student starts from; a block
                       without a name is what differs from it

    Raises:
      FileNotFoundError: there is no such run, or none with a checkpoint.
      ValueError: the other run has no network 'denoiser'.
    """
    run = config.get("teacher", {}).get("run", "")
    if not run:
        if "teacher" in config and "process" not in config:
            raise ValueError(
                "config.teacher: missing; give the directory of a trained run, "
                "--config.teacher=runs/teacher."
            )
        return
    teacher = read(run, "config.teacher.run")
    start = config.teacher.get("start", "")
    origin, path = teacher, "config.teacher.run"
    if start not in ("", "random"):
        path = "config.teacher.start"
        origin = read(start, path)
    with config.unlocked():
        config.teacher.config = ml_collections.ConfigDict(teacher)
        if "process" not in config:
            config.process = ml_collections.ConfigDict(teacher["process"])
        if "source" not in config.data:
            config.data.source = ml_collections.ConfigDict(teacher["data"]["source"])
        if "networks" not in config:
            config.networks = ml_collections.ConfigDict()
        own = config.networks.get(NETWORK, {})
        if "name" not in own:
            if NETWORK not in origin["networks"]:
                raise ValueError(
                    f"{path}: '{start or run}' has no network '{NETWORK}' to start "
                    f"from; it has: {', '.join(origin['networks'])}."
                )
            block = {**origin["networks"][NETWORK], **dict(own)}
            config.networks[NETWORK] = ml_collections.ConfigDict(block)


def read(run: str, path: str) -> dict[str, Any]:
    """Returns the config of a run that has a checkpoint.

    Args:
      run: its directory.
      path: of the key that names it, for messages.

    Raises:
      FileNotFoundError: there is no run, or none with a checkpoint.
    """
    folder = pathlib.Path(run)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{path}: '{run}' holds no run (there is no config.json); give the "
            "directory of a trained one."
        )
    if not workdir.saved_steps(folder):
        raise FileNotFoundError(
            f"{path}: the run in '{run}' has no checkpoint yet; train it first."
        )
    return config_lib.completed(workdir.read_config(folder))
