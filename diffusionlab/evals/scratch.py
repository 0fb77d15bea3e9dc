"""Folders that programs write to one at a time; a lock goes with its process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator

from diffusionlab import multihost

_LOCK = "lock"


@contextlib.contextmanager
def own(folder: pathlib.Path, timeout: float) -> Iterator[pathlib.Path]:
    """Yields a folder that nobody else works in; it is removed at a good end.

    It is `folder`, with what an interrupted program left there, or where another
    program is at work in that, a new one of this program's own. With several processes
    all of them call it, and all get the same.
    """
    with contextlib.ExitStack() as held:
        private = 0
        if multihost.is_main() and not held.enter_context(_locked(folder)):
            private = os.getpid()
        private = multihost.all_of(f"whose {folder.name} is", private, timeout)[0]
        if private:
            folder = folder.with_name(f"{folder.name}_{private}")
            if multihost.is_main():
                held.enter_context(_locked(folder))
        yield folder
        # The others may still read what lies there.
        multihost.barrier(f"end of {folder.name}", timeout)
        if multihost.is_main():
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[bool]:
    """Makes a folder, and yields whether this program alone works in it now."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a file system without locks
        yield _is_still(path, file)


def _is_still(path: pathlib.Path, file) -> bool:
    """Whether `path` names an open file: who held it before may have removed it."""
    try:
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def alone(path: pathlib.Path, what: str) -> Iterator[None]:
    """Waits until no other program holds the lock `path`, and holds it."""
    if not multihost.is_main():
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another program that computes {what}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield
