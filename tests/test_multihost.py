import subprocess
import sys
import threading
import time

import pytest

from diffusionlab import multihost

STUCK = """
import time
from diffusionlab import multihost

def stand_still():
    time.sleep(60)

with multihost.waiting("barrier of the test", 0.2, "1/2"):
    stand_still()
"""


def test_wait_without_end_names_the_barrier_dumps_stacks_and_exits():
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == multihost.WAITED_TOO_LONG == 76
    assert time.monotonic() - start < 45
    assert (
        "process 1/2: waited 0 s at 'barrier of the test'; another process is lost"
        in done.stderr
    )
    assert "in stand_still" in done.stderr


def test_wait_that_ends_leaves_nothing_behind():
    before = threading.active_count()
    with multihost.waiting("nothing", 0.05):
        assert threading.active_count() == before + 1
    # The process would be gone by now.
    time.sleep(0.15)
    assert threading.active_count() == before


def test_error_during_a_wait_stops_the_timer_and_is_not_hidden():
    before = threading.active_count()
    try:
        with multihost.waiting("nothing", 0.05):
            raise KeyError("mine")
    except KeyError as error:
        assert error.args == ("mine",)
    time.sleep(0.15)
    assert threading.active_count() == before


def test_what_fails_on_process_0_fails_everywhere(monkeypatch):
    def work():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        multihost.on_main("write", work, 0.0)
    monkeypatch.setattr(multihost, "is_main", lambda: False)
    multihost.on_main("write", work, 0.0)
    monkeypatch.setattr(multihost, "all_of", lambda *_: [1, 0])
    with pytest.raises(RuntimeError, match="process 0 could not write"):
        multihost.on_main("write", work, 0.0)


def test_one_process_waits_for_nobody(monkeypatch):
    def never(*_):
        raise AssertionError

    monkeypatch.setattr(multihost, "waiting", never)
    multihost.barrier("alone", 0.0)
    assert multihost.all_of("alone", 3, 0.0) == [3]
    assert multihost.is_main()
