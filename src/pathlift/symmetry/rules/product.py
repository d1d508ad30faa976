"""Products: scales add up over factors and are tied over what is summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pathlift.capture import shape_of
from pathlift.symmetry.inference import Inference, Result, refuse, rule
from pathlift.symmetry.scales import Form, Value, add_forms, collapse, varying

# A sum over channels and positions that is not separable costs one general equation per entry;
# beyond this many the positions are tied instead.
_MAX_SEPARATED = 20_000

Operand = tuple[Value, Sequence[int]]


def contraction(
    inf: Inference, operands: Sequence[Operand], out: Sequence[int], shape: torch.Size
) -> Result:
    """``y[out] = sum over the other labels of the product of all operands``.

    Every tensor has one label per dimension (as in an Einstein sum), so that
    ``s(y[out]) = sum_k s(x_k[labels_k])`` for all values of all labels. Covers linear layers,
    matrix products, elementwise products and attention.

    A parameter that nothing has consumed yet adapts: with ``R`` the scales of the other factors,
    split as ``R = a + c`` into a part that varies along the parameter's labels and one that does
    not, ``y = f + c`` and ``w = f - a`` with new free scales ``f`` along its output labels.
    """
    if any(v.zero for v, _ in operands):
        return Value(shape, Form(shape), zero=True)
    sizes: dict[int, int] = {}
    for value, labels in operands:
        for label, n in zip(labels, value.shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), n)
    grid = [*out, *(k for k in sizes if k not in out)]
    new = [k for k, (v, _) in enumerate(operands) if inf.is_new(v)]
    weight = max(new, key=lambda k: operands[k][0].shape.numel()) if new else None
    others = [
        _on_grid(inf.form(v), labels, grid, sizes)
        for k, (v, labels) in enumerate(operands)
        if k != weight
    ]
    full = torch.Size(sizes[k] for k in grid)
    given = add_forms(Form(full), *others)
    contracted = list(range(len(out), len(grid)))
    if weight is None:
        return _on_output(inf.tie(given, contracted), len(out), shape)
    value, labels = operands[weight]
    own = [
        grid.index(k) for k, n in zip(labels, value.shape, strict=True) if n > 1 or sizes[k] == 1
    ]
    given = inf.tie(given, [d for d in contracted if d not in own]).expand(full)
    along, across = _separate(inf, given, own)
    inf.note_input(value, along)
    fresh = inf.fresh_form(full, [d for d in own if d < len(out)] or [])
    bound = add_forms(fresh, along.scaled(-1)).first([d for d in range(len(grid)) if d not in own])
    order = [grid.index(k) for k in labels]
    inf.bind(
        value,
        bound.map(
            lambda t: t.permute(*order, *(d for d in range(t.dim()) if d not in order)).reshape(
                value.shape
            ),
            value.shape,
        ),
    )
    total = add_forms(fresh, across).first(contracted)
    return _on_output(total, len(out), shape)


def _on_grid(form: Form, labels: Sequence[int], grid: Sequence[int], sizes: dict[int, int]) -> Form:
    """The form as a view over all labels."""
    present = sorted(range(len(labels)), key=lambda d: grid.index(labels[d]))
    at = {grid.index(k) for k in labels}
    index = tuple(slice(None) if d in at else None for d in range(len(grid)))
    full = torch.Size(sizes[k] for k in grid)
    return form.map(lambda t: t.permute(present)[index].expand(full), full)


def _on_output(form: Form, rank: int, shape: torch.Size) -> Form:
    """Drop the contracted labels (size 1) behind the first ``rank``."""
    return form.map(
        lambda t: t.flatten(rank)[..., 0].expand(shape) if t.dim() > rank else t.expand(shape),
        shape,
    )


def _separate(inf: Inference, form: Form, own: Sequence[int]) -> tuple[Form, Form]:
    """``form = a + c``: ``a`` varies along ``own`` only, ``c`` along the other dimensions."""
    inside = frozenset(own)
    along: list[tuple[int, Tensor]] = []
    across: list[tuple[int, Tensor]] = []
    mixed: list[tuple[int, Tensor]] = []
    for term in form.terms:
        dims = varying(term[1])
        (along if dims <= inside else mixed if dims & inside else across).append(term)
    a = Form(form.shape, tuple(along), form.why)
    c = Form(form.shape, tuple(across), form.why)
    if not mixed:
        return a, c
    rest = Form(form.shape, tuple(mixed))
    other = [d for d in range(len(form.shape)) if d not in inside]
    if max(collapse(t).numel() for _, t in mixed) > _MAX_SEPARATED:
        return add_forms(a, inf.tie(rest, other).expand(form.shape)), c
    row = rest.first(other).expand(form.shape)
    corner = rest.first(range(len(form.shape))).expand(form.shape)
    column = add_forms(rest.first(list(own)).expand(form.shape), corner.scaled(-1))
    inf.zero(add_forms(rest, row.scaled(-1), column.scaled(-1)))
    return add_forms(a, row), add_forms(c, column)


def aligned(value: Value, shape: torch.Size) -> Operand:
    """Labels of an operand that broadcasts to ``shape``: the dimensions of the output."""
    return value, range(len(shape) - len(value.shape), len(shape))


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
    shape = shape_of(node)
    if not isinstance(y, Value):
        return Value(shape, Form(shape), zero=True) if y == 0 and sign > 0 else x
    if not isinstance(x, Value):
        return inf.form(y).expand(shape).scaled(sign)
    if x.zero or y.zero and sign > 0:
        return Value(shape, Form(shape), zero=True)
    for factor, other in ((x, y), (y, x)) if sign > 0 else ((x, y),):
        # A parameter times a pinned tensor (a pruning mask) is still as free as the parameter.
        if inf.is_new(factor) and factor.shape == shape and not inf.is_new(other):
            form = inf.form(other)
            if form.pinned:
                return factor
    if sign < 0 or inf.is_new(x) and inf.is_new(y):
        a, b = inf.elementwise_form(x).expand(shape), inf.elementwise_form(y).expand(shape)
        return add_forms(a, b.scaled(sign))
    return contraction(inf, [aligned(x, shape), aligned(y, shape)], range(len(shape)), shape)


@rule("addcmul", "addcdiv")
def add_product(inf: Inference, node: fx.Node, x: Value, a: Value, b: Value, **_: Any) -> Result:
    """``x + value * a * b`` or ``x + value * a / b``: the product's scale equals ``s(x)``."""
    sign = -1 if "addcdiv" in str(node.target) else 1
    product = _product(inf, node, a, b, sign)
    form = product if isinstance(product, Form) else inf.form(product)  # type: ignore[arg-type]
    if x.zero:
        return form
    inf.equate(inf.elementwise_form(x), form)
    return form.expand(shape_of(node))


@rule("addmm", "addmv", "baddbmm", "addbmm")
def addmm(inf: Inference, node: fx.Node, b: Value, x: Value, w: Value, **_: Any) -> Result:
    """``b + x @ w``."""
    if "addbmm" in str(node.target):
        refuse()
    return plus(inf, matmul(inf, node, x, w), b, shape_of(node))


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot", "linalg_matmul")
def matmul(inf: Inference, node: fx.Node, x: Value, w: Value) -> Result:
    """``y[..., m, n] = sum_k x[..., m, k] w[..., k, n]``; vectors lack m or n."""
    shape = shape_of(node)
    m, k, n = -1, -2, -3
    batch = len(shape) - (len(x.shape) > 1) - (len(w.shape) > 1)
    left = [*range(batch - len(x.shape) + 2, batch), m, k] if len(x.shape) > 1 else [k]
    right = [*range(batch - len(w.shape) + 2, batch), k, n] if len(w.shape) > 1 else [k]
    out = [*range(batch), *([m] if len(x.shape) > 1 else []), *([n] if len(w.shape) > 1 else [])]
    return contraction(inf, [(x, left), (w, right)], out, shape)


@rule("outer", "ger")
def outer(inf: Inference, node: fx.Node, x: Value, y: Value) -> Result:
    """``y[i, j] = x[i] y[j]``."""
    return contraction(inf, [(x, [0]), (y, [1])], [0, 1], shape_of(node))


@rule("einsum")
def einsum(
    inf: Inference, node: fx.Node, equation: str, operands: Sequence[Value], **_: Any
) -> Result:
    """The Einstein sum as written; repeated labels within one operand are refused."""
    shape = shape_of(node)
    left, _arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if not _arrow:
        letters = left.replace(",", "").replace("...", "")
        right = ("..." if "..." in left else "") + "".join(
            sorted(c for c in set(letters) if letters.count(c) == 1)
        )
    rank = len(shape) - len(right.replace("...", ""))
    labelled: list[Operand] = []
    for text, value in zip(inputs, operands, strict=True):
        labels = _labels(text, len(value.shape), rank)
        if len(set(labels)) < len(labels):
            refuse()
        labelled.append((value, labels))
    return contraction(inf, labelled, _labels(right, len(shape), rank), shape)


def _labels(text: str, dims: int, rank: int) -> list[int]:
    """One integer per dimension: letters by code point, the ellipsis by negative numbers."""
    before, dots, after = text.partition("...")
    inner = dims - len(before) - len(after) if dots else 0
    return [
        *map(ord, before),
        *range(-inner, 0),
        *map(ord, after),
    ]


@rule("linear")
def linear(inf: Inference, node: fx.Node, x: Value, w: Value, b: Value | None = None) -> Result:
    """``y[..., o] = sum_i w[o, i] x[..., i] + b[o]``."""
    shape = shape_of(node)
    lead = range(len(x.shape) - 1)
    i, o = len(x.shape) - 1, len(x.shape)
    if len(w.shape) == 1:
        y = contraction(inf, [(x, [*lead, i]), (w, [i])], lead, shape)
    else:
        y = contraction(inf, [(x, [*lead, i]), (w, [o, i])], [*lead, o], shape)
    return plus(inf, y, b, shape)


@rule("bilinear")
def bilinear(
    inf: Inference, node: fx.Node, x: Value, y: Value, w: Value, b: Value | None = None
) -> Result:
    """``z[..., o] = sum_ij x[..., i] w[o, i, j] y[..., j] + b[o]``."""
    shape = shape_of(node)
    lead = range(len(x.shape) - 1)
    o, i, j = -1, -2, -3
    z = contraction(inf, [(x, [*lead, i]), (y, [*lead, j]), (w, [o, i, j])], [*lead, o], shape)
    return plus(inf, z, b, shape)


def plus(inf: Inference, result: Result, b: Value | None, shape: torch.Size) -> Result:
    """Add a term that broadcasts: equal scales."""
    if b is None or b.zero:
        return result
    if isinstance(result, Value) and result.zero:
        return inf.form(b).expand(shape)
    form = result if isinstance(result, Form) else inf.form(result)  # type: ignore[arg-type]
    if inf.is_new(b):
        offset = len(shape) - len(b.shape)
        dims = [d for d in range(len(shape)) if d < offset or b.shape[d - offset] != shape[d]]
        inf.bind(b, inf.tie(form, dims).map(lambda t: t.reshape(b.shape), b.shape))
    else:
        inf.equate(form, inf.form(b))
    return form


# ------------------------------------------------------------------------------- powers


@rule("pow")
def power(inf: Inference, node: fx.Node, x: Any, exponent: Any) -> Result:
    """``s(x^n) = n s(x)`` for the exponents that are computed by products, roots and quotients.

    Others go through logarithms, whose rounding does not commute with powers of two.
    """
    if not isinstance(x, Value) or isinstance(exponent, Value):
        refuse()
    if exponent in (-2, -1, 0, 1, 2, 3):
        return inf.form(x).scaled(int(exponent))
    if exponent in (0.5, -0.5):
        return root(inf, x).scaled(1 if exponent > 0 else -1)
    refuse()
    return None


@rule("square")
def square(inf: Inference, node: fx.Node, x: Value) -> Result:
    """``s(x^2) = 2 s(x)``."""
    return inf.form(x).scaled(2)


@rule("reciprocal")
def reciprocal(inf: Inference, node: fx.Node, x: Value) -> Result:
    """``s(1 / x) = -s(x)``."""
    return inf.form(x).scaled(-1)


@rule("sqrt")
def sqrt(inf: Inference, node: fx.Node, x: Value) -> Result:
    """``2 s(sqrt x) = s(x)``."""
    return root(inf, x)


@rule("rsqrt")
def rsqrt(inf: Inference, node: fx.Node, x: Value) -> Result:
    """``2 s(1 / sqrt x) = -s(x)``."""
    return root(inf, x).scaled(-1)


def root(inf: Inference, x: Value) -> Form:
    """A form ``t`` with ``2 t = s(x)``: integer scales keep the root exact."""
    form = inf.form(x)
    if form.pinned or all(c % 2 == 0 for c, _ in form.terms):
        return Form(form.shape, tuple((c // 2, t) for c, t in form.terms))
    dims = sorted(frozenset().union(*(varying(ids) for _, ids in form.terms)))
    half = inf.fresh_form(form.shape, dims)
    inf.equate(half.scaled(2), form)
    return half


@rule("prod")
def prod(
    inf: Inference, node: fx.Node, x: Value, dim: Any = None, keepdim: bool = False, **_: Any
) -> Result:
    """``n`` equal factors: ``s = n s(x)``."""
    shape = shape_of(node)
    rank = len(x.shape)
    dims = list(range(rank)) if dim is None else [dim % rank]
    count = 1
    for d in dims:
        count *= x.shape[d]
    first = inf.tie(inf.form(x), dims).scaled(count)
    return first.map(lambda t: _squeezed(t, dims, shape), shape)


def _squeezed(t: Tensor, dims: Sequence[int], shape: torch.Size) -> Tensor:
    if t.dim() != len(shape):
        for d in sorted(dims, reverse=True):
            t = t.squeeze(d)
    return t.expand(shape)
