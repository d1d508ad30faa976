"""Which arguments of a call are known: constants, masks and indices that no input decides."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pathlift.capture.program import Symbol
from pathlift.lifting.values import Lifted, Squares
from pathlift.operations.table import Undescribed
from pathlift.symmetry.scales import Value

# Fills from here down stand for minus infinity in front of a softmax or a max.
_LEAST = -1e4


def carries_any_scale(value: Any) -> bool:
    """Whether ``2**s`` times the value is the value: 0, an infinity, or a NaN everywhere."""
    if isinstance(value, Value):
        if value.zero or value.constant is None:
            return value.zero
        value = value.constant
    if isinstance(value, Tensor):
        return bool(((value == 0) | ~value.isfinite()).all())
    return value == 0 or not _finite(value)


def _finite(value: Any) -> bool:
    return math.isfinite(abs(value))


def started(value: Any) -> Any:
    """A fill as the constant that starts a path: one that stands for minus infinity starts none."""
    if isinstance(value, Tensor):
        if value.is_complex() or not value.is_floating_point():
            return value
        least = (value <= _LEAST) | ~value.isfinite()
        return torch.where(least, torch.zeros_like(value), value)
    if not isinstance(value, (bool, int, float, complex)):
        return value  # made of paths
    if not _finite(value) or (not isinstance(value, complex) and value <= _LEAST):
        return 0.0
    return value


def filler(c: Squares, value: Any) -> Lifted:
    """A value to be joined with others, as an activation of the lifted network."""
    if value is None:
        raise Undescribed
    return value if isinstance(value, Lifted) else c.lifted(started(value))


def known(c: Squares, symbol: Symbol | None, value: Any) -> Tensor | None:
    """An index or mask, unless the input decides it.

    A mask that the input decides is a tensor of ones to the lifted pass (it keeps every path), so
    the tensor alone does not tell.
    """
    if not isinstance(value, Tensor) or isinstance(value, Lifted):
        return None
    return value if c.known(symbol) else None
