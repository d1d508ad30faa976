"""Writing into a tensor: scatter, index_add, index_put, slice_scatter and their kin.

All of them are one thing: ``read`` says which elements of the target are written, as an operation
that would pick them from it, and ``used`` which elements of the source go there, in the same order.
Known places are executed. Where the input decides, any source element may land anywhere along the
dimensions ``dims``: these are tied, and the lifted network spreads the source evenly over them (a
path through a source element lands in one place, so their number is kept).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathlift.capture.program import Call
from pathlift.lifting.tables import UNKNOWN, Listing, Table, numbers, stacked
from pathlift.lifting.values import Lifted, Squares
from pathlift.operations.constants import carries_any_scale, filler, started
from pathlift.operations.table import Undescribed
from pathlift.symmetry.scales import Form, Value, compact, varying

# Above this many elements each, zeros that are written to share scales along ``dims``, and a tensor
# that is written to is not followed element by element.
_MAX_ELEMENTS = 300_000
_MAX_WRITTEN = 20_000_000

# How a write joins what it brings with what is there.
SET, SUM, MEAN, MAX = "set", "sum", "mean", "max"
_MODES = {
    "sum": SUM,
    "add": SUM,
    "mean": MEAN,
    "amax": MAX,
    "amin": MAX,
}


def mode_of(reduce: str) -> str:
    """The kind of a reduction; a product with what is there has another scale."""
    if reduce not in _MODES:
        raise Undescribed
    return _MODES[reduce]


@dataclass(frozen=True)
class Write:
    """One write.

    Attributes:
        read: target (or anything of its shape) -> its elements that are written.
        used: source -> its elements that are written there, in the same shape.
        dims: dimensions of the target along which the input decides the place; none if it is known.
        along: dimensions along which the call chooses places, known or not.
        mode: how the source joins what is there.
        keep: whether what is there stays part of the result (where it is not replaced).
        alpha: factor of the source.
        aside: pairs of a dimension of the target and one of what is written, along which every
            slice is written alike.
    """

    read: Callable[[Tensor], Tensor]
    used: Callable[[Tensor], Tensor]
    dims: tuple[int, ...] = ()
    along: tuple[int, ...] = ()
    mode: str = SET
    keep: bool = True
    alpha: Any = 1
    aside: tuple[tuple[int, int], ...] = ()


# ------------------------------------------------------------------------------- scales


def written_scales(inf: Any, call: Call, x: Value, source: Any, write: Write) -> Any:
    """One scale for what is written and what it joins."""
    shape = call.shape
    zero = source.zero if isinstance(source, Value) else source == 0
    if x.zero and zero:
        return Value(shape, Form(shape), zero=True)
    form = inf.form(x).expand(shape)
    if carries_any_scale(source):
        return form
    value = source if isinstance(source, Value) else inf.fixed(())
    given = inf.form(value)
    free = carries_any_scale(x)
    if form.pinned and given.pinned and not free:
        return Form(shape, why=given.why)
    if write.mode == SET and not write.dims:
        alike = _alike(x, form, given, write)
        small = torch.Size(1 if d in dict(alike) else n for d, n in enumerate(shape))
        where = _places(small, write) if small.numel() <= _MAX_WRITTEN else None
        if where is not None and _all_differ(where, small.numel()):
            return _written_ids(inf, x, value, shape, where, write, alike)
    place = write.read(torch.zeros((), dtype=torch.int64).expand(shape)).shape
    if free:
        form = _free_form(inf, shape, place, write)
    elif write.dims:
        form = inf.tie(form, write.dims).expand(shape)
    read = form.map(lambda ids: compact(write.read(ids)), place)
    inf.equate(read, given.map(lambda ids: compact(write.used(ids)), place))
    return form


def _free_form(inf: Any, shape: torch.Size, place: torch.Size, write: Write) -> Form:
    """New scales for zeros that are written to, equal along dimensions of undecided places."""
    tied = write.dims
    if max(shape.numel(), place.numel()) > _MAX_ELEMENTS:
        tied = write.along
    moving = [d for d in range(len(shape)) if d not in tied]
    form: Form = inf.fresh_form(shape, moving)
    return form


def _all_differ(where: Tensor, count: int) -> bool:
    """Whether no position below ``count`` is written twice: marked, not sorted."""
    written = torch.zeros(count, dtype=torch.bool).index_fill_(0, where, True)
    return int(written.count_nonzero()) == where.numel()


def _places(shape: torch.Size, write: Write) -> Tensor:
    """Flat positions of the target that are written."""
    return write.read(torch.arange(shape.numel()).reshape(shape)).reshape(-1)


def _alike(x: Value, form: Form, given: Form, write: Write) -> list[tuple[int, int]]:
    """The pairs aside of a write along which no scale varies: one slice stands for all."""
    if x.zero and form.shape.numel() <= _MAX_ELEMENTS:
        return []  # every element gets a scale of its own
    there = frozenset[int]().union(*(varying(ids) for _, ids in form.terms))
    brought = frozenset[int]().union(*(varying(write.used(ids)) for _, ids in given.terms))
    return [(d, p) for d, p in write.aside if d not in there and p not in brought]


def _written_ids(
    inf: Any,
    x: Value,
    value: Value,
    shape: torch.Size,
    where: Tensor,
    write: Write,
    alike: list[tuple[int, int]],
) -> Form:
    """``where``: flat positions in one slice of the target along the dimensions ``alike``."""
    if x.zero and shape.numel() <= _MAX_ELEMENTS:
        ids = inf.fresh([shape.numel()]).reshape(shape)
    else:
        ids = inf.single(x).expand(shape)
    brought = write.used(inf.single(value))
    for d, p in alike:
        ids, brought = ids.narrow(d, 0, 1), brought.narrow(p, 0, 1)
    small = ids.shape
    ids = ids.reshape(-1).clone()
    ids[where] = brought.reshape(-1)
    if x.zero and shape.numel() > _MAX_ELEMENTS:
        ids = _filled(ids, where, small)
    return Form(shape, ((1, compact(ids.reshape(small)).expand(shape)),))


def _filled(ids: Tensor, where: Tensor, shape: torch.Size) -> Tensor:
    """Zeros around what is written take the scale of what is nearest along one dimension."""
    ids = ids.reshape(shape)
    written = torch.zeros(shape.numel(), dtype=torch.bool).index_fill(0, where, True)
    written = written.reshape(shape)
    for d in reversed(range(len(shape))):
        line = torch.arange(shape[d]).reshape([-1 if i == d else 1 for i in range(len(shape))])
        before = torch.where(written, line, -1).cummax(d).values
        first = written.to(torch.uint8).argmax(d, keepdim=True)
        ids = ids.gather(d, torch.where(before < 0, first, before))
        written = written.any(d, keepdim=True).expand(shape)
    return ids


# ------------------------------------------------------------------------------- squares


def written_squares(c: Squares, call: Call, x: Any, source: Any, write: Write) -> Lifted:
    """The paths of what is there (where it stays) and of what is written."""
    (base, given), shift = c.aligned((filler(c, x), filler(c, source)))
    shape = call.shape
    base = base.expand(shape)
    if not shape.numel():
        return Lifted(base, shift)
    values = write.used(given).reshape(-1) * c.coefficient(write.alpha)
    where = _places(shape, write).to(base.device)
    if write.dims:
        out = base + _spread(c, values, where, shape, write)
        return Lifted(out, shift).normalised()
    flat = base.reshape(-1)
    if write.mode == SET:
        return Lifted(flat.scatter(0, where, values).reshape(shape), shift)
    if not write.keep:
        flat = flat.index_fill(0, where, 0.0)
    out = flat.index_add(0, where, values)
    if write.mode == MEAN:
        out = out * _shares(shape, where, write).to(c.device, c.dtype) ** c.p
    return Lifted(out.reshape(shape), shift).normalised()


def _spread(c: Squares, values: Tensor, where: Tensor, shape: torch.Size, write: Write) -> Tensor:
    """What is written, evenly over the places that it may land in."""
    landed = values.new_zeros(shape.numel()).index_add(0, where, values).reshape(shape)
    first, places = landed, 1
    for d in write.dims:
        first = first.narrow(d, 0, 1)
        places *= shape[d]
    share = 1.0 / places
    if write.mode == MEAN:  # how many meet in one place is not known either: as many everywhere
        c.approximate()
        meeting = where.numel() / max(first.numel(), 1) / places
        share *= max(meeting, 1.0) ** -c.p
    return (first * share).expand(shape)


def _shares(shape: torch.Size, where: Tensor, write: Write) -> Tensor:
    """``1 / n`` per flat position, for means of n numbers."""
    count = torch.zeros(shape.numel(), dtype=torch.float64, device=where.device)
    count = count.index_add(0, where, torch.ones_like(where, dtype=torch.float64))
    if write.keep:
        count = count + 1
    return 1 / count.clamp_min(1)


# ------------------------------------------------------------------------------- listing


def written_listing(c: Listing, call: Call, x: Any, source: Any, write: Write) -> Table:
    """The same, path by path."""
    if write.dims:
        raise c.refuse("where it writes depends on the input")
    if x is UNKNOWN or source is UNKNOWN:
        raise Undescribed
    target, given = c.table(started(x)), c.table(started(source))
    shape = call.shape
    where = _places(shape, write)
    written = write.used(numbers(given.shape)).reshape(-1)
    there = numbers(target.shape).expand(shape).reshape(-1)
    if write.mode == SET:
        picked = there.scatter(0, where, written + target.size).reshape(shape)
        return c.picked(stacked([target, given.times(float(write.alpha))]), picked)
    share = np.ones(shape.numel())
    if write.mode == MEAN:
        share = _shares(shape, where, write).numpy()
    if not write.keep:
        there = there.index_fill(0, where, 0)
    kept = np.flatnonzero(there.numpy())
    stays = c.mapped(target, shape, kept, there.long().numpy()[kept] - 1, share[kept])
    out, weight = where.numpy(), share[where.numpy()] * float(write.alpha)
    brought = c.mapped(given, shape, out, written.long().numpy() - 1, weight)
    return c.sum(stays, brought)
