"""The mutable sides of Python objects: read as (key, value) pairs, written back in place.

An object may have several: a dict of one's own class has items, attributes and slots.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections import OrderedDict, deque
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from operator import is_
from typing import Any, Protocol

from torch import Tensor, nn

Pairs = list[tuple[Any, Any]]

# Registries of a module whose entries are attributes to the one who wrote the model.
REGISTRIES = ("_parameters", "_buffers", "_modules")


class Face(Protocol):
    """One mutable side of an object."""

    def read(self, holder: Any) -> Pairs:
        """What it holds, in order."""

    def write(self, holder: Any, pairs: Pairs) -> None:
        """Make it hold exactly these; the holder stays the same object."""

    def label(self, key: Any) -> str:
        """How an entry is written behind the holder's name."""


class _Items:
    """Of a dict, whatever its class overrides."""

    def read(self, holder: Any) -> Pairs:
        if not dict.__len__(holder):  # most of a module's: hooks that nobody registered
            return []
        return list(_dict_class(holder).items(holder))

    def write(self, holder: Any, pairs: Pairs) -> None:
        base = _dict_class(holder)
        base.clear(holder)
        for key, value in pairs:
            base.__setitem__(holder, key, value)

    def label(self, key: Any) -> str:
        return f"[{key!r}]" if isinstance(key, (str, int)) else f"[{type(key).__name__}]"


def _dict_class(holder: Any) -> type[dict[Any, Any]]:
    # An ordered dict that dict's own methods write to loses its order.
    return OrderedDict if isinstance(holder, OrderedDict) else dict


class _Entries:
    """Of a list or a deque."""

    def read(self, holder: Any) -> Pairs:
        base = list if isinstance(holder, list) else deque
        return list(enumerate(base.__iter__(holder)))

    def write(self, holder: Any, pairs: Pairs) -> None:
        values = [value for _, value in pairs]
        if isinstance(holder, list):
            list.__setitem__(holder, slice(None), values)
        else:
            deque.clear(holder)
            deque.extend(holder, values)

    def label(self, key: Any) -> str:
        return f"[{key}]"


class _Members:
    """Of a set: every member is its own key."""

    def read(self, holder: Any) -> Pairs:
        return [(member, member) for member in set.__iter__(holder)]

    def write(self, holder: Any, pairs: Pairs) -> None:
        set.clear(holder)
        set.update(holder, (member for member, _ in pairs))

    def label(self, key: Any) -> str:
        return ""


class _Attributes:
    """The ``__dict__`` of an instance, past any ``__setattr__``."""

    def read(self, holder: Any) -> Pairs:
        return list(vars(holder).items())

    def write(self, holder: Any, pairs: Pairs) -> None:
        own = vars(holder)
        own.clear()
        own.update(pairs)

    def label(self, key: Any) -> str:
        return f".{key}"


class _Slots:
    """What an instance holds outside its ``__dict__``; empty slots are left out."""

    def read(self, holder: Any) -> Pairs:
        found = []
        for slot in slots(type(holder)):
            try:
                found.append((slot, slot.__get__(holder)))
            except AttributeError:
                continue
        return found

    def write(self, holder: Any, pairs: Pairs) -> None:
        kept = dict(pairs)
        for slot, _ in self.read(holder):
            if slot not in kept:
                slot.__delete__(holder)
        for slot, value in pairs:
            slot.__set__(holder, value)

    def label(self, key: Any) -> str:
        return f".{key.__name__}"


class _ClassAttributes:
    """The data of a class: what is no method, no descriptor and no name of Python's own."""

    def read(self, holder: Any) -> Pairs:
        return [(k, v) for k, v in vars(holder).items() if _is_data(k, v)]

    def write(self, holder: Any, pairs: Pairs) -> None:
        kept = dict(pairs)
        now = dict(self.read(holder))
        for key in now.keys() - kept.keys():
            type.__delattr__(holder, key)
        for key, value in pairs:
            if now.get(key, holder) is not value:
                type.__setattr__(holder, key, value)

    def label(self, key: Any) -> str:
        return f".{key}"


def _is_data(key: str, value: object) -> bool:
    kind = type(value)
    return not (key.startswith("__") or hasattr(kind, "__get__") or callable(value))


ITEMS, ENTRIES, MEMBERS = _Items(), _Entries(), _Members()
ATTRIBUTES, SLOTS, CLASS = _Attributes(), _Slots(), _ClassAttributes()

# Classes without methods of their own, whoever defined them.
_RECORDS = (types.SimpleNamespace, argparse.Namespace)


def slots(cls: type) -> list[types.MemberDescriptorType]:
    """The slots of a class and its bases, names mangled or not."""
    bases = [b for b in cls.__mro__ if "__slots__" in vars(b)]
    return [v for b in bases for v in vars(b).values() if type(v) is types.MemberDescriptorType]


def faces(holder: object, packages: frozenset[str]) -> tuple[Face, ...]:
    """The mutable sides of an object that belong to a model's state.

    Containers have them, modules, and objects of the model's own code: of a class of one of these
    top-level ``packages``, data classes and namespaces. Anything else (a trainer, a logger, a lock)
    is not the model's.
    """
    kind: Any = type(holder)
    return _faces(kind, packages)


@lru_cache(maxsize=4096)
def _faces(kind: type, packages: frozenset[str]) -> tuple[Face, ...]:
    found: list[Face] = []
    if issubclass(kind, dict):
        found.append(ITEMS)
    elif issubclass(kind, (list, deque)):
        found.append(ENTRIES)
    elif issubclass(kind, set):
        found.append(MEMBERS)
    if issubclass(kind, (Tensor, type, types.ModuleType, types.FunctionType)):
        return tuple(found)
    if issubclass(kind, nn.Module) or is_record(kind, packages):
        if kind.__dictoffset__:
            found.append(ATTRIBUTES)
        if slots(kind):
            found.append(SLOTS)
    return tuple(found)


def is_record(kind: type, packages: frozenset[str]) -> bool:
    """Whether objects of a class carry state of a model written in these packages."""
    return package(kind) in packages or dataclasses.is_dataclass(kind) or issubclass(kind, _RECORDS)


def package(kind: type) -> str:
    """Top-level package of a class."""
    return str(kind.__module__).partition(".")[0]


def same(a: Pairs, b: Pairs) -> bool:
    """Whether both hold the same objects in the same order; no object is asked to compare."""
    if len(a) != len(b):
        return False
    if all(map(is_, chain.from_iterable(a), chain.from_iterable(b))):  # nearly always
        return True
    return all(
        v is w and (k is q or (type(k) is type(q) is int and k == q))
        for (k, v), (q, w) in zip(a, b, strict=True)
    )


def parts(value: object) -> Sequence[object]:
    """Entries of what can't change itself but may hold what can."""
    # Whatever its class overrides: some have no length.
    if isinstance(value, tuple):
        return list(tuple.__iter__(value))
    return list(frozenset.__iter__(value)) if isinstance(value, frozenset) else ()
