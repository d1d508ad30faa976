"""Operations on two tensors that need equal scales: sums, extrema, bounds, comparisons, copies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from pathlift.capture.program import Call
from pathlift.lifting.tables import Listing, Table
from pathlift.lifting.values import Lifted, Squares
from pathlift.operations.gains import expanded, lifted, normalised, table, times
from pathlift.operations.kinds import NOT_LINEAR
from pathlift.operations.pointwise import mask
from pathlift.operations.table import Operation, Undescribed, define
from pathlift.symmetry.scales import Form, Value


def _both(call: Call) -> tuple[str, ...]:
    return ("x", "y")


# ------------------------------------------------------------------------------- scales


def zeros(shape: Sequence[int]) -> Value:
    """A result that is exactly zero: any scale is right."""
    return Value(torch.Size(shape), Form(torch.Size(shape)), zero=True)


def together(inf: Any, values: Sequence[Value], shape: torch.Size) -> Value | Form:
    """All values, broadcast to ``shape``, have one scale per element; zeros have any."""
    live = [v for v in values if not v.zero]
    if not live:
        return zeros(shape)
    kept = live[0]
    for value in live[1:]:
        kept = _align(inf, kept, value)
    form: Form = inf.form(kept).expand(shape)
    return form


def _align(inf: Any, x: Value, y: Value) -> Value:
    shape = torch.broadcast_shapes(x.shape, y.shape)
    for one, other in ((x, y), (y, x)):
        if inf.is_new(one) and not inf.is_new(other):
            _bind_broadcast(inf, one, inf.form(other).expand(shape))
            return other
    inf.equate(inf.elementwise_form(x), inf.elementwise_form(y))
    return x if len(inf.form(x).terms) <= len(inf.form(y).terms) else y


def _bind_broadcast(inf: Any, parameter: Value, form: Form) -> None:
    """Bind a parameter added to ``form`` under broadcasting."""
    shape, own = form.shape, parameter.shape
    offset = len(shape) - len(own)
    dims = [d for d in range(len(shape)) if d < offset or own[d - offset] != shape[d]]
    tied = inf.tie(form, dims)
    inf.bind(parameter, tied.map(lambda t: t.reshape(own), own))


def free(bound: Any) -> bool:
    """Whether comparing with it says the same at any scale: nothing, 0 and infinity."""
    if isinstance(bound, Value):
        if bound.zero or bound.constant is None:
            return bound.zero
        return bool(((bound.constant == 0) | torch.isinf(bound.constant)).all())
    return bound is None or bound == 0 or (isinstance(bound, float) and math.isinf(bound))


def _add_scales(inf: Any, call: Call, x: Value, y: Any, alpha: Any = 1) -> Any:
    """Terms of a sum have equal scales."""
    if isinstance(y, Value):
        return together(inf, (x, y), call.shape)
    if y == 0:
        return together(inf, (x,), call.shape)
    if not x.zero:
        inf.pin_all("add a constant", [x])
    return inf.fixed(call.shape)


def _pair_scales(inf: Any, call: Call, x: Any, y: Any) -> Any:
    """Homogeneous in both together; a number has no scale."""
    values = [v for v in (x, y) if isinstance(v, Value)]
    if len(values) < 2:
        inf.pin_all(f"{call.name} with a number", values)
        return inf.fixed(call.shape)
    return together(inf, values, call.shape)


# ------------------------------------------------------------------------------- squares, listing


def total(c: Squares, call: Call, parts: Sequence[Lifted], as_numbers: bool = False) -> Lifted:
    """The paths of all parts; ``as_numbers``: their gains add too, where all have one."""
    tensors, shift = c.aligned(parts)
    out = tensors[0]
    for tensor in tensors[1:]:
        out = out + tensor
    gain = None
    gains = [(p.gain, p.shift) for p in parts if p.gain is not None]
    if as_numbers and c.p and len(gains) == len(parts):
        moved = [g * 2.0 ** max(min(s - shift, 1000), -1000) for g, s in gains]
        gain = torch.stack(torch.broadcast_tensors(*(g ** (1 / c.p) for g in moved))).sum(0) ** c.p
        gain = gain.expand(call.shape)
    return normalised(Lifted(out.expand(call.shape), shift, gain))


def _as_number(c: Squares, value: Any) -> Lifted:
    """An argument; a constant's gain is its own magnitude."""
    x = lifted(c, value)
    return x if isinstance(value, Lifted) else Lifted(x.tensor, x.shift, x.tensor)


def _sum(first: int, second: int, alpha_of: str) -> Operation:
    """``first * x + second * y``, with ``alpha`` times x or y."""

    def factors(alpha: Any) -> tuple[Any, Any]:
        return (first * alpha, second) if alpha_of == "x" else (first, second * alpha)

    def squares(c: Squares, call: Call, x: Any, y: Any, alpha: Any = 1) -> Lifted:
        a, b = factors(alpha)
        # A statistic plus a positive constant is one; a difference is not.
        positive = not isinstance(alpha, complex) and a > 0 and b > 0
        parts = [times(_as_number(c, v), abs(f) ** c.p if f else 0.0) for v, f in ((x, a), (y, b))]
        return total(c, call, parts, as_numbers=positive)

    def listing(c: Listing, call: Call, x: Any, y: Any, alpha: Any = 1) -> Table:
        a, b = factors(alpha)
        return c.sum(table(c, x).times(float(a)), table(c, y).times(float(b)))

    return Operation(_add_scales, squares, listing, samples=_both)


define("add", _sum(1, 1, "y"))
define("sub", _sum(1, -1, "y"))
define("rsub", _sum(-1, 1, "x"))


def pair_squares(c: Squares, call: Call, x: Any, y: Any) -> Lifted:
    """Every path through a maximum is kept."""
    return total(c, call, (lifted(c, x), lifted(c, y)))


def pair_listing(c: Listing, call: Call, x: Any, y: Any) -> Table:
    """The paths of both."""
    return c.sum(table(c, x), table(c, y))


define(
    "maximum minimum fmax fmin",
    Operation(_pair_scales, pair_squares, pair_listing, samples=_both),
)


def _hypot_squares(c: Squares, call: Call, x: Any, y: Any) -> Lifted:
    c.approximate()
    return pair_squares(c, call, x, y)


def _remainder_squares(c: Squares, call: Call, x: Any, y: Any) -> Lifted:
    c.approximate()
    moving = x if isinstance(x, Lifted) else y
    return expanded(lifted(c, moving), call.shape)


define("hypot", Operation(_pair_scales, _hypot_squares, NOT_LINEAR))
define("fmod remainder", Operation(_pair_scales, _remainder_squares, NOT_LINEAR))


def _copysign_scales(inf: Any, call: Call, x: Value, y: Any) -> Any:
    """Of the second only the sign is read."""
    return together(inf, (x,), call.shape)


def _copysign_squares(c: Squares, call: Call, x: Any, y: Any) -> Lifted:
    return expanded(lifted(c, x), call.shape)


def _copysign_listing(c: Listing, call: Call, x: Any, y: Any) -> Table:
    return c.expanded(table(c, x), call.shape)


define("copysign", Operation(_copysign_scales, _copysign_squares, _copysign_listing))

# ------------------------------------------------------------------------------- bounds


def _clamp_scales(inf: Any, call: Call, x: Value, min: Any = None, max: Any = None) -> Any:
    """Homogeneous in values and bounds together; bounds of 0 and infinity have any scale."""
    bounds = [b for b in (min, max) if not free(b)]
    if not all(isinstance(b, Value) for b in bounds):
        raise Undescribed
    return together(inf, (x, *bounds), call.shape)


def _clamp_squares(c: Squares, call: Call, x: Any, min: Any = None, max: Any = None) -> Lifted:
    bounds = [b for b in (min, max) if isinstance(b, (Lifted, torch.Tensor))]
    if any(not free(b) for b in (min, max) if isinstance(b, (int, float))):
        c.approximate()
    if not bounds:
        return lifted(c, x)
    return total(c, call, [lifted(c, v) for v in (x, *bounds)])


def _clamp_listing(c: Listing, call: Call, x: Any, min: Any = None, max: Any = None) -> Table:
    found = table(c, x)
    for bound in (min, max):
        if isinstance(bound, (int, float)):
            if not free(bound):
                raise c.refuse("only bounds of 0 keep every path of degree one")
        elif bound is not None:
            found = c.sum(found, table(c, bound))
    return c.expanded(found, call.shape)


define(
    "clamp clamp_min clamp_max",
    Operation(_clamp_scales, _clamp_squares, _clamp_listing),
)

# ------------------------------------------------------------------------------- comparisons


def _compare_scales(inf: Any, call: Call, x: Value, y: Any) -> Value:
    """``2^s x > 2^s y`` is ``x > y``: equal scales, and any scale against zero."""
    if not free(y) and not free(x):
        if isinstance(y, Value):
            inf.equate(inf.elementwise_form(x), inf.elementwise_form(y))
        else:
            inf.pin_all("comparison with a number", [x])
    fixed: Value = inf.fixed(call.shape)
    return fixed


define("eq ne le lt ge gt", mask.but(scales=_compare_scales))

# ------------------------------------------------------------------------------- copies


def _overwritten(inf: Any, call: Call, value: Any) -> Any:
    """Everything is overwritten."""
    if isinstance(value, Value):
        return together(inf, (value,), call.shape)
    return zeros(call.shape) if value == 0 else inf.fixed(call.shape)


def _copy_scales(inf: Any, call: Call, x: Value, src: Any) -> Any:
    return _overwritten(inf, call, src)


def _copy_squares(c: Squares, call: Call, x: Any, src: Any) -> Lifted:
    return expanded(lifted(c, src), call.shape)


def _copy_listing(c: Listing, call: Call, x: Any, src: Any) -> Table:
    return c.expanded(table(c, src), call.shape)


def _fill_scales(inf: Any, call: Call, x: Value, value: Any) -> Any:
    return _overwritten(inf, call, value)


def _fill_squares(c: Squares, call: Call, x: Any, value: Any) -> Lifted:
    return expanded(lifted(c, value), call.shape)


def _fill_listing(c: Listing, call: Call, x: Any, value: Any) -> Table:
    return c.expanded(table(c, value), call.shape)


define("copy", Operation(_copy_scales, _copy_squares, _copy_listing))
define("fill", Operation(_fill_scales, _fill_squares, _fill_listing))

# ------------------------------------------------------------------------------- interpolation


def _lerp_scales(inf: Any, call: Call, x: Value, end: Value, weight: Any) -> Any:
    """``x + weight (end - x)``."""
    if isinstance(weight, Value):
        inf.pin(weight, "weight of an interpolation")
    return together(inf, (x, end), call.shape)


def _lerp_squares(c: Squares, call: Call, x: Any, end: Any, weight: Any) -> Lifted:
    x, end = lifted(c, x), lifted(c, end)
    if not isinstance(weight, Lifted):
        rest = c.coefficient(1 - weight)
        return total(c, call, (times(x, rest), times(end, c.coefficient(weight))))
    products = [Lifted(v.tensor * weight.tensor, v.shift + weight.shift) for v in (x, end)]
    return total(c, call, (x, *products))


def _lerp_listing(c: Listing, call: Call, x: Any, end: Any, weight: Any) -> Table:
    x, end = table(c, x), table(c, end)
    if isinstance(weight, Table):
        change = c.sum(end, x.times(-1.0))
        return c.sum(x, c.product(change, weight))
    return c.sum(c.product(x, table(c, 1 - weight)), c.product(end, table(c, weight)))


define("lerp", Operation(_lerp_scales, _lerp_squares, _lerp_listing))
