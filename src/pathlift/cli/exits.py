"""Exit codes, and the one line that is said of an error."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path

from pathlift.errors import (
    ArgumentError,
    CaptureError,
    PathliftError,
    RangeError,
    UnsupportedOperationError,
    VerificationError,
)

DONE, SURROUNDINGS, USAGE, REFUSED, UNVERIFIED, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 4, 70, 130
PIPE = 141  # as a process that SIGPIPE ends

EXPLAINED = """exit codes:
  0    done
  1    the surroundings: files, disk, memory, a missing package, a cluster
  2    usage: an option, a model's name or factory, inputs that do not fit
  3    refusal: the model can't be captured, has operations without paths, or
       would leave the range of its dtype
  4    verification: the outputs changed; nothing was written
  70   an error inside pathlift (--verbose shows where)
  130  interrupted"""


def code(error: BaseException) -> int:
    """The exit code of an error."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, ArgumentError):
        return USAGE
    if isinstance(error, VerificationError):
        return UNVERIFIED
    if isinstance(error, (CaptureError, UnsupportedOperationError, RangeError)):
        return REFUSED
    if isinstance(error, (PathliftError, OSError)) or _out_of_memory(error):
        return SURROUNDINGS
    return INTERNAL


def sentence(error: BaseException) -> str:
    """What is printed of an error after ``pathlift: ``."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted"
    if isinstance(error, PathliftError):
        return f"error: {error}"
    if _out_of_memory(error):
        return "error: there is not enough memory. Give smaller inputs, or use --stream."
    if isinstance(error, OSError):
        return f"error: {_of_system(error)}"
    return f"internal error: {type(error).__name__}: {first_line(error)} ({_place(error)})"


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _out_of_memory(error: BaseException) -> bool:
    words = ("can't allocate memory", "out of memory", "Cannot allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _of_system(error: OSError) -> str:
    """The system's own words, with the file they are about."""
    words = error.strerror or first_line(error)
    name = f": {str(error.filename)!r}" if error.filename else ""
    advice = {
        errno.ENOSPC: "Free some space, or write elsewhere.",
        errno.EACCES: "Choose a place you may write to.",
        errno.EROFS: "Choose a place you may write to.",
    }
    return f"{words}{name}. {advice.get(error.errno or 0, '')}".rstrip()


def _place(error: BaseException) -> str:
    """File and line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "place unknown"
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}"
