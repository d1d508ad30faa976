"""Pointwise operations: homogeneous ones keep the form, additions give equalities."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from pathlift.capture import operation, shape_of
from pathlift.symmetry.inference import Inference, Result, refuse, rule
from pathlift.symmetry.scales import Form, Value


@rule(
    "relu",
    "leaky_relu",
    "rrelu",
    "rrelu_with_noise",
    "abs",
    "neg",
    "dropout",
    "native_dropout",
    "feature_dropout",
    "alpha_dropout_off",
    "clone",
    "contiguous",
    "to",
    "_to_copy",
    "alias",
    "detach",
    "detach_copy",
    "lift_fresh_copy",
    "lift_fresh",
    "type_as",
    "positive",
    "float",
    "double",
    "half",
    "bfloat16",
    "_assert_tensor_metadata",
    "fill_off",
)
def homogeneous(inf: Inference, node: fx.Node, x: Value, *_: Any, **__: Any) -> Result:
    """``f(2^s x) = 2^s f(x)``."""
    return x


@rule("_prelu_kernel", "prelu")
def prelu(inf: Inference, node: fx.Node, x: Value, slope: Value) -> Result:
    """Homogeneous in the activation; the slopes themselves are not rescaled."""
    inf.pin(slope, "prelu slope")
    return x


@rule("threshold", "clamp_min")
def clamp_min(inf: Inference, node: fx.Node, x: Value, low: Any, value: Any = 0) -> Result:
    """``max(x, 0)`` is a ReLU; any other threshold is not homogeneous."""
    if isinstance(low, Value) or low != 0 or value != 0:
        refuse()
    return x


@rule("clamp", "hardtanh")
def clamp(inf: Inference, node: fx.Node, x: Value, low: Any = None, high: Any = None) -> Result:
    """Homogeneous for bounds 0 and infinity."""
    if any(bound is not None and bound != 0 for bound in (low, high)) or node.target is None:
        refuse()
    if "hardtanh" in str(node.target):
        refuse()
    return x


@rule("add", "sub", "rsub", "maximum", "minimum")
def add(inf: Inference, node: fx.Node, x: Any, y: Any, alpha: Any = 1) -> Result:
    """Terms of a sum have equal scales."""
    shape = shape_of(node)
    if not isinstance(x, Value) or not isinstance(y, Value):
        value, number = (x, y) if isinstance(x, Value) else (y, x)
        if number != 0 and value.zero:
            return inf.fixed(shape)
        if number != 0:
            inf.pin_all("add a constant", [value])
        return inf.form(value)
    if x.zero or y.zero:
        other = y if x.zero else x
        return inf.form(other).expand(shape)
    return inf.form(_align(inf, x, y, shape)).expand(shape)


def _align(inf: Inference, x: Value, y: Value, shape: torch.Size) -> Value:
    for one, other in ((x, y), (y, x)):
        if inf.is_new(one) and not inf.is_new(other):
            _bind_broadcast(inf, one, inf.form(other).expand(shape))
            return other
    inf.equate(inf.elementwise_form(x), inf.elementwise_form(y))
    return x if len(inf.form(x).terms) <= len(inf.form(y).terms) else y


def _bind_broadcast(inf: Inference, parameter: Value, form: Form) -> None:
    """Bind a parameter added to ``form`` under broadcasting."""
    shape, own = form.shape, parameter.shape
    offset = len(shape) - len(own)
    dims = [d for d in range(len(shape)) if d < offset or own[d - offset] != shape[d]]
    tied = inf.tie(form, dims)
    inf.bind(parameter, tied.map(lambda t: t.reshape(own), own))


@rule(
    "zeros_like",
    "new_zeros",
    "zeros",
    "new_empty",
    "empty_like",
    "bernoulli",
    "rand_like",
    "randn_like",
    "ones_like",
    "new_ones",
    "full_like",
    "new_full",
    "empty",
    "rand",
    "randn",
    "sym_size",
)
def constant_like(inf: Inference, node: fx.Node, *args: Any, **_: Any) -> Result:
    """Takes a shape from its argument, not values."""
    shape = shape_of(node)
    return Value(shape, Form(shape), zero="zeros" in str(node.target))


@rule("eq", "ne", "le", "lt", "ge", "gt", "greater", "less", "greater_equal", "less_equal")
def comparison(inf: Inference, node: fx.Node, x: Any, y: Any) -> Result:
    """``2^s x > 2^s y`` is ``x > y``: equal scales, and any scale against zero."""
    zero = y.zero if isinstance(y, Value) else y in (0, math.inf, -math.inf)
    if isinstance(x, Value) and not zero:
        if isinstance(y, Value):
            inf.equate(inf.elementwise_form(x), inf.elementwise_form(y))
        else:
            inf.pin_all("comparison with a number", [x])
    return inf.fixed(shape_of(node))


@rule("sign", "sgn", "isnan", "isfinite", "isinf", "signbit", "heaviside")
def sign(inf: Inference, node: fx.Node, x: Value, *values: Any) -> Result:
    """Homogeneous of degree 0."""
    for value in values:
        if isinstance(value, Value):
            inf.pin(value, "value at zero")
    return inf.fixed(shape_of(node))


@rule("argmax", "argmin", "argsort")
def position(
    inf: Inference, node: fx.Node, x: Value, dim: Any = None, *_: Any, **__: Any
) -> Result:
    """An order along a dimension does not change if all its entries have one scale."""
    rank = len(x.shape)
    inf.tie(
        inf.form(x), range(rank) if not isinstance(dim, int) or isinstance(dim, bool) else [dim]
    )
    return inf.fixed(shape_of(node))


@rule(
    "logical_not",
    "logical_and",
    "logical_or",
    "logical_xor",
    "bitwise_not",
    "bitwise_and",
    "bitwise_or",
    "any",
    "all",
)
def logic(inf: Inference, node: fx.Node, *args: Any, **_: Any) -> Result:
    """Zero or not: any scale."""
    return inf.fixed(shape_of(node))


@rule("glu")
def glu(inf: Inference, node: fx.Node, x: Value, dim: int = -1) -> Result:
    """``a * sigmoid(b)`` of the two halves: b is pinned."""
    half = x.shape[dim] // 2
    form = inf.form(x)
    shape = shape_of(node)
    inf.zero(form.map(lambda t: t.narrow(dim, half, half), shape))
    return form.map(lambda t: t.narrow(dim, 0, half), shape)


@rule("lerp")
def lerp(inf: Inference, node: fx.Node, x: Value, y: Value, weight: Any) -> Result:
    """``x + weight (y - x)``."""
    if isinstance(weight, Value):
        inf.pin(weight, "weight of an interpolation")
    return add(inf, node, x, y)


@rule("hypot", "fmax", "fmin")
def pairwise(inf: Inference, node: fx.Node, x: Value, y: Value) -> Result:
    """Homogeneous in both together."""
    if x.zero or y.zero:
        return inf.form(y if x.zero else x).expand(shape_of(node))
    inf.equate(inf.elementwise_form(x), inf.elementwise_form(y))
    return inf.form(x).expand(shape_of(node))


@rule("copy")
def copy(inf: Inference, node: fx.Node, x: Value, source: Any, *_: Any, **__: Any) -> Result:
    """Everything is overwritten."""
    shape = shape_of(node)
    if not isinstance(source, Value):
        return inf.fixed(shape)
    if source.zero:
        return Value(shape, Form(shape), zero=True)
    return inf.form(source).expand(shape)


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(inf: Inference, node: fx.Node, v: Value, g: Value, dim: int = 0) -> Result:
    """``g v / ||v||``: the scale of ``g``; each slice of ``v`` has one of its own."""
    rank = len(v.shape)
    inf.tie(inf.form(v), [d for d in range(rank) if d != dim % rank] if dim != -1 else range(rank))
    meta = node.meta.get("val")
    if isinstance(meta, (list, tuple)):
        return [inf.form(g).expand(meta[0].shape), inf.form(v).first([])]
    return inf.form(g).expand(shape_of(node))


@rule(
    "view_as_real",
    "view_as_complex",
    "complex",
    "real",
    "imag",
    "_conj",
    "conj",
    "resolve_conj",
    "conj_physical",
)
def complex_parts(inf: Inference, node: fx.Node, x: Value, y: Any = None) -> Result:
    """Real and imaginary part of a number have one scale."""
    name, shape = operation(node), shape_of(node)
    form = inf.form(x)
    if name == "complex":
        inf.equate(form, inf.form(y))
    if name == "view_as_complex":
        return inf.tie(form, [-1]).map(lambda t: t.squeeze(-1), shape)
    if name == "view_as_real":
        return form.map(lambda t: t.unsqueeze(-1).expand(shape), shape)
    return form
