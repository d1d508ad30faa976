"""What of a value has changed, in words; asked only of values that can be compared safely."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from pathlift.homes import faces as sides
from pathlift.homes.faces import Pairs

# What an attribute is that is not there.
MISSING = object()

PLAIN = (int, float, complex, bool, str, bytes, type(None))

# The sides of an object, as they were when the snapshot was made.
Contents = Callable[[object], list[Pairs]]


def is_plain(value: object) -> bool:
    """A number, a string or None, of Python's own class: safe to compare and to print."""
    return type(value) in PLAIN


def key_of(value: object) -> object:
    """What entries are matched by: values of plain ones, identity of others."""
    if is_plain(value):
        return type(value), value
    if type(value) is tuple:
        return tuple(map(key_of, value))
    return id(value)


def difference(old: object, new: object, then: Contents, packages: frozenset[str]) -> str | None:
    """What has become of ``old``; None if nothing that can be told, or equal plain values.

    Args:
        old, new: two values of one attribute; :data:`MISSING` where it is not there.
        then: what an old container held.
        packages: see :func:`pathlift.homes.faces.faces`.
    """

    def differ(tensors: bool) -> bool:
        return _Look(then, packages, tensors).differ(old, new)

    if not differ(True):
        return None
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return "tensor replaced"
    if type(old) is type(new) and not is_plain(old):
        inside = "" if differ(False) else "tensors in "
        return f"{inside}{type(old).__name__} changed"
    if old is MISSING:
        return f"added: {_word(new)}"
    if new is MISSING:
        return f"removed: {_word(old)}"
    return f"{_word(old)} -> {_word(new)}"


class _Look:
    """One comparison.

    Args:
        then, packages: see :func:`difference`.
        tensors: whether another tensor in the place of one counts.
    """

    def __init__(self, then: Contents, packages: frozenset[str], tensors: bool) -> None:
        self.then, self.packages, self.tensors = then, packages, tensors
        self.under_way: set[tuple[int, int]] = set()

    def differ(self, old: object, new: object) -> bool:
        if old is new or (id(old), id(new)) in self.under_way:
            return False
        self.under_way.add((id(old), id(new)))
        told = [_tells(v, self.packages) for v in (old, new)]
        if not any(told):
            return False  # nothing is known of either: functions, locks, objects of others
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            return self.tensors
        if type(old) is not type(new):
            return not (old is MISSING or new is MISSING) or any(told)
        if is_plain(old):
            return not (old == new or (old != old and new != new))  # NaN is NaN
        if isinstance(old, (nn.Module, np.ndarray)):
            return True
        before = [list(enumerate(sides.parts(old))), *(self.then(old))]
        after = [list(enumerate(sides.parts(new)))]
        after += [face.read(new) for face in sides.faces(new, self.packages)]
        if len(before) != len(after):
            return True
        return any(self._pairs_differ(a, b) for a, b in zip(before, after, strict=True))

    def _pairs_differ(self, before: Pairs, after: Pairs) -> bool:
        old = {key_of(k): v for k, v in before}
        new = {key_of(k): v for k, v in after}
        return old.keys() != new.keys() or any(
            self.differ(value, new[key]) for key, value in old.items()
        )


def _tells(value: object, packages: frozenset[str]) -> bool:
    """Whether it can be told if another value is the same."""
    return (
        is_plain(value)
        or isinstance(value, (Tensor, nn.Module, np.ndarray, tuple, frozenset))
        or bool(sides.faces(value, packages))
    )


def _word(value: Any) -> str:
    if is_plain(value):
        text = repr(value)
        return text if len(text) <= 40 else f"{text[:37]}..."
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    return type(value).__name__
