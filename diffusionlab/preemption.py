"""SIGTERM: a run saves and stops, to be started again."""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading

import jax

from diffusionlab import multihost

PREEMPTED = 75
"""Exit status: stopped by SIGTERM, saved, to be started again."""


@dataclasses.dataclass
class Preemption:
    """Notices SIGTERM; with several processes all of them agree on the step."""

    timeout: float
    asked: bool = False

    def __post_init__(self):
        # With several processes JAX's own notifier listens, and agrees on a step.
        main_thread = threading.current_thread() is threading.main_thread()
        self._listens = jax.process_count() == 1 and main_thread
        if self._listens:
            signal.signal(signal.SIGTERM, self._notice)

    def _notice(self, *_) -> None:
        self.asked = True

    def reached(self, step: int) -> bool:
        """Whether to save and stop before step `step`."""
        if jax.process_count() == 1:
            return self.asked
        from jax.experimental import multihost_utils

        with multihost.together(f"whether to stop at step {step}", self.timeout):
            return multihost_utils.reached_preemption_sync_point(step)

    def nothing_to_save(self) -> None:
        """From here on SIGTERM ends the process at once, to be started again."""
        if self._listens:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))
