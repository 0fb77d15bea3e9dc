"""The progress line: loss, speed, waiting, utilisation, next checkpoint, ETA.

On a terminal one line is rewritten in place; elsewhere each is a line of its own.

Utilisation is FLOPs per step / (seconds per step x devices x FLOP/s of a device), where
the FLOPs are those of `flops.count` without rematerialisation, and the rate is the one
measured in this process by `machine.matrix_rate` and, where known, the data sheet's.
"""

from __future__ import annotations

import sys
import time


def duration(seconds: float) -> str:
    """'1:02:03', '2:03' or '4 s'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Clock:
    """Measures the stretch between two log points.

    Args:
      start_step, num_steps: of this start, and the last of the run.
      batch_size: examples per step.
      flops: FLOPs per step.
      rates: name -> FLOP/s of all devices.
    """

    def __init__(self, start_step, num_steps, batch_size, flops, rates):
        self.num_steps = num_steps
        self._batch_size, self._flops, self._rates = batch_size, flops, rates
        self._step = start_step
        self._time = time.perf_counter()
        self._waited = 0.0
        self._aside = 0.0

    def waited(self, seconds: float) -> None:
        """Adds time that the loop waited for a batch."""
        self._waited += seconds

    def aside(self, seconds: float) -> None:
        """Adds time spent on pictures and evaluation, which is no training time."""
        self._aside += seconds

    def stretch(self, step: int) -> dict[str, float]:
        """Returns the figures since the last call, and starts the next stretch.

        A stretch of no steps has none: it is one step, which was compiled or loaded.
        """
        now, steps = time.perf_counter(), step - self._step
        elapsed = max(now - self._time - self._aside, 1e-9)
        figures = {}
        if steps:
            per_step = elapsed / steps
            figures = {
                "perf/examples_per_second": self._batch_size / per_step,
                "perf/data_wait": self._waited / elapsed,
                "perf/eta_seconds": per_step * (self.num_steps - step),
            }
            for name, rate in self._rates.items():
                figures[f"perf/{name}"] = self._flops / per_step / rate
        self._step, self._time, self._waited, self._aside = step, now, 0.0, 0.0
        return figures


def line(
    step: int, num_steps: int, loss: float | None, figures: dict, next_save: int
) -> str:
    """Returns the text of a progress line."""
    parts = [f"step {step:,}/{num_steps:,}"]
    if loss is not None:
        parts.append(f"loss {loss:.4f}")
    if figures:
        parts.append(f"{figures['perf/examples_per_second']:,.0f} examples/s")
        parts.append(f"data wait {figures['perf/data_wait']:.0%}")
        parts.append(f"mfu {figures['perf/mfu']:.0%}")
    parts.append(f"checkpoint at {next_save:,}")
    if figures:
        parts.append(f"ETA {duration(figures['perf/eta_seconds'])}")
    return " | ".join(parts)


class Printer:
    """Prints progress lines in place on a terminal, and one below another elsewhere."""

    def __init__(self, stream=None):
        self._stream = stream or sys.stdout
        self._in_place = self._stream.isatty()
        self._open = False

    def progress(self, text: str) -> None:
        if self._in_place:
            self._stream.write("\r\x1b[K" + text)
            self._open = True
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        if self._open:
            self._stream.write("\n")
            self._open = False
        self._stream.write(text + "\n")
        self._stream.flush()
