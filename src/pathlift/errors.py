"""Every error the library raises on purpose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PathliftError(Exception):
    """Base class of all errors raised by pathlift.

    >>> import pathlift, torch
    >>> try:
    ...     pathlift.condition_(torch.nn.Linear(3, 2), torch.zeros(1, 4))
    ... except pathlift.PathliftError as error:
    ...     print(type(error).__name__)
    CaptureError
    """


class ArgumentError(PathliftError, ValueError):
    """An argument has the wrong type, shape or value.

    >>> import pathlift
    >>> try:
    ...     pathlift.condition_(3, None)
    ... except ValueError as error:  # an ArgumentError is one
    ...     print(error)
    model must be a torch.nn.Module; found int...
    """


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
    """The model can't be turned into a graph of tensor operations.

    >>> import pathlift, torch
    >>> class Looks(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(x if x.sum() > 0 else -x)
    >>> try:
    ...     pathlift.rescaling_group(Looks(3, 2), torch.ones(1, 3))
    ... except pathlift.CaptureError:
    ...     print("it depends on values")
    it depends on values
    """


class UnsupportedOperationError(PathliftError):
    """The path lifting is not defined for an operation of the graph.

    >>> import pathlift, torch
    >>> try:
    ...     pathlift.path_norm(torch.nn.GELU(), torch.ones(1, 3))
    ... except pathlift.UnsupportedOperationError:
    ...     print("GELU has no paths")
    GELU has no paths
    """


class RangeError(PathliftError):
    """A rescaling would push a parameter out of the normal range of its dtype.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> x = torch.zeros(2, 4)
    >>> group = pathlift.rescaling_group(model, x)
    >>> try:
    ...     group.rescale_(model, torch.full((group.num_scales,), 300))
    ... except pathlift.RangeError:
    ...     print("more than float32 holds; nothing has changed")
    more than float32 holds; nothing has changed
    """


class VerificationError(PathliftError):
    """The rescaled network does not compute the same bits; the model has been restored.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> x = torch.zeros(2, 4)
    >>> try:
    ...     report = pathlift.condition_(model, x)  # compares every bit
    ... except pathlift.VerificationError as error:
    ...     print("the model is as before, and this is to be reported:", error)
    """


class MissingDependencyError(PathliftError, ImportError):
    """An optional dependency is needed and not installed.

    >>> import pathlift
    >>> issubclass(pathlift.MissingDependencyError, ImportError)
    True
    """


class CheckpointError(PathliftError):
    """A checkpoint can't be read, does not fit the model, or can't be written.

    >>> import pathlift, pathlib
    >>> try:
    ...     pathlift.checkpoint.open_checkpoint(pathlib.Path(pathlift.__file__))
    ... except pathlift.CheckpointError:
    ...     print("not a checkpoint")
    not a checkpoint
    """
