"""Magnitudes of lifted activations, and what a reading does with a value that is not known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pathlift.lifting.tables import UNKNOWN, Listing, Table
from pathlift.lifting.values import Lifted, Squares
from pathlift.operations.table import Undescribed


def magnitude(x: Lifted) -> Tensor:
    """What a norm divides by: the p-th power of the values, detached, in the unit of ``shift``."""
    return (x.tensor if x.gain is None else x.gain).detach()


def coherent(
    c: Squares, gain: Tensor | None, function: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """A linear map of non-negative values: they add as numbers, where paths add as powers."""
    if gain is None or not c.p:
        return None
    return function(gain ** (1 / c.p)) ** c.p


def normalised(x: Lifted) -> Lifted:
    """:meth:`Lifted.normalised`, the gain included."""
    out = x.normalised()
    if x.gain is None or out is x:
        return out
    return Lifted(out.tensor, out.shift, x.gain * 2.0 ** (x.shift - out.shift))


def times(x: Lifted, factor: Any) -> Lifted:
    """A fixed coefficient, already raised to p."""
    if isinstance(factor, float) and factor == 1.0:
        return x
    return Lifted(x.tensor * factor, x.shift, None if x.gain is None else x.gain * factor)


def expanded(x: Lifted, shape: Sequence[int]) -> Lifted:
    """Broadcast to ``shape``."""
    gain = None if x.gain is None else x.gain.expand(tuple(shape))
    return Lifted(x.tensor.expand(tuple(shape)), x.shift, gain)


def once(function: Callable[[Tensor], Tensor], tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """``function`` combines ``dims``; equal samples (stride 0) are done once and stay equal."""
    same = tensor.dim() > 1 and tensor.shape[0] > 1 and tensor.stride(0) == 0 and 0 not in dims
    if not same:
        return function(tensor)
    small = function(tensor[:1])
    return small.expand(tensor.shape[0], *small.shape[1:])


def finite(value: Any) -> Any:
    """A constant without what is infinite: that starts no path (a mask in front of a softmax)."""
    if isinstance(value, Tensor):
        return value.nan_to_num(0.0, 0.0, 0.0) if value.is_floating_point() else value
    if isinstance(value, (int, float)):
        return value if math.isfinite(value) else 0.0
    return value


def lifted(c: Squares, value: Any) -> Lifted:
    """An argument as an activation.

    Raises:
        Undescribed: it is not known (a draw, the second result of an operation).
    """
    if value is None:
        raise Undescribed
    return c.lifted(finite(value))


def table(c: Listing, value: Any) -> Table:
    """An argument as a table of paths.

    Raises:
        UnsupportedOperationError: it is not known.
    """
    if value is UNKNOWN or value is None:
        raise c.refuse("one of its arguments is neither a constant nor made of paths")
    return c.table(finite(value))


def ones(c: Squares, shape: Sequence[int]) -> Lifted:
    """What has no scale: a mask or a sign. As an activation, it keeps every path."""
    return Lifted(c.ones().expand(torch.Size(shape)))
