"""Errors of the user's are one line; of ours, a traceback."""

from __future__ import annotations

import dis
import errno

from diffusionlab import config as config_lib
from diffusionlab import registry

# Of the machine, not of the program: wherever they are met, the user can mend them.
_SYSTEM_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
)


def explain(error: BaseException) -> str:
    """Returns the line for an error of the user's, '' for one of ours."""
    if not isinstance(error, ValueError | TypeError | OSError | RuntimeError):
        return ""
    return _of_system(error) or (str(error) if _is_message(error) else "")


def _of_system(error: BaseException) -> str:
    """What the system refused, and for which file; '' of other errors."""
    if not isinstance(error, OSError) or error.errno not in _SYSTEM_ERRORS:
        return ""
    return error.strerror + (f": '{error.filename}'" if error.filename else "")


def _is_message(error: BaseException) -> bool:
    """Whether an error was raised by us or a config, about what we were given."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    # JAX hides its own frames, and says so in a note: the last one that is left either
    # raised the error, or called what did.
    instruction = dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]]
    if getattr(error, "__notes__", None) and instruction != "RAISE_VARARGS":
        return False
    raised_in = trace.tb_frame.f_globals.get("__name__", "")
    if isinstance(error, TypeError):  # elsewhere it is a mistake of ours
        return raised_in in (config_lib.__name__, registry.__name__)
    return raised_in.startswith(("diffusionlab", "launch", "configs.", "_config_"))
