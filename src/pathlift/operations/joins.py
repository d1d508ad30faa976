"""Joining tensors: one after the other, in blocks, or element by element under a mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathlift.capture.program import Call
from pathlift.lifting.tables import UNKNOWN, Listing, Table, numbers, stacked
from pathlift.lifting.values import Lifted, Squares
from pathlift.operations.constants import carries_any_scale, filler, known, started
from pathlift.operations.table import Operation, Undescribed, define
from pathlift.symmetry.scales import Form, Value, collapse, compact, varying

# A known mask gives every element its own side's scale up to this many; beyond, both are equated.
_MAX_MASK = 300_000

# ------------------------------------------------------------------------------- cat and stack


def _live(tensors: Sequence[Any], shape: Sequence[int]) -> list[Any]:
    """Without the empty vectors that ``cat`` allows beside tensors of any rank."""
    return [t for t in tensors if _shape(t) != (0,) or len(shape) == 1]


def _shape(value: Any) -> tuple[int, ...]:
    if value is None or value is UNKNOWN:
        raise Undescribed
    return tuple(value.tensor.shape if isinstance(value, Lifted) else value.shape)


def _joined_ids(
    inf: Any, values: Sequence[Value], dim: int, shape: torch.Size, new: bool
) -> Form | Value:
    """Join single id tensors along ``dim``; where none varies, one slice stands for all."""
    if all(v.zero for v in values):
        return Value(shape, Form(shape), zero=True)
    if all(inf.form(v).pinned and not v.zero for v in values):
        return Form(shape)
    live = {k: inf.single(v) for k, v in enumerate(values) if not v.zero}
    if new:
        live = {k: t.unsqueeze(dim) for k, t in live.items()}
    beside = next(iter(live.values()))
    ids: list[Tensor] = [
        live[k] if k in live else _zeros_beside(inf, beside, dim, 1 if new else v.shape[dim])
        for k, v in enumerate(values)
    ]
    moving = frozenset().union(*(varying(t) for t in ids)) | {dim}
    index = tuple(slice(None) if d in moving else slice(0, 1) for d in range(len(shape)))
    joined = torch.cat([t[index] for t in ids], dim)
    return Form(shape, ((1, compact(joined).expand(shape)),))


def _zeros_beside(inf: Any, ids: Tensor, dim: int, count: int) -> Tensor:
    """Scales of zeros that are joined to ``ids``: new ones wherever those vary, so that the zeros
    tie nothing."""
    shape = [count if d == dim else n for d, n in enumerate(ids.shape)]
    small = [n if d == dim or d in varying(ids) else 1 for d, n in enumerate(shape)]
    if math.prod(small) <= _MAX_MASK:
        fresh: Tensor = inf.fresh(small)
        return fresh.expand(shape)
    return ids.narrow(dim, 0, 1).expand(shape)


def _cat_scales(inf: Any, call: Call, tensors: Sequence[Value], dim: int = 0) -> Any:
    live = _live(tensors, call.shape)
    return _joined_ids(inf, live, dim % len(call.shape), call.shape, new=False)


def _stack_scales(inf: Any, call: Call, tensors: Sequence[Value], dim: int = 0) -> Any:
    return _joined_ids(inf, tensors, dim % len(call.shape), call.shape, new=True)


def _joined_gain(
    live: Sequence[Any], shift: float, join: Callable[[list[Tensor], int], Tensor], dim: int
) -> Tensor | None:
    """The gains joined too, where all parts have one in the unit of the result."""
    gains = [
        t.gain.expand(t.tensor.shape)
        for t in live
        if isinstance(t, Lifted) and t.gain is not None and t.shift == shift
    ]
    return join(gains, dim) if len(gains) == len(live) else None


def _squares_of(join: Callable[[list[Tensor], int], Tensor]) -> Callable[..., Lifted]:
    def squares(c: Squares, call: Call, tensors: Sequence[Any], dim: int = 0) -> Lifted:
        live = _live(tensors, call.shape)
        parts, shift = c.aligned([filler(c, t) for t in live])
        return Lifted(join(parts, dim), shift, _joined_gain(live, shift, join, dim))

    return squares


def _listing_of(join: Callable[[list[Tensor], int], Tensor]) -> Callable[..., Table]:
    def listing(c: Listing, call: Call, tensors: Sequence[Any], dim: int = 0) -> Table:
        tables = [c.table(started(t)) for t in _live(tensors, call.shape)]
        starts = np.cumsum([0, *(t.size for t in tables)]).tolist()
        numbered = [numbers(t.shape) + s for t, s in zip(tables, starts[:-1], strict=True)]
        return c.picked(stacked(tables), join(numbered, dim))

    return listing


def _samples(call: Call) -> tuple[str, ...]:
    return ("tensors",) if call["dim"] % max(len(call.shape), 1) else ()


define(
    "cat",
    Operation(_cat_scales, _squares_of(torch.cat), _listing_of(torch.cat), samples=_samples),
)
define(
    "stack _stack",
    Operation(_stack_scales, _squares_of(torch.stack), _listing_of(torch.stack)),
)


# ------------------------------------------------------------------------------- blocks


def _blocks_scales(inf: Any, call: Call, tensors: Sequence[Value]) -> Any:
    """The zeros between the blocks may carry any scale: new ones."""
    if all(inf.form(v).pinned and not v.zero for v in tensors):
        return Form(call.shape)
    ids = torch.block_diag(*(inf.single(v) for v in tensors))
    empty = torch.block_diag(*(torch.ones(v.shape, dtype=torch.bool) for v in tensors)) == 0
    ids[empty] = inf.fresh([int(empty.sum())])
    return Form(call.shape, ((1, compact(ids)),))


def _blocks_squares(c: Squares, call: Call, tensors: Sequence[Any]) -> Lifted:
    parts, shift = c.aligned([filler(c, t) for t in tensors])
    return Lifted(torch.block_diag(*parts), shift)


def _blocks_listing(c: Listing, call: Call, tensors: Sequence[Any]) -> Table:
    if any(t is UNKNOWN for t in tensors):
        raise Undescribed
    tables = [c.table(t) for t in tensors]
    starts = np.cumsum([0, *(t.size for t in tables)]).tolist()
    numbered = [numbers(t.shape) + s for t, s in zip(tables, starts[:-1], strict=True)]
    return c.picked(stacked(tables), torch.block_diag(*numbered))


define("block_diag", Operation(_blocks_scales, _blocks_squares, _blocks_listing))


# ------------------------------------------------------------------------------- masks


def _valued(inf: Any, value: Any) -> Value:
    return value if isinstance(value, Value) else inf.fixed(())


def _chosen_scales(inf: Any, call: Call, mask: Value, x: Any, y: Any) -> Any:
    """``x`` where the mask is set, else ``y``. Zeros and infinities take the other side's scale."""
    shape = call.shape
    sides = [v for v in (x, y) if not carries_any_scale(v)]
    if not sides:
        zero = all(v.zero if isinstance(v, Value) else v == 0 for v in (x, y))
        return Value(shape, Form(shape), zero=True) if zero else Form(shape)
    forms = [inf.form(_valued(inf, v)) for v in sides]
    if len(sides) == 1 or all(f.pinned for f in forms):
        return forms[0].expand(shape)
    left, right = forms
    chosen = None if mask.constant is None else collapse(mask.constant.bool())
    if chosen is None or chosen.numel() > _MAX_MASK:
        inf.equate(left, right)
        return left.expand(shape)
    first, second = (collapse(inf.single(_valued(inf, v))) for v in sides)
    if torch.broadcast_shapes(chosen.shape, first.shape, second.shape).numel() > _MAX_MASK:
        inf.equate(left, right)
        return left.expand(shape)
    ids = torch.where(chosen, first, second)
    return Form(shape, ((1, compact(ids).expand(shape)),))


def _chosen_squares(c: Squares, call: Call, mask: Tensor | None, x: Any, y: Any) -> Lifted:
    """A known mask chooses; another one keeps the paths of both sides."""
    (left, right), shift = c.aligned((filler(c, x), filler(c, y)))
    out = left + right if mask is None else torch.where(mask.bool(), left, right)
    return Lifted(out.expand(call.shape), shift)


def _chosen_listing(c: Listing, call: Call, mask: Any, x: Any, y: Any) -> Table:
    if x is UNKNOWN or y is UNKNOWN:
        raise Undescribed
    left, right = c.table(started(x)), c.table(started(y))
    if not isinstance(mask, Tensor):
        return c.expanded(c.sum(left, right), call.shape)
    first, second = numbers(left.shape), numbers(right.shape) + left.size
    picked = torch.where(mask.bool(), first, second).expand(call.shape)
    return c.picked(stacked([left, right]), picked)


def _where_scales(inf: Any, call: Call, condition: Value, x: Any = None, y: Any = None) -> Any:
    if x is None or y is None:  # the positions of a mask, known only at run time
        raise Undescribed
    return _chosen_scales(inf, call, condition, x, y)


def _where_squares(c: Squares, call: Call, condition: Any, x: Any, y: Any) -> Lifted:
    return _chosen_squares(c, call, known(c, call["condition"], condition), x, y)


def _where_listing(c: Listing, call: Call, condition: Any, x: Any, y: Any) -> Table:
    return _chosen_listing(c, call, condition, x, y)


define("where", Operation(_where_scales, _where_squares, _where_listing))


def _fill_scales(inf: Any, call: Call, x: Value, mask: Value, value: Any) -> Any:
    return _chosen_scales(inf, call, mask, value, x)


def _fill_squares(c: Squares, call: Call, x: Any, mask: Any, value: Any) -> Lifted:
    return _chosen_squares(c, call, known(c, call["mask"], mask), value, x)


def _fill_listing(c: Listing, call: Call, x: Any, mask: Any, value: Any) -> Table:
    return _chosen_listing(c, call, mask, value, x)


define("masked_fill", Operation(_fill_scales, _fill_squares, _fill_listing))
