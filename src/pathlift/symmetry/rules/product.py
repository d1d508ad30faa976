"""Products and powers: scales add up."""

from __future__ import annotations

from typing import Any

from torch import fx

from pathlift.capture import shape_of
from pathlift.symmetry.inference import Inference, Result, refuse, rule
from pathlift.symmetry.scales import Value, add_forms, varying


@rule("mul", "multiply")
def mul(inf: Inference, node: fx.Node, x: Any, y: Any) -> Result:
    """``s(x y) = s(x) + s(y)``; a number has scale 0."""
    return _product(inf, node, x, y, 1)


@rule("div", "divide", "true_divide")
def div(inf: Inference, node: fx.Node, x: Any, y: Any, rounding_mode: Any = None) -> Result:
    """``s(x / y) = s(x) - s(y)``."""
    if rounding_mode is not None:
        refuse()
    return _product(inf, node, x, y, -1)


def _product(inf: Inference, node: fx.Node, x: Any, y: Any, sign: int) -> Result:
    if not isinstance(y, Value):
        return x if isinstance(x, Value) else None
    shape = shape_of(node)
    if not isinstance(x, Value):
        return inf.form(y).expand(shape).scaled(sign)
    if x.zero:
        return Value(shape, inf.fixed(shape).form, zero=True)
    factor, other = (x, y) if inf.is_new(x) and not inf.is_new(y) and sign == 1 else (y, x)
    if inf.is_new(factor) and not inf.is_new(other) and sign == 1:
        # A parameter as factor: its output scales are new and free where it varies.
        given = inf.form(other).expand(shape)
        own = (1,) * (len(shape) - len(factor.shape)) + tuple(factor.shape)
        dims = frozenset(d for d, n in enumerate(own) if n > 1)
        if all(varying(ids) <= dims for _, ids in given.terms):
            out = inf.fresh_form(shape, sorted(dims))
            drop = [d for d in range(len(shape)) if d not in dims]
            form = add_forms(out, given.scaled(-1)).first(drop)
            inf.bind(factor, form.map(lambda t: t.reshape(factor.shape), factor.shape))
            return out
    a = inf.elementwise_form(x).expand(shape)
    b = inf.elementwise_form(y).expand(shape)
    return add_forms(a, b.scaled(sign))


@rule("pow")
def power(inf: Inference, node: fx.Node, x: Any, exponent: Any) -> Result:
    """``s(x^n) = n s(x)`` for a whole number n."""
    if not isinstance(x, Value) or isinstance(exponent, Value) or exponent != int(exponent):
        refuse()
    return inf.form(x).scaled(int(exponent))


@rule("square")
def square(inf: Inference, node: fx.Node, x: Value) -> Result:
    """``s(x^2) = 2 s(x)``."""
    return inf.form(x).scaled(2)


@rule("reciprocal")
def reciprocal(inf: Inference, node: fx.Node, x: Value) -> Result:
    """``s(1 / x) = -s(x)``."""
    return inf.form(x).scaled(-1)
