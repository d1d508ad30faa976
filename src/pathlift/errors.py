"""Every error the library raises on purpose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PathliftError(Exception):
    """Base class of all errors raised by pathlift."""


class ArgumentError(PathliftError, ValueError):
    """An argument has the wrong type, shape or value."""


def closest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean …?`` for a name near to known ones; empty if none is."""
    found = difflib.get_close_matches(name, list(known), n=2, cutoff=0.7)
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""


def unknown(what: str, name: object, known: Iterable[str], more: str = "") -> ArgumentError:
    """The error for a name that is not among the known ones; ``more``: what else may be given."""
    known = list(known)
    names = ", ".join(map(repr, known))
    return ArgumentError(
        f"{what} {name!r} is unknown. Supported: {names}{more}.{closest(str(name), known)}"
    )


class CaptureError(PathliftError):
    """The model can't be turned into a graph of tensor operations."""


class UnsupportedOperationError(PathliftError):
    """The path lifting is not defined for an operation of the graph."""


class RangeError(PathliftError):
    """A rescaling would push a parameter out of the normal range of its dtype."""


class VerificationError(PathliftError):
    """The rescaled network does not compute the same bits; the model has been restored."""


class MissingDependencyError(PathliftError, ImportError):
    """An optional dependency is needed and not installed."""


class CheckpointError(PathliftError):
    """A checkpoint can't be read, does not fit the model, or can't be written."""
