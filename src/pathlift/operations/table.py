"""The table of operations: each ATen operation once, with its three readings.

An entry says what an operation does to *scales* (the symmetry), to *squares* (the lifted pass) and
to *paths* (the listing by definition). A reading is a function

    reading(context, call, **arguments)

that names the arguments it describes, as the operation's schema names them (``self`` and ``input``
come as ``x``, ``other`` as ``y``). A call that sets an argument which the reading doesn't name to
anything but the schema's default is not described: it is treated as an unknown operation. So is a
call whose result has other outputs or another kind of dtype than the entry says.

Names are those of ATen, without overload and in-place underscore.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from pathlift.capture.program import Call

Reading = Callable[..., Any]

# How schemas call the first and the second tensor.
RENAMED = {"self": "x", "input": "x", "other": "y"}

# Arguments that say where or how a result is stored, not what it is.
STORAGE = frozenset(
    {"memory_format", "layout", "device", "pin_memory", "non_blocking", "copy", "generator", "out"}
)


class Undescribed(Exception):
    """A reading does not cover this call; it is treated as an unknown operation."""


@dataclass(frozen=True)
class NoPaths:
    """There is no path lifting of an operation (it is not piecewise linear), and why."""

    why: str


@dataclass(frozen=True)
class Operation:
    """One entry.

    Attributes:
        scales: how the scales of its arguments and results are related.
        squares: its action on non-negative squared activations, or why it has none.
        listing: its action on tables of paths, or why it has none.
        changes_dtype: whether a float may become an integer or boolean without being pinned.
        samples: names of the arguments of a call that have samples along dimension 0, each of
            which gives its own sample of the result.
    """

    scales: Reading
    squares: Reading | NoPaths
    listing: Reading | NoPaths
    changes_dtype: bool = False
    samples: Callable[[Call], tuple[str, ...]] = lambda call: ()

    def but(self, **readings: Any) -> Operation:
        """This kind with some readings of its own."""
        return replace(self, **readings)


TABLE: dict[str, Operation] = {}


def define(names: str, entry: Operation) -> None:
    """Enter operations (names separated by blanks) into the table.

    Raises:
        ValueError: a name that is there already: each operation is described once.
    """
    for name in names.split():
        if name in TABLE:
            raise ValueError(f"operation '{name}' is described twice")
        TABLE[name] = entry


def known(name: str) -> bool:
    """Whether the table has an entry of this name."""
    return name in TABLE


def described(reading: Reading, call: Call, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that a reading names.

    Raises:
        Undescribed: the call sets another one.
    """
    names, everything = _named(reading)
    if everything:
        return {RENAMED.get(k, k): v for k, v in arguments.items()}
    others = {RENAMED.get(k, k) for k in call.overridden} - names - STORAGE
    if others:
        raise Undescribed(f"argument '{min(others)}'")
    found = {}
    for name, value in arguments.items():
        name = RENAMED.get(name, name)
        if name in names:
            found[name] = value
    return found


@cache
def _named(reading: Reading) -> tuple[frozenset[str], bool]:
    """Names of the arguments that a reading takes, and whether it takes all."""
    parameters = list(inspect.signature(reading).parameters.values())[2:]
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return frozenset(p.name for p in parameters), everything
