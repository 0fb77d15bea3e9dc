"""The books of one run, which has the methods of those of a sweep."""

from __future__ import annotations

import pathlib

from launch import definition
from launch.sweep import Sweep
from launch.trial import Trial, is_cancelled, mark_cancelled


class Single:
    """The books of one run: its directory is the trial's own.

    Args:
      folder: the run directory, with a trial.json; also that of a trial of a sweep.
    """

    is_search = False

    def __init__(self, folder: pathlib.Path):
        self.folder = folder.resolve()
        self._trial = Trial(self.folder)
        self.asked = asked = self._trial.asked()
        if "sweep" in asked:
            self.asked = {
                **definition.read_sweep(pathlib.Path(asked["sweep"])),
                **asked,
            }
        self.max_parallel, self.max_failures = 1, self.asked["max_failures"]
        self._closed = False

    def is_cancelled(self) -> bool:
        return is_cancelled(self._trial)

    def cancel(self) -> None:
        mark_cancelled(self._trial)

    def trials(self) -> list[Trial]:
        return [] if self._closed else [self._trial]

    def everything(self) -> list[Trial]:
        return [self._trial]

    def waiting(self) -> int:
        return 0

    def points_to_begin(self) -> list:
        return []

    def more(self, count: int) -> list[Trial]:
        return []

    def close(self, trial: Trial, state: str) -> str:
        self._closed = True
        return ""

    def is_hopeless(self, trial: Trial) -> bool:
        return False

    def retry(self, given_up: bool) -> list[str]:
        """A run that the user starts again has its whole allowance again."""
        events = self._trial.events()
        if events and events[-1]["event"] != "retry" and self._trial.result() is None:
            self._trial.record("retry")
        return []

    def enqueue(self) -> int:
        return 0

    def is_complete(self) -> bool:
        return self._closed


def open_books(folder: pathlib.Path) -> Sweep | Single:
    """Returns the books of a directory of the launcher.

    Raises:
      FileNotFoundError: it is none.
    """
    return Sweep(folder) if definition.is_sweep(folder) else Single(folder)
