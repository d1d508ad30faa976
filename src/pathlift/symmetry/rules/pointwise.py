"""Pointwise operations: homogeneous ones keep the form, additions give equalities."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pathlift.capture import shape_of
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
    "eq",
    "ne",
    "le",
    "lt",
    "ge",
    "gt_off",
    "isnan",
    "logical_not",
    "logical_and",
)
def constant_like(inf: Inference, node: fx.Node, *args: Any, **_: Any) -> Result:
    """Takes a shape from its argument, not values; comparisons are pinned below."""
    name = str(node.target)
    if any(f".{c}." in name or f"aten.{c}" in name for c in ("eq", "ne", "le", "lt", "ge")):
        inf.pin_all("comparison", [a for a in args if isinstance(a, Value)])
    return inf.fixed(shape_of(node))
