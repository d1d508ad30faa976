"""Reductions: scales are tied over what is combined."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathlift.capture.program import Call
from pathlift.lifting.tables import Listing, Table, numbers
from pathlift.lifting.values import Lifted, Squares
from pathlift.operations.addition import pair_listing, pair_squares, together, zeros
from pathlift.operations.gains import coherent, magnitude, normalised, once, table
from pathlift.operations.table import NoPaths, Operation, Undescribed, define
from pathlift.symmetry.scales import Form, Value


def dims_of(rank: int, dim: Any) -> list[int]:
    """The dimensions that an argument names: none or no entry means all."""
    if dim is None or dim == []:
        return list(range(rank))
    named = [dim] if isinstance(dim, int) else dim
    return sorted({d % rank for d in named}) if rank else []


def reduced(inf: Any, x: Value, dim: Any, shape: torch.Size) -> Form:
    """The one scale along ``dim``, of the result's shape (with or without these dimensions)."""
    if not x.shape.numel():
        return Form(torch.Size(shape), why="nothing to reduce")
    dims = dims_of(len(x.shape), dim)
    first = inf.tie(inf.form(x), dims)

    def dropped(ids: Tensor) -> Tensor:
        if ids.dim() == len(shape):
            return ids
        for d in reversed(dims):
            ids = ids.squeeze(d)
        return ids

    return Form(torch.Size(shape), first.map(dropped, shape).terms, first.why)


def along(
    function: Callable[[Tensor], Tensor], x: Tensor, dims: Sequence[int], keepdim: bool
) -> Tensor:
    """``function`` keeps the reduced dimensions, ``keepdim`` says whether they stay."""
    out = once(function, x, dims)
    if not keepdim:
        for d in sorted(dims, reverse=True):
            out = out.squeeze(d)
    return out


def summed(x: Tensor, dims: Sequence[int], keepdim: bool, factor: float = 1.0) -> Tensor:
    """``factor`` times the sum over ``dims``."""
    if not dims:  # torch takes no dimension for all of them
        return x * factor
    return along(lambda t: t.sum(tuple(dims), keepdim=True) * factor, x, dims, keepdim)


def window(c: Squares, x: Lifted, dim: Any, keepdim: bool, averaged: bool = False) -> Lifted:
    """Every path into a reduced window: the sum over it, or the mean."""
    dims = dims_of(x.tensor.dim(), dim)
    count = float(max(math.prod(x.tensor.shape[d] for d in dims), 1)) if averaged else 1.0
    gain = coherent(c, x.gain, lambda t: summed(t, dims, keepdim, 1 / count))
    return normalised(Lifted(summed(x.tensor, dims, keepdim, count**-c.p), x.shift, gain))


def listed(c: Listing, x: Table, dim: Any, shape: Sequence[int], averaged: bool = False) -> Table:
    """The paths of everything that is reduced to one element."""
    dims = dims_of(len(x.shape), dim)
    kept = [1 if d in dims else n for d, n in enumerate(x.shape)]
    target = numbers(kept).expand(x.shape).reshape(-1).numpy().astype(np.int64) - 1
    share = math.prod(kept) / x.size if averaged and x.size else 1.0
    return c.mapped(x, shape, target, np.arange(x.size), share)


# ------------------------------------------------------------------------------- sums, extrema


def _reduction(averaged: bool) -> Operation:
    """Homogeneous of degree 1 over the reduced dimensions."""

    def scales(
        inf: Any, call: Call, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None
    ) -> Any:
        return zeros(call.shape) if x.zero else reduced(inf, x, dim, call.shape)

    def squares(
        c: Squares, call: Call, x: Lifted, dim: Any = None, keepdim: bool = False, dtype: Any = None
    ) -> Lifted:
        return window(c, x, dim, keepdim, averaged)

    def listing(
        c: Listing, call: Call, x: Table, dim: Any = None, keepdim: bool = False, dtype: Any = None
    ) -> Table:
        return listed(c, x, dim, call.shape, averaged)

    return Operation(scales, squares, listing)


define("mean", _reduction(averaged=True))
define("sum nansum", _reduction(averaged=False))


def _largest(c: Squares, x: Lifted, dim: Any, keepdim: bool) -> Lifted:
    """Every path through a maximum is kept; as a number it is at most the largest."""
    dims = dims_of(x.tensor.dim(), dim)
    out = window(c, Lifted(x.tensor, x.shift), dim, keepdim)
    if x.gain is None or not dims:
        return out if x.gain is None else x
    peak = along(lambda t: t.amax(tuple(dims), keepdim=True), x.gain, dims, keepdim)
    return Lifted(out.tensor, out.shift, peak * 2.0 ** (x.shift - out.shift))


def _extremum_scales(
    inf: Any, call: Call, x: Value, dim: Any = None, keepdim: bool = False, y: Value | None = None
) -> Any:
    """``max(x)``, ``max(x, dim)`` (values; indices carry no scale), ``max(x, y)``."""
    if y is not None:
        return together(inf, (x, y), call.shape)
    values = zeros(call.shape) if x.zero else reduced(inf, x, dim, call.shape)
    return [values, inf.fixed(call.shape)] if call.several else values


def _extremum_squares(
    c: Squares, call: Call, x: Any, dim: Any = None, keepdim: bool = False, y: Any = None
) -> Any:
    if y is not None:
        return pair_squares(c, call, x, y)
    values = _largest(c, x, dim, keepdim)
    return [values, None] if call.several else values


def _extremum_listing(
    c: Listing, call: Call, x: Any, dim: Any = None, keepdim: bool = False, y: Any = None
) -> Any:
    if y is not None:
        return pair_listing(c, call, x, y)
    return listed(c, table(c, x), dim, call.shape)


extremum = Operation(_extremum_scales, _extremum_squares, _extremum_listing)
define("max min amax amin", extremum)


def _both_scales(inf: Any, call: Call, x: Value, dim: Any = None, keepdim: bool = False) -> Any:
    """The smallest and the largest."""
    values = zeros(call.shape) if x.zero else reduced(inf, x, dim, call.shape)
    return [values, values]


def _both_squares(
    c: Squares, call: Call, x: Lifted, dim: Any = None, keepdim: bool = False
) -> list[Lifted]:
    return [_largest(c, x, dim, keepdim)] * 2


def _both_listing(
    c: Listing, call: Call, x: Table, dim: Any = None, keepdim: bool = False
) -> list[Table]:
    return [listed(c, x, dim, call.shape)] * 2


define("aminmax _aminmax", Operation(_both_scales, _both_squares, _both_listing))

# ------------------------------------------------------------------------------- spread

_NOT_LINEAR = NoPaths("it is a root or a square, so not piecewise linear in the network's input")


def _power_mean(
    x: Lifted, p: float, order: float, dims: list[int], keepdim: bool, averaged: bool
) -> Tensor:
    """The p-th power of ``sum |x|^order`` (or the mean), from the magnitudes of x."""
    found = summed(magnitude(x) ** (order / p), dims, keepdim)
    count = math.prod(x.tensor.shape[d] for d in dims)
    return (found / count if averaged and count else found) ** p


def _spread(degree: int, with_mean: bool) -> Operation:
    """A standard deviation is homogeneous of degree 1, a variance of degree 2."""

    def scales(
        inf: Any,
        call: Call,
        x: Value,
        dim: Any = None,
        unbiased: bool = True,
        correction: Any = None,
        keepdim: bool = False,
    ) -> Any:
        form = reduced(inf, x, dim, call.shape)
        return [form.scaled(degree), form] if with_mean else form.scaled(degree)

    def squares(
        c: Squares,
        call: Call,
        x: Lifted,
        dim: Any = None,
        unbiased: bool = True,
        correction: Any = None,
        keepdim: bool = False,
    ) -> Any:
        """A fixed gain: the mean of squares. (Paths pass through the mean.)"""
        c.approximate()
        dims = dims_of(x.tensor.dim(), dim)
        found = _power_mean(x, c.p or 1.0, 2, dims, keepdim, averaged=True)
        found = found if degree == 2 else found.sqrt()
        spread = normalised(Lifted(found, degree * x.shift, found))
        return [spread, window(c, x, dim, keepdim, averaged=True)] if with_mean else spread

    return Operation(scales, squares, _NOT_LINEAR)


define("var", _spread(2, with_mean=False))
define("std", _spread(1, with_mean=False))
define("var_mean", _spread(2, with_mean=True))
define("std_mean", _spread(1, with_mean=True))

# ------------------------------------------------------------------------------- norms

_ORDERS = (1, 2, math.inf, -math.inf)


def _norm_scales(
    inf: Any,
    call: Call,
    x: Value,
    order: Any,
    dim: Any,
) -> Any:
    """Homogeneous of degree 1 (others than these go through logarithms, which round)."""
    if order not in _ORDERS:
        raise Undescribed
    return zeros(call.shape) if x.zero else reduced(inf, x, dim, call.shape)


def _norm_squares(c: Squares, x: Lifted, order: Any, dim: Any, keepdim: bool) -> Lifted:
    statistic = Lifted(x.tensor, x.shift, magnitude(x))
    if order == 1:
        return window(c, statistic, dim, keepdim)
    if order in (math.inf, -math.inf):
        return _largest(c, statistic, dim, keepdim)
    if order != 2:
        raise Undescribed
    c.approximate()
    dims = dims_of(x.tensor.dim(), dim)
    gain = _power_mean(x, c.p or 1.0, 2, dims, keepdim, averaged=False).sqrt()
    return normalised(Lifted(gain, x.shift, gain))


def _norm_listing(c: Listing, call: Call, x: Table, order: Any, dim: Any) -> Table:
    if order not in (1, math.inf, -math.inf):
        raise c.refuse("this norm is not piecewise linear")
    return listed(c, x, dim, call.shape)


def _vector_norm_scales(
    inf: Any,
    call: Call,
    x: Value,
    ord: Any = 2,
    dim: Any = None,
    keepdim: Any = False,
    dtype: Any = None,
) -> Any:
    return _norm_scales(inf, call, x, ord, dim)


def _vector_norm_squares(
    c: Squares,
    call: Call,
    x: Lifted,
    ord: Any = 2,
    dim: Any = None,
    keepdim: Any = False,
    dtype: Any = None,
) -> Lifted:
    return _norm_squares(c, x, ord, dim, keepdim)


def _vector_norm_listing(
    c: Listing,
    call: Call,
    x: Table,
    ord: Any = 2,
    dim: Any = None,
    keepdim: Any = False,
    dtype: Any = None,
) -> Table:
    return _norm_listing(c, call, x, ord, dim)


define(
    "linalg_vector_norm",
    Operation(_vector_norm_scales, _vector_norm_squares, _vector_norm_listing),
)


def _old_norm_scales(
    inf: Any,
    call: Call,
    x: Value,
    p: Any = 2,
    dim: Any = None,
    keepdim: Any = False,
    dtype: Any = None,
) -> Any:
    return _norm_scales(inf, call, x, 2 if p is None else p, dim)


def _old_norm_squares(
    c: Squares,
    call: Call,
    x: Lifted,
    p: Any = 2,
    dim: Any = None,
    keepdim: Any = False,
    dtype: Any = None,
) -> Lifted:
    return _norm_squares(c, x, 2 if p is None else p, dim, keepdim)


def _old_norm_listing(
    c: Listing,
    call: Call,
    x: Table,
    p: Any = 2,
    dim: Any = None,
    keepdim: Any = False,
    dtype: Any = None,
) -> Table:
    return _norm_listing(c, call, x, 2 if p is None else p, dim)


define("norm", Operation(_old_norm_scales, _old_norm_squares, _old_norm_listing))
