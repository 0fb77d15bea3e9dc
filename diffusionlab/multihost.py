"""Several processes as one program: joining, and waiting with a limit."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np

WAITED_TOO_LONG = 76
"""Exit status of a process whose wait for the others ran out."""


def initialize(
    coordinator: str, num_processes: int, process_id: int, timeout: int
) -> None:
    """Joins this process with the others.

    Args:
      coordinator: 'host:port' of process 0; 'auto' reads the cluster's environment.
      num_processes: how many there are.
      process_id: which one this is.
      timeout: seconds to wait for the others.
    """
    # JAX would abort without saying what it waited for, so ours is the shorter limit.
    limit = {"initialization_timeout": timeout + 60}
    if coordinator == "auto":
        with waiting("joining the processes of this cluster", timeout):
            jax.distributed.initialize(**limit)
        return
    what = f"joining {num_processes} processes at {coordinator}"
    with waiting(what, timeout, f"{process_id}/{num_processes}"):
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            coordinator_bind_address=coordinator if process_id == 0 else None,
            **limit,
        )


@contextlib.contextmanager
def waiting(what: str, seconds: float, who: str = "") -> Iterator[None]:
    """Limits a wait for other processes.

    When the time runs out, says what this process waits for, dumps the stacks of all
    its threads and ends it with status `WAITED_TOO_LONG`: a hang would keep the
    machines of the whole job.

    Args:
      what: is waited for.
      seconds: how long at most.
      who: 'i/n', this process of how many; by default its id.
    """

    def give_up():
        print(
            f"process {who or os.getpid()}: waited {seconds:.0f} s at '{what}'; "
            "another process is lost or stuck. Stacks follow; exiting.",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(WAITED_TOO_LONG)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def together(what: str, seconds: float) -> contextlib.AbstractContextManager:
    """Returns `waiting` for what processes do together; alone, work has no limit."""
    if jax.process_count() == 1:
        return contextlib.nullcontext()
    return waiting(what, seconds, f"{jax.process_index()}/{jax.process_count()}")


def is_main() -> bool:
    """Whether this process prints and writes."""
    return jax.process_index() == 0


def barrier(name: str, seconds: float) -> None:
    """Waits until every process is here, with a limit."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    with together(f"barrier {name}", seconds):
        multihost_utils.sync_global_devices(name)


def all_of(what: str, number: int, seconds: float) -> list[int]:
    """Returns the number that each process gives, by process; waits with a limit."""
    if jax.process_count() == 1:
        return [number]
    from jax.experimental import multihost_utils

    with together(what, seconds):
        found = multihost_utils.process_allgather(np.asarray(number, np.int32))
    return np.asarray(found).tolist()


def on_main(what: str, work: Callable[[], None], seconds: float) -> None:
    """Runs `work` on process 0 while the others wait; all fail if it fails.

    Raises:
      RuntimeError: on the others, if it raised on process 0.
    """
    error = None
    if is_main():
        try:
            work()
        except Exception as raised:
            error = raised
    failed = all_of(what, int(error is not None), seconds)[0]
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"process 0 could not {what}; it says why.")
