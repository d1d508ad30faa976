"""What functions keep from call to call: attributes, defaults, closures, globals."""

from __future__ import annotations

import dis
from collections import deque
from contextlib import suppress
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from pathlift.homes.faces import Pairs

_STORE_GLOBAL = dis.opmap["STORE_GLOBAL"]


class _Function:
    """The mutable side of a function: everything but its code."""

    def read(self, holder: Any) -> Pairs:
        found: Pairs = [(("attribute", name), value) for name, value in vars(holder).items()]
        found += [(("default", k), v) for k, v in enumerate(holder.__defaults__ or ())]
        found += [(("default", n), v) for n, v in (holder.__kwdefaults__ or {}).items()]
        for name, cell in _cells(holder).items():
            with suppress(ValueError):  # empty still
                found.append((("closure", name), cell.cell_contents))
        around = holder.__globals__
        return found + [(("global", n), around[n]) for n in _stored(holder) if n in around]

    def write(self, holder: Any, pairs: Pairs) -> None:
        for name in dict(self.read(holder)).keys() - dict(pairs).keys():
            if name[0] == "attribute":
                del vars(holder)[name[1]]
            elif name[0] == "global":
                del holder.__globals__[name[1]]
        for (kind, name), value in pairs:
            if kind == "attribute":
                vars(holder)[name] = value
            elif kind == "closure":
                _cells(holder)[name].cell_contents = value
            elif kind == "global":
                holder.__globals__[name] = value

    def label(self, key: Any) -> str:
        return f"'s {key[0]} {key[1]!r}"


FUNCTION = _Function()


def _cells(function: Any) -> dict[str, Any]:
    return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))


def beside(function: FunctionType) -> list[object]:
    """Functions of the same file that a function names, and the containers among its globals."""
    around = function.__globals__
    named = [around[n] for n in _named(function.__code__) if n in around]
    return [
        v
        for v in named
        if isinstance(v, (list, dict, set, deque))
        or (isinstance(v, FunctionType) and v.__globals__ is around)
    ]


@lru_cache(maxsize=8192)
def _named(code: CodeType) -> frozenset[str]:
    """The names that a function's code, and the code inside it, may look up."""
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return frozenset(code.co_names).union(*map(_named, inner))


def _stored(function: Any) -> tuple[str, ...]:
    """The globals that a function writes to."""
    return _stored_by(function.__code__)


@lru_cache(maxsize=8192)
def _stored_by(code: CodeType) -> tuple[str, ...]:
    found = {n for c in code.co_consts if isinstance(c, CodeType) for n in _stored_by(c)}
    if _STORE_GLOBAL in code.co_code[::2]:
        found |= {str(i.argval) for i in dis.get_instructions(code) if i.opcode == _STORE_GLOBAL}
    return tuple(sorted(found))
