"""A tree of arrays in a folder of its own, written once; any mesh can read it."""

from __future__ import annotations

import pathlib
from typing import Any

import orbax.checkpoint as ocp

from diffusionlab.workdir import WorkdirError


def write(folder: pathlib.Path, tree: Any) -> None:
    """Writes arrays; all processes together.

    Raises:
      WorkdirError: it cannot be written.
    """
    try:
        # The asynchronous one leaves threads behind that keep the program from ending.
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
            writer.save(folder.resolve(), args=ocp.args.StandardSave(tree))
    # The library passes on errors of many kinds from its own back ends.
    except Exception as error:
        raise WorkdirError(
            f"{folder}: cannot be written: {_first_line(error)}."
        ) from error


def read(folder: pathlib.Path, tree: Any) -> Any:
    """Returns what `write` wrote.

    Args:
      folder: of `write`.
      tree: shapes with shardings, which need not be those of the write.

    Raises:
      WorkdirError: it cannot be read.
    """
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            wanted = ocp.args.StandardRestore(tree)
            return reader.restore(folder.resolve(), args=wanted)
    # As above.
    except Exception as error:
        raise WorkdirError(
            f"{folder}: cannot be read: {_first_line(error)}; it belongs to its run: "
            "mend it, or give another --workdir."
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(".")
