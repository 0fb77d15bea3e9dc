"""Waiting for what other processes do."""

import time


def until(what, seconds=180):
    """Returns what `what()` returns as soon as that is true; fails after a while."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)
    return found
