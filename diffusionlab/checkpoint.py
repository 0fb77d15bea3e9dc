"""Checkpoints: asynchronous, sharded, restorable onto another mesh, whole or in part.

A checkpoint holds `state` (parameters, optimisers, averages), `gathered` (the metrics
since the last row of metrics.jsonl), `data` (the position in the data) and
`meta`. A checkpoint that was never finished is not one; one that cannot be read is
named, and nothing falls back to another unless told so.
"""

from __future__ import annotations

import logging
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from diffusionlab.settings import Checkpoint
from diffusionlab.state import TrainState

# What goes wrong is raised: these would tell it a hundred times over.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _without_echoes(found, pass_on=sys.unraisablehook) -> None:
    """Drops what the library's threads still print of an error that we raise."""
    code = getattr(found.object, "cr_code", None)
    of_library = code is not None and "orbax" in code.co_filename
    if not of_library and str(found.exc_value) != "Event loop is closed":
        pass_on(found)


sys.unraisablehook = _without_echoes


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says which and what to do."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: the run directory.
      settings: how many to keep; None opens them for reading only.
    """

    def __init__(self, workdir: pathlib.Path, settings: Checkpoint | None = None):
        self.folder = pathlib.Path(workdir).resolve() / "checkpoints"
        if settings is None and not self.folder.is_dir():
            raise FileNotFoundError(
                f"{self.folder}: this run has no checkpoints yet; train it first."
            )
        self._saving: int | None = None
        timeout = settings.barrier_timeout if settings else 600
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=settings.keep if settings else None,
                keep_period=(settings.keep_every or None) if settings else None,
                read_only=settings is None,
                cleanup_tmp_directories=settings is not None,
                async_options=ocp.AsyncOptions(timeout_secs=timeout),
            ),
        )

    def steps(self) -> list[int]:
        """Returns the steps of all finished checkpoints, oldest first."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def path(self, step: int) -> pathlib.Path:
        """Returns the folder of the checkpoint of a step."""
        return self.folder / str(step)

    def save(
        self,
        step: int,
        state: TrainState,
        gathered: Mapping[str, Any],
        data: Mapping[str, Any],
        meta: Mapping[str, Any],
    ) -> None:
        """Starts to save; returns as soon as the arrays are copied from the devices.

        Raises:
          CheckpointError: this or an earlier save could not be written.
        """
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_as_dict(state)),
            gathered=ocp.args.PyTreeSave(dict(gathered)),
            data=ocp.args.JsonSave(dict(data)),
            meta=ocp.args.JsonSave(dict(meta)),
        )
        # The library would raise an error of the save before as one of this.
        self.wait()
        self._saving = step
        with self._writing(step):
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Waits until the last save is on the disk.

        Raises:
          CheckpointError: it could not be written.
        """
        with self._writing(self._saving):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        self._manager.close()

    def _writing(self, step: int | None) -> _Wrapped:
        return _Wrapped(
            f"{self.folder}: checkpoint {step} could not be written",
            "The checkpoints before it are whole: free space or mend the disk, and run "
            "the same command again",
        )

    def _reading(self, step: int) -> _Wrapped:
        older = [s for s in self._manager.all_steps() if s < step]
        hint = (
            f"The one before it is of step {max(older)}: --resume=newest_whole goes on "
            "from the newest that can be read"
            if older
            else "There is none before it"
        )
        return _Wrapped(f"{self.path(step)}: this checkpoint is damaged", hint)

    def restore(
        self, step: int, state: TrainState, gathered: Mapping[str, Any]
    ) -> tuple[TrainState, dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Restores a whole checkpoint.

        Args:
          step: of the checkpoint.
          state, gathered: shapes with shardings, which need not be those of the save.

        Returns:
          state, gathered, data, meta.

        Raises:
          CheckpointError: it is damaged.
        """
        with self._reading(step):
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=_restore_args(_as_dict(state)),
                    gathered=_restore_args(dict(gathered)),
                    data=ocp.args.JsonRestore(),
                    meta=ocp.args.JsonRestore(),
                ),
            )
        restored = TrainState(**found["state"])
        return restored, found["gathered"], found["data"], found["meta"]

    def restore_part(self, step: int, part: Mapping[str, Any]) -> dict[str, Any]:
        """Restores some of the state and reads nothing else.

        Args:
          step: of the checkpoint.
          part: a part of the nested dictionary of the state, for example
            `{'ema': {'main': {'denoiser': shapes}}}`.

        Raises:
          CheckpointError: it is damaged.
        """
        with self._reading(step):
            args = ocp.args.Composite(state=_restore_args(part, partial=True))
            return self._manager.restore(step, args=args)["state"]

    def set_aside(self, step: int) -> pathlib.Path:
        """Moves a damaged checkpoint out of the way, and returns where it lies now."""
        kept = self.folder.parent / "damaged" / str(step)
        if jax.process_index() == 0:
            kept.parent.mkdir(exist_ok=True)
            while kept.exists():
                kept = kept.with_name(kept.name + "_again")
            os.replace(self.path(step), kept)
        self._manager.reload()
        return kept


class _Wrapped:
    """Turns whatever a storage library raises into one line about a checkpoint."""

    def __init__(self, what: str, hint: str):
        self.what, self.hint = what, hint

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # The library passes on errors of many kinds from its own back ends.
        if isinstance(error, Exception):
            cause = str(error).strip().splitlines() or [kind.__name__]
            raise CheckpointError(
                f"{self.what}: {cause[0][:300]}. {self.hint}."
            ) from error


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "params": state.params,
        "opt_state": state.opt_state,
        "ema": state.ema,
    }


def _restore_args(tree: Any, partial: bool = False) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(
        item=tree,
        restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
        partial_restore=partial,
    )
