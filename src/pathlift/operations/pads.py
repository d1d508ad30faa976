"""Padding, in all modes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pathlift.capture.program import Call
from pathlift.lifting.tables import Listing, Table, constant, numbers
from pathlift.lifting.values import Lifted, Squares
from pathlift.operations.constants import carries_any_scale, started
from pathlift.operations.table import Operation, define
from pathlift.symmetry.scales import Form, Value, compact

# ------------------------------------------------------------------------------- constant borders


def _constant_scales(inf: Any, call: Call, x: Value, pad: Sequence[int], fill: float) -> Any:
    """Zeros may carry any scale, other numbers have scale 0."""
    free = carries_any_scale(fill)
    if x.zero and fill == 0:
        return Value(call.shape, Form(call.shape), zero=True)
    if inf.form(x).pinned:
        return Form(call.shape, why=inf.form(x).why)
    ids = inf.single(x)
    rank = ids.dim()
    for k in range(len(pad) // 2):
        if pad[2 * k] or pad[2 * k + 1]:
            ids = _bordered(inf, ids, rank - 1 - k, pad[2 * k], pad[2 * k + 1], free)
    return Form(call.shape, ((1, ids),))


def _bordered(inf: Any, ids: Tensor, d: int, before: int, after: int, free: bool) -> Tensor:
    wide = list(ids.shape)
    wide[d] += before + after
    if free and ids.size(d) and (ids.stride(d) == 0 or ids.size(d) == 1):
        return ids.narrow(d, 0, 1).expand(wide)  # zeros take their neighbour's
    start, stop = max(-before, 0), ids.size(d) - max(-after, 0)
    parts = [ids.narrow(d, start, stop - start)]
    for count, front in ((before, True), (after, False)):
        if count > 0:
            edge = [1 if ids.stride(i) == 0 else n for i, n in enumerate(ids.shape)]
            full = list(ids.shape)
            edge[d] = full[d] = count
            border = inf.fresh(edge) if free else torch.zeros(edge, dtype=torch.int64)
            parts.insert(0 if front else len(parts), border.expand(full))
    return compact(torch.cat(parts, d))


def _constant_squares(c: Squares, call: Call, x: Lifted, pad: Sequence[int], fill: float) -> Lifted:
    out = x.map(lambda t: F.pad(t, list(pad)))
    start = started(fill)
    if not start:
        return out
    border = 1 - F.pad(c.ones(x.tensor.shape), list(pad))
    return c.plus(out, Lifted(border * c.coefficient(start)))


def _constant_listing(c: Listing, call: Call, x: Table, pad: Sequence[int], fill: float) -> Table:
    padded = F.pad(numbers(x.shape), list(pad))
    out = c.picked(x, padded)
    start = started(fill)
    return c.sum(out, constant((padded == 0) * start)) if start else out


# ------------------------------------------------------------------------------- copied borders


def _sources(shape: Sequence[int], pad: Sequence[int], mode: str) -> dict[int, Tensor]:
    """Per padded dimension, the position that each position of the result is a copy of."""
    found = {}
    for k in range(len(pad) // 2):
        before, after = pad[2 * k], pad[2 * k + 1]
        if before or after:
            d = len(shape) - 1 - k
            line = torch.arange(shape[d], dtype=torch.float64)[None, None]
            found[d] = F.pad(line, (before, after), mode=mode)[0, 0].long()
    return found


def _copied_scales(inf: Any, call: Call, x: Value, pad: Sequence[int], mode: str) -> Any:
    if x.zero:
        return Value(call.shape, Form(call.shape), zero=True)
    where = _sources(x.shape, pad, mode)

    def run(ids: Tensor) -> Tensor:
        for d, positions in where.items():
            if ids.stride(d) == 0:
                wide = [len(positions) if i == d else n for i, n in enumerate(ids.shape)]
                ids = ids.narrow(d, 0, 1).expand(wide)
            else:
                ids = compact(ids.index_select(d, positions))
        return ids

    return inf.form(x).map(run, call.shape)


def _copied(tensor: Tensor, pad: Sequence[int], mode: str) -> Tensor:
    for d, positions in _sources(tensor.shape, pad, mode).items():
        tensor = tensor.index_select(d, positions.to(tensor.device))
    return tensor


def _copied_squares(c: Squares, call: Call, x: Lifted, pad: Sequence[int], mode: str) -> Lifted:
    gain = None if x.gain is None else _copied(x.gain.expand(x.tensor.shape), pad, mode)
    return Lifted(_copied(x.tensor, pad, mode), x.shift, gain)


def _copied_listing(c: Listing, call: Call, x: Table, pad: Sequence[int], mode: str) -> Table:
    return c.picked(x, _copied(numbers(x.shape), pad, mode))


# ------------------------------------------------------------------------------- entries


def _pad_scales(
    inf: Any, call: Call, x: Value, pad: Any, mode: str = "constant", value: Any = None
) -> Any:
    if mode == "constant":
        return _constant_scales(inf, call, x, pad, value or 0.0)
    return _copied_scales(inf, call, x, pad, mode)


def _pad_squares(
    c: Squares, call: Call, x: Lifted, pad: Any, mode: str = "constant", value: Any = None
) -> Lifted:
    if mode == "constant":
        return _constant_squares(c, call, x, pad, value or 0.0)
    return _copied_squares(c, call, x, pad, mode)


def _pad_listing(
    c: Listing, call: Call, x: Table, pad: Any, mode: str = "constant", value: Any = None
) -> Table:
    if mode == "constant":
        return _constant_listing(c, call, x, pad, value or 0.0)
    return _copied_listing(c, call, x, pad, mode)


define("pad constant_pad_nd", Operation(_pad_scales, _pad_squares, _pad_listing))


def _borders(mode: str) -> Operation:
    """Padding of one mode that has operations of its own."""
    return Operation(
        lambda inf, call, x, padding: _copied_scales(inf, call, x, padding, mode),
        lambda c, call, x, padding: _copied_squares(c, call, x, padding, mode),
        lambda c, call, x, padding: _copied_listing(c, call, x, padding, mode),
    )


define("reflection_pad1d reflection_pad2d reflection_pad3d", _borders("reflect"))
define("replication_pad1d replication_pad2d replication_pad3d", _borders("replicate"))
