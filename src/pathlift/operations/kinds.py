"""The kinds of operations: what most of them are, with all three readings.

identity    positively homogeneous, element by element: ``f(2^s x) = 2^s f(x)``
moves       every element of the result is an element of the one input (or 0)
smooth      no scale passes and no path is defined: the input is pinned
shapes_only takes a shape from its arguments, not values
degree 0    a positive scale changes nothing (sign, isnan): the result has no scale

A kind is an :class:`~pathlift.operations.table.Operation`; ``kind.but(squares=...)`` is the kind
with a reading of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathlift.capture.program import Call, symbols_in
from pathlift.lifting.tables import UNKNOWN, Listing, Table, numbers
from pathlift.lifting.values import Lifted, Squares
from pathlift.operations.table import NoPaths, Operation, Undescribed
from pathlift.symmetry.scales import Form, Value, compact

NOT_LINEAR = NoPaths("it is not piecewise linear in the network's input")


# ------------------------------------------------------------------------------- identity


def _identity_scales(inf: Any, call: Call, x: Value, **_: Any) -> Any:
    return [x, *(inf.fixed(s.shape) for s in list(symbols_in(call.outputs))[1:])]


def _identity_squares(c: Squares, call: Call, x: Lifted, **_: Any) -> Any:
    return Lifted(x.tensor, x.shift, x.gain)


def _identity_listing(c: Listing, call: Call, x: Table, **_: Any) -> Any:
    return x


identity = Operation(_identity_scales, _identity_squares, _identity_listing)


# ------------------------------------------------------------------------------- moves


def _moves_scales(inf: Any, call: Call, x: Value, **others: Any) -> Any:
    """Run on the ids; what had to be copied is brought back to views."""
    if any(isinstance(v, Value) and v.constant is None for v in others.values()):
        raise Undescribed
    outputs = list(symbols_in(call.outputs))
    if x.zero:
        zeros = [Value(s.shape, Form(s.shape), zero=True) for s in outputs]
        return zeros if call.several else zeros[0]
    form = inf.form(x)
    parts = [_pieces(call, ids) for _, ids in form.terms]
    made = [
        Form(
            s.shape, tuple((c, p[k]) for (c, _), p in zip(form.terms, parts, strict=True)), form.why
        )
        for k, s in enumerate(outputs)
    ]
    return made if call.several else made[0]


def _pieces(call: Call, ids: Tensor) -> list[Tensor]:
    found = call.run(**_first(call, ids))
    several = list(found) if isinstance(found, (list, tuple)) else [found]
    same = ids.untyped_storage().data_ptr()
    return [t if t.untyped_storage().data_ptr() == same else compact(t) for t in several]


def _first(call: Call, tensor: Tensor) -> dict[str, Tensor]:
    """The operation's input replaced."""
    return {("input" if "input" in call.arguments else "self"): tensor}


def _moves_squares(c: Squares, call: Call, x: Lifted, **others: Any) -> Any:
    found = call.run(**_first(call, x.tensor))
    if isinstance(found, (list, tuple)):
        return [Lifted(t, x.shift) for t in found]
    return Lifted(found, x.shift, None if x.gain is None else call.run(**_first(call, x.gain)))


def _moves_listing(c: Listing, call: Call, x: Table, **others: Any) -> Any:
    found = call.run(**_first(call, numbers(x.shape)))
    if isinstance(found, (list, tuple)):
        return [c.picked(x, n) for n in found]
    return c.picked(x, found)


moves = Operation(_moves_scales, _moves_squares, _moves_listing)


# ------------------------------------------------------------------------------- no paths


def _pinned_scales(inf: Any, call: Call, **arguments: Any) -> Any:
    raise Undescribed  # everything is pinned, and the report names the operation


smooth = Operation(_pinned_scales, NOT_LINEAR, NOT_LINEAR)


def _shape_scales(inf: Any, call: Call, **arguments: Any) -> Any:
    zero = "zeros" in call.name
    made = [Value(s.shape, Form(s.shape), zero=zero) for s in symbols_in(call.outputs)]
    return made if call.several else made[0]


def _shape_squares(c: Squares, call: Call, **arguments: Any) -> Any:
    return c.placed(torch.zeros(call.shape)) if "zeros" in call.name else None


shapes_only = Operation(_shape_scales, _shape_squares, lambda c, call, **_: UNKNOWN)


def _degree_zero_scales(inf: Any, call: Call, x: Value, **_: Any) -> Any:
    return inf.fixed(call.shape)


degree_zero = Operation(_degree_zero_scales, NOT_LINEAR, NOT_LINEAR, changes_dtype=True)
