"""A config takes from its teacher's run what it does not say itself.

The whole config of that run goes into `config.teacher.config`, so that the config of a
student says all there is to know. Nothing here imports JAX.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from diffusionlab import config as config_lib
from diffusionlab import workdir

NETWORK = "denoiser"
"""The network that students and their auxiliary networks share."""


_INHERITED = ("process", "data.source", f"networks.{NETWORK}")


def override(
    config: ml_collections.ConfigDict,
    assignments: Iterable[str],
    folder: pathlib.Path | None = None,
    stored: Mapping[str, Any] | None = None,
) -> None:
    """Applies 'a.b.c=value' in place, and inherits; see `config.override`, `inherit`.

    What a key is inside of may be inherited: such a key is set afterwards.

    Args:
      config: of a config file.
      assignments: overrides.
      folder: the run directory, if there is one: where the teacher's has gone, what a
        run there inherited from it still counts.
      stored: in place of that, the config that a run there would have.
    """
    later = []
    for assignment in assignments:
        if _is_inherited(config, assignment.partition("=")[0]):
            later.append(assignment)
        else:
            config_lib.override(config, [assignment])
    if stored is None and folder and (folder / "config.json").is_file():
        stored = workdir.read_config(folder)
    inherit(config, stored)
    config_lib.override(config, later)


def _is_inherited(config: ml_collections.ConfigDict, path: str) -> bool:
    """Whether a key is inside of a block that is not there, or not yet whole."""
    for name in _INHERITED:
        if path.startswith(f"{name}."):
            block = config
            for key in name.split("."):
                block = block.get(key, {}) if hasattr(block, "get") else {}
            return "name" not in block
    return False


def inherit(
    config: ml_collections.ConfigDict, stored: Mapping[str, Any] | None = None
) -> None:
    """Fills in process, data and network of a config with a teacher, in place.

      teacher.config   the config of the run `teacher.run`
      process          the teacher's
      data.source      the teacher's
      networks         the `denoiser` of the run the student starts from; a block
                       without a name is what differs from it, and its `conditions`
                       come after those that are there

    Args:
      config: of a student, or of a run without a teacher, which stays as it is.
      stored: config of a run that inherited before: it stands in for the directories
        that it names, where they have gone.

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
    teacher = _read_or_stored("run", run, stored or {})
    start = config.teacher.get("start", "")
    origin, path = teacher, "config.teacher.run"
    if start not in ("", "random"):
        path = "config.teacher.start"
        origin = _read_or_stored("start", start, stored or {})
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
            theirs = origin["networks"][NETWORK]
            block = {**theirs, **dict(own)}
            if "conditions" in own:
                both = [*theirs.get("conditions", ()), *own["conditions"]]
                block["conditions"] = tuple(dict.fromkeys(both))
            config.networks[NETWORK] = ml_collections.ConfigDict(block)


def _read_or_stored(key: str, run: str, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of the run `teacher.KEY`, or what is stored of it."""
    try:
        return read(run, f"config.teacher.{key}")
    except FileNotFoundError:
        block = stored.get("teacher", {})
        if block.get(key) != run:
            raise
        if key == "start":
            return {"networks": stored["networks"]}
        return config_lib.completed(block["config"])


def read(run: str, path: str) -> dict[str, Any]:
    """Returns the config of a run that has a checkpoint.

    Args:
      run: its directory.
      path: of the key that names it, for messages.

    Raises:
      FileNotFoundError: there is no run, or none with a checkpoint.
    """
    return config_lib.completed(workdir.read_config(workdir.find_run(run, path)))
