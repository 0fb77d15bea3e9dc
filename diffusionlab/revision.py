"""Which revision of the code this is. Without JAX: launchers ask too."""

from __future__ import annotations

import pathlib
import subprocess


def git_revision() -> str:
    """Returns the revision of this code, '+changes' if files differ, '' if unknown."""
    folder = pathlib.Path(__file__).resolve().parent

    def git(*words):
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        revision = git("rev-parse", "HEAD")
    except FileNotFoundError:
        return ""
    return revision + ("+changes" if revision and git("status", "--porcelain") else "")
