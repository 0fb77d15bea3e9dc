"""The run directory: it belongs to one config, and nothing in it is ever overwritten.

    config.json        the resolved config
    overrides.json     what was asked for: config file, overrides
    environment.json   versions, devices, revision of the code; a list, one per start
    metrics.jsonl      one row per log point
    checkpoints/  samples/  evals/  tensorboard/  report.html

Nothing here imports JAX: a directory of another config is refused at once.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from diffusionlab import config as config_lib


class WorkdirError(RuntimeError):
    """The run directory cannot be used for this; the message says why."""


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the resolved config of a run.

    Raises:
      FileNotFoundError: the directory holds no run.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"--workdir: '{workdir}' holds no run (there is no config.json); train "
            "with --config=... first."
        )
    return json.loads(path.read_text())


def check(workdir: pathlib.Path, config: Mapping[str, Any], resume: str) -> None:
    """Checks that a run of `config` may start or go on here; writes nothing.

    Raises:
      WorkdirError: the directory belongs to another config, holds something else, has
        more steps than the config, or `resume` is 'never' and a run is there.
    """
    if not workdir.exists():
        return
    if not (workdir / "config.json").is_file():
        if any(workdir.iterdir()):
            raise WorkdirError(
                f"--workdir: '{workdir}' is not empty and holds no run; give another."
            )
        return
    if resume == "never":
        raise WorkdirError(
            f"--workdir: '{workdir}' holds a run, and --resume=never does not "
            "continue one; give another directory."
        )
    found = config_lib.conflicts(read_config(workdir), config)
    if found:
        raise WorkdirError(
            f"--workdir: '{workdir}' holds a run of another config; give another "
            "directory, or undo: " + "; ".join(found)
        )
    done = max(_saved_steps(workdir), default=0)
    if done and config["train"]["num_steps"] < done:
        raise WorkdirError(
            f"config.train.num_steps: {config['train']['num_steps']} is less than the "
            f"{done} steps that '{workdir}' has; give {done} or more, or another "
            "directory."
        )


def _saved_steps(workdir: pathlib.Path) -> list[int]:
    """The steps of the checkpoints: folders named by a number are finished ones."""
    return [int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit()]


def claim(
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    asked: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> None:
    """Writes the records of this start; an earlier config is kept beside the new one.

    Args:
      workdir: checked by `check`.
      config: the resolved config.
      asked: config file and overrides of this start.
      environment: see `machine.environment`.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    old = json.loads(path.read_text()) if path.is_file() else None
    if old is not None and old != config:
        number = len(list(workdir.glob("config.*.json")))
        write_json(workdir / f"config.{number}.json", old)
    if old != config:
        write_json(path, config)
    for name, record in (("overrides", asked), ("environment", environment)):
        file = workdir / f"{name}.json"
        records = json.loads(file.read_text()) if file.is_file() else []
        write_json(file, [*records, record])


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(part, path)
