"""Several processes of diffusionlab on this machine, joined as one, in any mode.

  python -m launch.rehearse --num_processes=2 -- --config=... --workdir=...

What follows '--' goes to every process. SIGTERM and SIGINT are passed on. The status
is the first that is not 0; the other processes then have a while to end by themselves,
and are killed after it.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
import time

POLL_SECONDS = 0.05


def parser() -> argparse.ArgumentParser:
    """Returns the flags of the launcher."""
    p = argparse.ArgumentParser(
        "launch.rehearse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--num_processes", type=int, default=2, help="how many (%(default)s)"
    )
    p.add_argument(
        "--grace",
        type=float,
        default=20.0,
        help="seconds the others have when one has failed (%(default)s)",
    )
    p.add_argument("flags", nargs="*", help="flags of diffusionlab, after '--'")
    return p


def free_port() -> int:
    """Returns a port of the loopback interface that nothing listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def commands(num_processes: int, port: int, flags: list[str]) -> list[list[str]]:
    """Returns the command of each process."""
    joined = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={num_processes}"]
    program = [sys.executable, "-m", "diffusionlab.main", *joined]
    return [[*program, f"--process_id={i}", *flags] for i in range(num_processes)]


def wait(processes: list[subprocess.Popen], grace: float) -> int:
    """Waits for all; returns the first status that is not 0, or 0."""
    first, deadline = 0, None
    while any(p.poll() is None for p in processes):
        if deadline is None:
            first = next((p.returncode for p in processes if p.returncode), 0)
            deadline = time.monotonic() + grace if first else None
        elif time.monotonic() > deadline:
            for p in processes:
                p.kill()
        time.sleep(POLL_SECONDS)
    return first or next((p.returncode for p in processes if p.returncode), 0)


def main() -> int:
    """Entry point; returns the exit status."""
    args = parser().parse_args()
    if args.num_processes < 1:
        parser().error(f"--num_processes: must be at least 1, got {args.num_processes}")
    processes: list[subprocess.Popen] = []

    def forward(number, _):
        for p in processes:
            with contextlib.suppress(ProcessLookupError):
                p.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    for command in commands(args.num_processes, free_port(), args.flags):
        # A session of its own: a terminal's Ctrl-C would otherwise arrive twice.
        processes.append(subprocess.Popen(command, start_new_session=True))
    status = wait(processes, args.grace)
    # A process that a signal ended has a negative status, which a shell writes 128 + n.
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main())
