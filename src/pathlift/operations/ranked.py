"""Order along one dimension, and running sums and extrema: scales are tied along it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pathlift.capture.program import Call
from pathlift.lifting.tables import Listing, Table
from pathlift.lifting.values import Lifted, Squares
from pathlift.operations.addition import zeros
from pathlift.operations.gains import once
from pathlift.operations.reduce import dims_of, listed, reduced, window
from pathlift.operations.table import Operation, define
from pathlift.symmetry.scales import Value


def _tied(inf: Any, x: Value, dim: int, shape: torch.Size) -> Any:
    """One scale along ``dim``, whatever its length in the result."""
    if x.zero or not x.shape.numel():
        return zeros(shape)
    dims = dims_of(len(x.shape), dim)
    return inf.tie(inf.form(x), dims).expand(shape)


def _rows(c: Listing, x: Table, shape: Sequence[int], dim: int, running: bool = False) -> Table:
    """Along ``dim``, every place takes the paths of all places (``running``: of those up to it)."""
    if not x.shape:
        return x.reshaped(tuple(shape))
    places = np.moveaxis(np.arange(np.prod(shape, dtype=np.int64)).reshape(shape), dim, -1)
    sources = np.moveaxis(np.arange(x.size).reshape(x.shape), dim, -1)
    m, n = places.shape[-1], sources.shape[-1]
    k, j = np.tril_indices(n) if running else np.indices((m, n)).reshape(2, -1)
    return c.mapped(x, shape, places[..., k].reshape(-1), sources[..., j].reshape(-1))


# ------------------------------------------------------------------------------- every place


def _everywhere(c: Squares, call: Call, x: Lifted, dim: int) -> list[Any]:
    """Any element may come to any place."""
    total = window(c, x, dim, keepdim=True)
    return [Lifted(total.tensor.expand(call.shape), total.shift), None]


def _sort_scales(
    inf: Any, call: Call, x: Value, dim: int = -1, descending: bool = False, stable: Any = None
) -> Any:
    return [_tied(inf, x, dim, call.shape), inf.fixed(call.shape)]


def _sort_squares(
    c: Squares, call: Call, x: Lifted, dim: int = -1, descending: bool = False, stable: Any = None
) -> Any:
    return _everywhere(c, call, x, dim)


def _sort_listing(
    c: Listing, call: Call, x: Table, dim: int = -1, descending: bool = False, stable: Any = None
) -> Table:
    return _rows(c, x, call.shape, dim)


def _topk_scales(
    inf: Any, call: Call, x: Value, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> Any:
    return [_tied(inf, x, dim, call.shape), inf.fixed(call.shape)]


def _topk_squares(
    c: Squares,
    call: Call,
    x: Lifted,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,
) -> Any:
    return _everywhere(c, call, x, dim)


def _topk_listing(
    c: Listing,
    call: Call,
    x: Table,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,
) -> Table:
    return _rows(c, x, call.shape, dim)


define("sort", Operation(_sort_scales, _sort_squares, _sort_listing))
define("topk", Operation(_topk_scales, _topk_squares, _topk_listing))

# ------------------------------------------------------------------------------- one place


def _ranked(default: int | None) -> Operation:
    """One element of each row, by its rank (``k``) or by how often it occurs."""

    def scales(
        inf: Any, call: Call, x: Value, k: Any = None, dim: Any = default, keepdim: bool = False
    ) -> Any:
        values = zeros(call.shape) if x.zero else reduced(inf, x, dim, call.shape)
        return [values, inf.fixed(call.shape)] if call.several else values

    def squares(
        c: Squares, call: Call, x: Lifted, k: Any = None, dim: Any = default, keepdim: bool = False
    ) -> Any:
        values = window(c, Lifted(x.tensor, x.shift), dim, keepdim)
        return [values, None] if call.several else values

    def listing(
        c: Listing, call: Call, x: Table, k: Any = None, dim: Any = default, keepdim: bool = False
    ) -> Table:
        return listed(c, x, dim, call.shape)

    return Operation(scales, squares, listing)


define("kthvalue mode", _ranked(-1))
define("median nanmedian", _ranked(None))

# ------------------------------------------------------------------------------- running


def _running_squares(c: Squares, x: Lifted, dim: int) -> Lifted:
    dims = dims_of(x.tensor.dim(), dim)
    return x.map(lambda t: once(lambda s: s.cumsum(dim), t, dims)).normalised()


def _cumsum_scales(inf: Any, call: Call, x: Value, dim: int, dtype: Any = None) -> Any:
    return _tied(inf, x, dim, call.shape)


def _cumsum_squares(c: Squares, call: Call, x: Lifted, dim: int, dtype: Any = None) -> Lifted:
    return _running_squares(c, x, dim)


def _cumsum_listing(c: Listing, call: Call, x: Table, dim: int, dtype: Any = None) -> Table:
    return _rows(c, x, call.shape, dim, running=True)


def _cummax_scales(inf: Any, call: Call, x: Value, dim: int) -> Any:
    return [_tied(inf, x, dim, call.shape), inf.fixed(call.shape)]


def _cummax_squares(c: Squares, call: Call, x: Lifted, dim: int) -> Any:
    """Every path through a maximum is kept."""
    return [_running_squares(c, x, dim), None]


def _cummax_listing(c: Listing, call: Call, x: Table, dim: int) -> Table:
    return _rows(c, x, call.shape, dim, running=True)


define("cumsum", Operation(_cumsum_scales, _cumsum_squares, _cumsum_listing))
define("cummax cummin", Operation(_cummax_scales, _cummax_squares, _cummax_listing))
