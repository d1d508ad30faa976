"""Operations that write into a tensor, each a :class:`~pathlift.operations.writes.Write`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pathlift.capture.program import Call
from pathlift.operations.constants import known
from pathlift.operations.picks import (
    Dims,
    Picked,
    Read,
    along,
    constants,
    everywhere,
    index_dims,
    known_ones,
    read_along,
    read_gathered,
    read_index,
    read_taken,
    settled,
    undecided,
)
from pathlift.operations.table import Operation, define
from pathlift.operations.writes import (
    SET,
    SUM,
    Write,
    mode_of,
    written_listing,
    written_scales,
    written_squares,
)

# ------------------------------------------------------------------------------- by an index

# Source -> the elements that are written, given the call and the shape of what is written.
Used = Callable[[Call, Tensor, torch.Size], Tensor]


def _whole(call: Call, source: Tensor, shape: torch.Size) -> Tensor:
    return source.expand(shape)


def _corner(call: Call, source: Tensor, shape: torch.Size) -> Tensor:
    """``scatter`` reads ``source[i, j]`` for the positions of its index alone."""
    if source.dim() < len(shape):
        return source.expand(shape)
    return source[tuple(slice(0, n) for n in shape)]


def _flat(call: Call, source: Tensor, shape: torch.Size) -> Tensor:
    return source.reshape(shape) if source.numel() == shape.numel() else source.expand(shape)


def _write(
    call: Call, found: Sequence[Tensor | None], dims: Dims, read: Read, used: Used, **more: Any
) -> Write:
    tied = undecided(call, found, dims)
    where: Picked = settled(call, found)
    shape = call["self"].shape

    def here(t: Tensor) -> Tensor:
        return read(call, t, [None if w is None else w.to(t.device) for w in where])

    place = here(torch.zeros((), dtype=torch.int64).expand(shape)).shape
    return Write(
        here,
        lambda t: used(call, t, place),
        tuple(sorted(set(tied))),
        tuple(d for own in dims(call) for d in own),
        **more,
    )


# Arguments besides target, index and source -> mode, keep and alpha of the write.
Manner = Callable[..., dict[str, Any]]


def _writing(dims: Dims, read: Read, used: Used, manner: Manner) -> Operation:
    """One entry; the source comes under any of the names that schemas have for it."""

    def scales(
        inf: Any,
        call: Call,
        x: Any,
        dim: Any = None,
        index: Any = None,
        indices: Any = None,
        src: Any = None,
        source: Any = None,
        values: Any = None,
        value: Any = None,
        reduce: Any = None,
        include_self: Any = True,
        accumulate: Any = False,
        alpha: Any = 1,
    ) -> Any:
        found = constants([index] if indices is None else indices)
        more = manner(reduce, include_self, accumulate, alpha)
        write = _write(call, found, dims, read, used, **more)
        return written_scales(inf, call, x, _source(src, source, values, value), write)

    def squares(
        c: Any,
        call: Call,
        x: Any,
        dim: Any = None,
        index: Any = None,
        indices: Any = None,
        src: Any = None,
        source: Any = None,
        values: Any = None,
        value: Any = None,
        reduce: Any = None,
        include_self: Any = True,
        accumulate: Any = False,
        alpha: Any = 1,
    ) -> Any:
        found = known_ones(c, call, [index] if indices is None else indices)
        more = manner(reduce, include_self, accumulate, alpha)
        write = _write(call, found, dims, read, used, **more)
        return written_squares(c, call, x, _source(src, source, values, value), write)

    def listing(
        c: Any,
        call: Call,
        x: Any,
        dim: Any = None,
        index: Any = None,
        indices: Any = None,
        src: Any = None,
        source: Any = None,
        values: Any = None,
        value: Any = None,
        reduce: Any = None,
        include_self: Any = True,
        accumulate: Any = False,
        alpha: Any = 1,
    ) -> Any:
        all_of = [index] if indices is None else indices
        found = [i if isinstance(i, Tensor) else None for i in all_of]
        more = manner(reduce, include_self, accumulate, alpha)
        write = _write(call, found, dims, read, used, **more)
        return written_listing(c, call, x, _source(src, source, values, value), write)

    return Operation(scales, squares, listing)


def _source(*values: Any) -> Any:
    return next((v for v in values if v is not None), None)


def _replaces(reduce: Any, include_self: Any, accumulate: Any, alpha: Any) -> dict[str, Any]:
    """``accumulate`` or ``reduce`` where the overload has one, else what was there is replaced."""
    if reduce is not None:
        return {"mode": mode_of(reduce), "keep": bool(include_self)}
    return {"mode": SUM if accumulate else SET}


def _adds(reduce: Any, include_self: Any, accumulate: Any, alpha: Any) -> dict[str, Any]:
    return {"mode": SUM, "alpha": alpha}


define("scatter scatter_reduce", _writing(along, read_gathered, _corner, _replaces))
define("scatter_add", _writing(along, read_gathered, _corner, _adds))
define("index_copy index_fill index_reduce", _writing(along, read_along, _whole, _replaces))
define("index_add", _writing(along, read_along, _whole, _adds))
define("index_put _unsafe_index_put", _writing(index_dims, read_index, _whole, _replaces))
define("put", _writing(everywhere, read_taken, _flat, _replaces))


# ------------------------------------------------------------------------------- into a view


def _select(call: Call, t: Tensor) -> Tensor:
    return t.select(call["dim"], call["index"])


def _slice(call: Call, t: Tensor) -> Tensor:
    limits = (call[name] for name in ("dim", "start", "end", "step"))
    found: Tensor = torch.ops.aten.slice.Tensor(t, *limits)
    return found


def _diagonal(call: Call, t: Tensor) -> Tensor:
    return t.diagonal(call["offset"], call["dim1"], call["dim2"])


def _into(view: Callable[[Call, Tensor], Tensor], *chosen: str) -> Operation:
    """``view`` of the target is replaced by the source; ``chosen``: arguments that name the
    dimensions it is about. The others keep their order."""

    def write(call: Call) -> Write:
        shape = view(call, torch.zeros((), dtype=torch.int64).expand(call.shape)).shape
        rank = len(call.shape)
        own = {call[name] % rank for name in chosen}
        others = [d for d in range(rank) if d not in own]
        places = others if len(shape) == rank else range(len(others))
        aside = tuple(zip(others, places, strict=True))
        return Write(lambda t: view(call, t), lambda t: t.expand(shape), aside=aside)

    # The arguments of the three views, which ``view`` takes from the call.
    def scales(
        inf: Any,
        call: Call,
        x: Any,
        src: Any,
        dim: Any = None,
        index: Any = None,
        start: Any = None,
        end: Any = None,
        step: Any = None,
        offset: Any = None,
        dim1: Any = None,
        dim2: Any = None,
    ) -> Any:
        return written_scales(inf, call, x, src, write(call))

    def squares(
        c: Any,
        call: Call,
        x: Any,
        src: Any,
        dim: Any = None,
        index: Any = None,
        start: Any = None,
        end: Any = None,
        step: Any = None,
        offset: Any = None,
        dim1: Any = None,
        dim2: Any = None,
    ) -> Any:
        return written_squares(c, call, x, src, write(call))

    def listing(
        c: Any,
        call: Call,
        x: Any,
        src: Any,
        dim: Any = None,
        index: Any = None,
        start: Any = None,
        end: Any = None,
        step: Any = None,
        offset: Any = None,
        dim1: Any = None,
        dim2: Any = None,
    ) -> Any:
        return written_listing(c, call, x, src, write(call))

    return Operation(scales, squares, listing)


define("select_scatter", _into(_select, "dim"))
define("slice_scatter", _into(_slice, "dim"))
define("diagonal_scatter", _into(_diagonal, "dim1", "dim2"))


# ------------------------------------------------------------------------------- under a mask


def _masked(call: Call, mask: Tensor | None) -> Write:
    """The source's elements go, in order, to where the mask is set."""
    shape = call.shape
    if mask is not None:
        chosen = mask.bool().expand(shape)
        count = int(chosen.sum())
        return Write(lambda t: t[chosen.to(t.device)], lambda t: t.reshape(-1)[:count])
    count = math.prod(call["source"].shape)
    return Write(
        lambda t: t.reshape(-1)[:1].expand(count),
        lambda t: t.reshape(-1),
        tuple(range(len(shape))),
        tuple(range(len(shape))),
    )


def _masked_scales(inf: Any, call: Call, x: Any, mask: Any, source: Any) -> Any:
    return written_scales(inf, call, x, source, _masked(call, mask.constant))


def _masked_squares(c: Any, call: Call, x: Any, mask: Any, source: Any) -> Any:
    write = _masked(call, known(c, call["mask"], mask))
    return written_squares(c, call, x, source, write)


def _masked_listing(c: Any, call: Call, x: Any, mask: Any, source: Any) -> Any:
    write = _masked(call, mask if isinstance(mask, Tensor) else None)
    return written_listing(c, call, x, source, write)


define("masked_scatter", Operation(_masked_scales, _masked_squares, _masked_listing))
