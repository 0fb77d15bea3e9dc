"""One row a trial: what it is doing, and what became of its attempts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launch.trial import PREEMPTED, Trial, failures, state

_HEAD = ("trial", "state", "attempts", "preemptions", "failures", "step", "job")


def text(trials: Sequence[Trial], alive: Mapping[str, str], max_failures: int) -> str:
    """Returns the rows as text.

    Args:
      trials: in the order of the rows.
      alive: state by job, of the engine.
      max_failures: the allowance of each.
    """
    rows = [_HEAD, *(_row(one, alive, max_failures) for one in trials)]
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(_HEAD))]
    lines = [
        "  ".join(str(v).ljust(w) for v, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _row(one: Trial, alive, max_failures: int) -> tuple:
    attempts = one.attempts()
    last = attempts[-1] if attempts else None
    return (
        one.name,
        state(one.result(), one.events(), alive, max_failures),
        sum(a.started is not None for a in attempts),
        sum(a.cause == PREEMPTED and a.started is not None for a in attempts),
        failures(one.events()),
        one.step(),
        last.job if last and last.job else "",
    )
