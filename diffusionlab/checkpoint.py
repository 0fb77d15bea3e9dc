"""Checkpoints: asynchronous, sharded, restorable onto another mesh, whole or in part.

A checkpoint holds `state` (parameters, optimisers, averages), `gathered` (the metrics
since the last row of metrics.jsonl), `data` (the position in the data) and
`meta`. A checkpoint that was never finished is not one; one that is damaged or cannot
be read is named, and nothing falls back to another unless told so. Processes that
restore together succeed or fail together.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as rules

from diffusionlab import multihost
from diffusionlab.best import Best
from diffusionlab.settings import Checkpoint
from diffusionlab.state import TrainState

# What goes wrong is raised: these would tell it a hundred times over.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)

# Replicas share the writing of an array if each has at least this much of it. The
# programs that cut every small array on every device are most of a first save, and gain
# nothing.
_SHARED_BYTES = 2**20
ocp.type_handlers.register_type_handler(
    jax.Array,
    ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SHARED_BYTES),
    override=True,
)


def _without_echoes(found, pass_on=sys.unraisablehook) -> None:
    """Drops what the library's threads still print of an error that we raise."""
    code = getattr(found.object, "cr_code", None)
    of_library = code is not None and "orbax" in code.co_filename
    if not of_library and str(found.exc_value) != "Event loop is closed":
        pass_on(found)


sys.unraisablehook = _without_echoes


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says which and what to do."""


class DamagedError(CheckpointError):
    """Its files are incomplete or corrupt: it will never be read."""


# How TensorStore begins its messages about data that are missing or fail their check
# sums. A disk, a network or a memory that fails has other words.
_BAD_DATA = re.compile(r"(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND|FAILED_PRECONDITION)\b")
_BAD_FILES = (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError)


def _is_damage(error: BaseException) -> bool:
    """Whether the cause of an error while reading lies in the checkpoint itself."""
    damage = False
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _BAD_FILES) or _BAD_DATA.match(str(cause)):
            damage = True
        elif isinstance(cause, OSError | MemoryError | jax.errors.JaxRuntimeError):
            return False
        cause = cause.__cause__ or cause.__context__
    return damage


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
        self._timeout = timeout = settings.barrier_timeout if settings else 600
        self._rule = None
        if settings is not None:
            self.best = Best(self.folder.parent, settings)
            self._rule = _rule(settings, self.best)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._rule,
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
        with _writing(self.folder, step):
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Waits until the last save is on the disk.

        Raises:
          CheckpointError: it could not be written.
        """
        with _writing(self.folder, self._saving):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def meet(self, where: str) -> None:
        """Waits for all processes without the devices, where some may be at others."""
        meet = ocp.multihost.get_barrier_sync_fn()
        meet(key=where, timeout_ms=self._timeout * 1000)

    def close(self) -> None:
        self._manager.close()

    def judge(
        self, step: int, labels: Collection[str], numbers: Mapping[str, float]
    ) -> None:
        """Takes what evaluators found, see `Best.offer`.

        Where that comes after the save, as at the last step, the checkpoint that is
        not the best any more goes now, unless it stays for another reason.

        Raises:
          ValueError: the evaluator gave no such number.
        """
        before = self.best.step
        self.best.offer(step, labels, numbers)
        saved = self._manager.all_steps()
        if step not in saved or before not in saved:
            return
        found = [SimpleNamespace(step=one) for one in sorted(saved)]
        kept = self._rule.should_preserve(found, context=None)
        if not dict(zip(sorted(saved), kept, strict=True))[before]:
            self._manager.delete(before)

    def _read(self, step: int, items: tuple[str, ...], read: Callable[[], Any]) -> Any:
        """Returns `read()` if every process can read the checkpoint.

        Raises:
          DamagedError: it is damaged for one of them, and no other error was met.
          CheckpointError: it could not be read, for another reason.
        """
        found, error = None, None
        try:
            for item in items:
                # Without it the library takes the arrays for other ones.
                kept = "metadata" if item in ("data", "meta") else "_METADATA"
                (self.path(step) / item / kept).stat()
            found = read()
        # The library passes on errors of many kinds from its own back ends.
        except Exception as raised:
            error = raised
        kind = 0 if error is None else 1 if _is_damage(error) else 2
        kinds = multihost.all_of(f"who can read step {step}", kind, self._timeout)
        # Where only some fail, the others may wait in the library, until the limit.
        worst = max(kind, *kinds)
        if worst == 0:
            return found
        if error is None:
            cause = f"process {kinds.index(worst)} failed, and says why"
        else:
            cause = _first_line(error)
        if worst == 1:
            raise DamagedError(
                f"{self.path(step)}: this checkpoint is damaged: {cause}. "
                f"{self._older(step)}."
            ) from error
        raise CheckpointError(
            f"{self.path(step)}: this checkpoint could not be read: {cause}. It may be "
            "whole, and stays where it is: mend the cause and run the same command "
            "again."
        ) from error

    def _older(self, step: int) -> str:
        older = [s for s in self._manager.all_steps() if s < step]
        if not older:
            return "There is none before it"
        return (
            f"The one before it is of step {max(older)}: --resume=newest_whole goes on "
            "from the newest that can be read"
        )

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
          DamagedError: it is damaged.
          CheckpointError: it could not be read.
        """
        args = ocp.args.Composite(
            state=_restore_args(_as_dict(state)),
            gathered=_restore_args(dict(gathered)),
            data=ocp.args.JsonRestore(),
            meta=ocp.args.JsonRestore(),
        )
        found = self._read(
            step, tuple(args), lambda: self._manager.restore(step, args=args)
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
          DamagedError: it is damaged.
          CheckpointError: it could not be read.
        """
        args = ocp.args.Composite(state=_restore_args(part, partial=True))
        read = lambda: self._manager.restore(step, args=args)["state"]  # noqa: E731
        return self._read(step, tuple(args), read)

    def set_aside(self, step: int) -> pathlib.Path:
        """Moves a damaged checkpoint out of the way, and returns where it lies now."""
        kept = self.folder.parent / "damaged" / str(step)
        multihost.barrier(f"set step {step} aside", self._timeout)
        if jax.process_index() == 0:
            kept.parent.mkdir(exist_ok=True)
            while kept.exists():
                kept = kept.with_name(kept.name + "_again")
            os.replace(self.path(step), kept)
        multihost.barrier(f"step {step} was set aside", self._timeout)
        self._manager.reload()
        return kept


def _rule(settings: Checkpoint, best: Best) -> rules.PreservationPolicy:
    """What stays when a checkpoint is saved; decided before the old ones go."""
    kept: list[rules.PreservationPolicy] = [rules.LatestN(settings.keep), best]
    if settings.keep_every:
        kept.append(rules.EveryNSteps(settings.keep_every))
    return rules.AnyPreservationPolicy(kept)


@contextlib.contextmanager
def _writing(folder: pathlib.Path, step: int | None) -> Iterator[None]:
    """Turns whatever a storage library raises into one line about a checkpoint."""
    try:
        yield
    # The library passes on errors of many kinds from its own back ends.
    except Exception as error:
        raise CheckpointError(
            f"{folder}: checkpoint {step} could not be written: {_first_line(error)}. "
            "The checkpoints before it are whole: free space or mend the disk, and run "
            "the same command again."
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


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
