"""Picking elements by an index: index, index_select, gather, take.

A known index is executed on ids and on element numbers. For an index that the input decides, any
element may stand at any place: the dimensions it picks from are tied, and the lifted network holds
the sum over them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pathlift.capture.program import Call, Symbol
from pathlift.lifting.tables import Listing, Table, numbers
from pathlift.lifting.values import Lifted, Squares
from pathlift.operations.constants import known
from pathlift.operations.table import Operation, Undescribed, define
from pathlift.symmetry.scales import Form, Value, compact

# One entry per index of the call (None for a dimension that is kept).
Picked = Sequence[Tensor | None]
# The operation on a tensor, with these indices.
Read = Callable[[Call, Tensor, Picked], Tensor]
# Per index of the call, the dimensions that it picks from.
Dims = Callable[[Call], list[list[int]]]


def indices_of(call: Call) -> list[Symbol | None]:
    """The indices of a call, one or several."""
    return list(call["indices"]) if "indices" in call.arguments else [call["index"]]


def given(index: Any, indices: Any) -> list[Any]:
    """The same, of its arguments."""
    return [index] if indices is None else list(indices)


def settled(call: Call, found: Sequence[Tensor | None]) -> Picked:
    """Known indices, and zeros for those that are not."""
    return [
        None if symbol is None else torch.zeros(symbol.shape, dtype=torch.int64) if k is None else k
        for symbol, k in zip(indices_of(call), found, strict=True)
    ]


def undecided(call: Call, found: Sequence[Tensor | None], dims: Dims) -> list[int]:
    """The dimensions that indices pick from which are not known."""
    unknown = [
        (symbol, own)
        for symbol, k, own in zip(indices_of(call), found, dims(call), strict=True)
        if symbol is not None and k is None
    ]
    if any(symbol.dtype in (torch.bool, torch.uint8) for symbol, _ in unknown):
        raise Undescribed  # a mask that the input decides decides shapes too
    return [d for _, own in unknown for d in own]


def constants(values: Sequence[Any]) -> list[Tensor | None]:
    """The known ones among values of the scales reading."""
    return [v.constant if isinstance(v, Value) else None for v in values]


def known_ones(c: Squares, call: Call, values: Sequence[Any]) -> list[Tensor | None]:
    """The known ones among values of the squares reading."""
    return [known(c, s, v) for s, v in zip(indices_of(call), values, strict=True)]


def _picking(read: Read, dims: Dims) -> Operation:
    def scales(
        inf: Any,
        call: Call,
        x: Value,
        dim: Any = None,
        index: Any = None,
        indices: Any = None,
        sparse_grad: Any = None,
    ) -> Any:
        if x.zero:
            return Value(call.shape, Form(call.shape), zero=True)
        found = constants(given(index, indices))
        form = inf.form(x)
        tied = undecided(call, found, dims)
        if form.pinned:
            return Form(call.shape, why=form.why)
        if tied:
            form = inf.tie(form, tied).expand(x.shape)
        where = settled(call, found)
        return form.map(lambda ids: compact(read(call, ids, where)), call.shape)

    def squares(
        c: Squares,
        call: Call,
        x: Any,
        dim: Any = None,
        index: Any = None,
        indices: Any = None,
        sparse_grad: Any = None,
    ) -> Lifted:
        if x is None:
            raise Undescribed
        x = c.lifted(x)
        found = known_ones(c, call, given(index, indices))
        tied = undecided(call, found, dims)
        where = [None if w is None else w.to(x.tensor.device) for w in settled(call, found)]
        if not tied:
            gain = None if x.gain is None else read(call, x.gain.expand(x.tensor.shape), where)
            return Lifted(read(call, x.tensor, where), x.shift, gain)
        shape = x.tensor.shape
        total = x.tensor.sum(tied, keepdim=True).expand(shape) if shape else x.tensor
        return Lifted(read(call, total, where), x.shift).normalised()

    def listing(
        c: Listing,
        call: Call,
        x: Any,
        dim: Any = None,
        index: Any = None,
        indices: Any = None,
        sparse_grad: Any = None,
    ) -> Table:
        found = [i if isinstance(i, Tensor) else None for i in given(index, indices)]
        if not isinstance(x, Table) or undecided(call, found, dims):
            raise c.refuse("which elements it picks depends on the input")
        return c.picked(x, read(call, numbers(x.shape), found))

    return Operation(scales, squares, listing)


def index_dims(call: Call) -> list[list[int]]:
    """Dimensions of each index of ``index`` and ``index_put``; a mask takes as many as it has."""
    found, d = [], 0
    for symbol in indices_of(call):
        mask = symbol is not None and symbol.dtype in (torch.bool, torch.uint8)
        width = len(symbol.shape) if symbol is not None and mask else 1
        found.append(list(range(d, d + width)))
        d += width
    return found


def along(call: Call) -> list[list[int]]:
    """The one dimension that the call names."""
    return [[call["dim"] % max(len(call["self"].shape), 1)]]


def everywhere(call: Call) -> list[list[int]]:
    """All dimensions."""
    return [list(range(len(call["self"].shape)))]


def read_index(call: Call, tensor: Tensor, where: Picked) -> Tensor:
    """What ``index`` returns."""
    found: Tensor = torch.ops.aten.index.Tensor(tensor, list(where))
    return found


def read_along(call: Call, tensor: Tensor, where: Picked) -> Tensor:
    """What ``index_select`` returns."""
    (index,) = where
    assert index is not None
    return tensor.index_select(call["dim"], index)


def read_gathered(call: Call, tensor: Tensor, where: Picked) -> Tensor:
    """What ``gather`` returns."""
    (index,) = where
    assert index is not None
    return tensor.gather(call["dim"], index.long())


def read_taken(call: Call, tensor: Tensor, where: Picked) -> Tensor:
    """What ``take`` returns."""
    (index,) = where
    assert index is not None
    return tensor.take(index.long())


define("index _unsafe_index", _picking(read_index, index_dims))
define("index_select", _picking(read_along, along))
define("gather", _picking(read_gathered, along))
define("take", _picking(read_taken, everywhere))
