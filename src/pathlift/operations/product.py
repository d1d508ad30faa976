"""Products, powers, roots and quotients.

Scales add up over factors. A product has every pair of its factors' paths; what divides, a root or
a power that is none of these has no path and is read as a fixed gain of the right degree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathlift.capture.program import Call
from pathlift.lifting.tables import Listing, Table, constant, numbers
from pathlift.lifting.values import Lifted, Squares
from pathlift.operations.contraction import contraction, plus, scaled
from pathlift.operations.gains import lifted, magnitude, normalised, table
from pathlift.operations.table import NoPaths, Operation, Undescribed, define
from pathlift.symmetry.scales import Form, Value, add_forms, varying

# A product of up to this many elements adds up their scales one by one.
_MAX_FACTORS = 16

_GAIN = NoPaths("it is not piecewise linear in the network's input")


# ------------------------------------------------------------------------------- gains


def nonzero(t: Tensor) -> Tensor:
    """1 in place of 0, to divide by."""
    return torch.where(t == 0, torch.ones_like(t), t)


def fixed_power(c: Squares, x: Lifted, exponent: float) -> Lifted:
    """``x^exponent`` as a fixed gain: it has the degree that it should, and no path."""
    c.approximate()
    size = magnitude(x)
    gain = (nonzero(size) if exponent < 0 else size) ** exponent
    return normalised(Lifted(gain, x.shift * exponent, gain))


def product_of(c: Squares, x: Any, y: Any, same: bool = False) -> Lifted:
    """``x y``, element by element; ``same``: it is a square."""
    a, b = lifted(c, x), lifted(c, y)
    gain = None
    if same:
        gain = magnitude(a) ** 2
    else:
        left, right = (f.gain if isinstance(v, Lifted) else f.tensor for v, f in ((x, a), (y, b)))
        if left is not None and right is not None:
            gain = left * right
    return normalised(Lifted(a.tensor * b.tensor, a.shift + b.shift, gain))


def quotient_of(c: Squares, x: Any, y: Any) -> Lifted:
    """``x / y``: by an activation, a fixed gain."""
    if not isinstance(y, Lifted):
        a, divisor = lifted(c, x), lifted(c, y).tensor
        return Lifted(a.tensor / divisor, a.shift, None if a.gain is None else a.gain / divisor)
    c.approximate()
    a, size = lifted(c, x), nonzero(magnitude(y))
    known = a.gain if isinstance(x, Lifted) else a.tensor
    gain = None if known is None else known / size
    return normalised(Lifted(a.tensor / size, a.shift - y.shift, gain))


# ------------------------------------------------------------------------------- element by element


def _both(call: Call) -> tuple[str, ...]:
    """Both factors; a square is taken of the whole batch, because a norm reads its gain."""
    return () if call["self"] is call["other"] else ("x", "y")


def _product_scales(inf: Any, x: Any, y: Any, sign: int) -> Any:
    """``s(x y) = s(x) + s(y)``, ``s(x / y) = s(x) - s(y)``; a number has scale 0."""
    if not isinstance(y, Value):
        return Value(x.shape, Form(x.shape), zero=True) if y == 0 and sign > 0 else x
    if not isinstance(x, Value):
        return inf.form(y).scaled(sign)
    shape = torch.broadcast_shapes(x.shape, y.shape)
    if x.zero or (y.zero and sign > 0):
        return Value(shape, Form(shape), zero=True)
    for factor, other in ((x, y), (y, x)) if sign > 0 else ((x, y),):
        # A parameter times a pinned tensor (a pruning mask) is still as free as the parameter.
        new = inf.is_new(factor) and factor.shape == shape and not inf.is_new(other)
        if new and inf.form(other).pinned:
            return factor
    if sign < 0 or (inf.is_new(x) and inf.is_new(y)):
        a, b = inf.elementwise_form(x).expand(shape), inf.elementwise_form(y).expand(shape)
        return add_forms(a, b.scaled(sign))
    operands = [(v, range(len(shape) - len(v.shape), len(shape))) for v in (x, y)]
    return contraction(inf, operands, range(len(shape)), shape)


def _mul_scales(inf: Any, call: Call, x: Any, y: Any) -> Any:
    return _product_scales(inf, x, y, 1)


def _mul_squares(c: Squares, call: Call, x: Any, y: Any) -> Lifted:
    return product_of(c, x, y, call["self"] is call["other"])


def _mul_listing(c: Listing, call: Call, x: Any, y: Any) -> Table:
    return c.product(table(c, x), table(c, y))


define("mul", Operation(_mul_scales, _mul_squares, _mul_listing, samples=_both))


def _div_scales(inf: Any, call: Call, x: Any, y: Any, rounding_mode: Any = None) -> Any:
    if rounding_mode is not None:
        raise Undescribed
    return _product_scales(inf, x, y, -1)


def _div_squares(c: Squares, call: Call, x: Any, y: Any, rounding_mode: Any = None) -> Lifted:
    if rounding_mode is not None:
        raise Undescribed
    return quotient_of(c, x, y)


def _quotient(c: Listing, x: Any, y: Any) -> Table:
    if isinstance(y, Table):
        raise c.refuse("the divisor depends on the inputs or parameters")
    y = y if isinstance(y, (int, float, Tensor)) else table(c, y)
    return c.product(table(c, x), constant(1.0 / torch.as_tensor(y, dtype=torch.float64)))


def _div_listing(c: Listing, call: Call, x: Any, y: Any, rounding_mode: Any = None) -> Table:
    if rounding_mode is not None:
        raise Undescribed
    return _quotient(c, x, y)


define("div", Operation(_div_scales, _div_squares, _div_listing, samples=_both))


def _added_product(divided: bool) -> Operation:
    """``x + value * a * b`` or ``x + value * a / b``."""

    def scales(
        inf: Any, call: Call, x: Value, tensor1: Value, tensor2: Value, value: Any = 1
    ) -> Any:
        product = _product_scales(inf, tensor1, tensor2, -1 if divided else 1)
        return plus(inf, product, x, call.shape)

    def squares(
        c: Squares, call: Call, x: Any, tensor1: Any, tensor2: Any, value: Any = 1
    ) -> Lifted:
        product = quotient_of(c, tensor1, tensor2) if divided else product_of(c, tensor1, tensor2)
        return c.plus(product_of(c, product, value), lifted(c, x)).normalised()

    def listing(
        c: Listing, call: Call, x: Any, tensor1: Any, tensor2: Any, value: Any = 1
    ) -> Table:
        if divided:
            product = _quotient(c, tensor1, tensor2)
        else:
            product = c.product(table(c, tensor1), table(c, tensor2))
        return c.sum(table(c, x), scaled(product, value))

    return Operation(scales, squares, listing)


define("addcmul", _added_product(divided=False))
define("addcdiv", _added_product(divided=True))


# ------------------------------------------------------------------------------- powers


def _root(inf: Any, form: Form) -> Form:
    """A form ``t`` with ``2 t = form``: integer scales keep the root exact."""
    if form.pinned or all(c % 2 == 0 for c, _ in form.terms):
        return Form(form.shape, tuple((c // 2, t) for c, t in form.terms), form.why)
    dims = sorted(frozenset().union(*(varying(ids) for _, ids in form.terms)))
    half = inf.fresh_form(form.shape, dims)
    inf.equate(half.scaled(2), form)
    return half


def _natural(exponent: Any) -> bool:
    return isinstance(exponent, (int, float)) and exponent >= 0 and exponent == int(exponent)


def _pow_scales(inf: Any, call: Call, x: Any, exponent: Any) -> Any:
    """``s(x^n) = n s(x)`` for the exponents that are computed by products, roots and quotients.

    Others go through logarithms, whose rounding does not commute with powers of two.
    """
    if not isinstance(x, Value) or isinstance(exponent, Value):
        raise Undescribed
    if exponent in (-2, -1, 0, 1, 2, 3):
        return inf.form(x).scaled(int(exponent))
    if exponent in (0.5, -0.5):
        return _root(inf, inf.form(x)).scaled(1 if exponent > 0 else -1)
    raise Undescribed


def _pow_squares(c: Squares, call: Call, x: Any, exponent: Any) -> Lifted:
    if not isinstance(x, Lifted) or not isinstance(exponent, (int, float)):
        raise Undescribed
    if not _natural(exponent):
        return fixed_power(c, x, exponent)
    n = int(exponent)
    if n == 0:
        return Lifted(c.ones(call.shape))
    # An even power is a square, whatever is under it.
    gain = None if x.gain is None and n % 2 else magnitude(x) ** n
    return normalised(Lifted(x.tensor**n, x.shift * n, gain))


def _pow_listing(c: Listing, call: Call, x: Any, exponent: Any) -> Table:
    if not isinstance(x, Table) or not _natural(exponent):
        raise c.refuse("only powers with a fixed natural exponent have paths")
    total = constant(torch.ones(call.shape))
    for _ in range(int(exponent)):
        total = c.product(total, x)
    return total


define("pow", Operation(_pow_scales, _pow_squares, _pow_listing))


def _fixed(exponent: float) -> Operation:
    """``x^exponent`` for an exponent of -1 or +-1/2: fixed gains."""

    def scales(inf: Any, call: Call, x: Value) -> Form:
        form = inf.form(x)
        return form.scaled(-1) if exponent == -1 else _root(inf, form).scaled(int(2 * exponent))

    def squares(c: Squares, call: Call, x: Lifted) -> Lifted:
        return fixed_power(c, lifted(c, x), exponent)

    return Operation(scales, squares, _GAIN)


define("reciprocal", _fixed(-1))
define("sqrt", _fixed(0.5))
define("rsqrt", _fixed(-0.5))


def _flat(t: Tensor, dim: int | None) -> Tensor:
    """The factors of a product along a first dimension."""
    return t.reshape(-1) if dim is None else t.movedim(dim, 0)


def _prod_scales(inf: Any, call: Call, x: Value, dim: Any = None, keepdim: bool = False) -> Any:
    """The sum of the factors' scales (tied where they are many)."""
    dim = dim if x.shape else None
    count = x.shape.numel() if dim is None else x.shape[dim]
    if x.zero and count:
        return Value(call.shape, Form(call.shape), zero=True)
    form = inf.elementwise_form(x)
    if count > _MAX_FACTORS:
        dims = range(len(x.shape)) if dim is None else [dim]
        form = inf.tie(form, dims).scaled(count)
        return form.map(lambda t: _flat(t, dim)[0].reshape(call.shape), call.shape)
    parts = [
        form.map(lambda t, k=k: _flat(t, dim)[k].reshape(call.shape), call.shape)
        for k in range(count)
    ]
    return add_forms(Form(call.shape), *parts)


def _prod_squares(
    c: Squares, call: Call, x: Lifted, dim: Any = None, keepdim: bool = False
) -> Lifted:
    if not isinstance(x, Lifted):
        raise Undescribed
    dim = dim if x.tensor.dim() else None
    tensor = _flat(x.tensor, dim).prod(0).reshape(call.shape)
    gain = None if x.gain is None else _flat(x.gain, dim).prod(0).reshape(call.shape)
    count = x.tensor.numel() if dim is None else x.tensor.shape[dim]
    return normalised(Lifted(tensor, x.shift * count, gain))


def _prod_listing(
    c: Listing, call: Call, x: Table, dim: Any = None, keepdim: bool = False
) -> Table:
    total = constant(torch.ones(call.shape))
    for places in _flat(numbers(x.shape), dim if x.shape else None):
        total = c.product(total, c.picked(x, places.reshape(call.shape)))
    return total


define("prod", Operation(_prod_scales, _prod_squares, _prod_listing))
