"""The best checkpoint: which step it is, kept on disk and among the checkpoints."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from diffusionlab import multihost, workdir
from diffusionlab.settings import Checkpoint


class Best:
    """Which step has the best value so far, and best.json, which says so.

    Process 0 compares and writes, and the others take its answer: what is kept is
    decided alike, whatever the last bits of a number are elsewhere.

    Args:
      folder: the run directory.
      settings: name the number.
    """

    def __init__(self, folder: pathlib.Path, settings: Checkpoint):
        self.step: int | None = None
        self._value: float | None = None
        self._path, self._settings = folder / workdir.BEST_FILE, settings

    def look(self, last: int) -> None:
        """Finds the best among the checkpoints that are there, up to step `last`.

        A start that goes on from an earlier checkpoint, or with another number to look
        at, thus names nothing that is gone.
        """
        metric, mode = self._settings.best, self._settings.best_mode
        if multihost.is_main():
            found = None
            if metric:
                found = workdir.find_best(self._path.parent, metric, mode, last)
            self._take(found)
        if metric:
            self._agree()

    def offer(
        self, step: int, labels: Collection[str], numbers: Mapping[str, float]
    ) -> None:
        """Takes what the evaluators `labels` found at a step; `numbers` by full name.

        Raises:
          ValueError: the evaluator gave no such number; names those that it gave.
        """
        metric, mode = self._settings.best, self._settings.best_mode
        label, _, number = metric.partition("/")
        if not metric or label not in labels:
            return
        if f"eval/{metric}" not in numbers:
            start = f"eval/{label}/"
            given = [n.removeprefix(start) for n in numbers if n.startswith(start)]
            raise ValueError(
                f"config.checkpoint.best: the evaluator '{label}' gave no number "
                f"'{number}' at step {step}; it gave: {', '.join(given) or 'none'}."
            )
        value = float(numbers[f"eval/{metric}"])
        if multihost.is_main() and workdir.is_better(value, self._value, mode):
            record = {"metric": metric, "mode": mode, "step": step, "value": value}
            self._take(record)
        self._agree()

    def _take(self, record: Mapping[str, Any] | None) -> None:
        self.step = record["step"] if record else None
        self._value = record["value"] if record else None
        if record:
            workdir.write_json(self._path, record)
        else:
            self._path.unlink(missing_ok=True)

    def _agree(self) -> None:
        number = -1 if self.step is None else self.step
        timeout = self._settings.barrier_timeout
        agreed = multihost.all_of("which step is the best", number, timeout)[0]
        self.step = None if agreed < 0 else agreed

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """A rule of the library: the best one stays."""
        return [checkpoint.step == self.step for checkpoint in checkpoints]
