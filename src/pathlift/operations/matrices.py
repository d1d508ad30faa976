"""Sums of products: matrix products and Einstein sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pathlift.capture.program import Call
from pathlift.lifting.tables import Listing, Table, numbers
from pathlift.lifting.values import Lifted, Squares
from pathlift.operations.contraction import contraction, joined, plus, scaled
from pathlift.operations.gains import lifted, table
from pathlift.operations.table import Operation, Undescribed, define
from pathlift.symmetry.scales import Value

# ------------------------------------------------------------------------------- two factors


def _given(*values: Any) -> Any:
    """The one argument that the overload at hand has."""
    for value in values:
        if value is not None:
            return value
    raise Undescribed


@dataclass(frozen=True)
class Pairing:
    """A product of two tensors: labels by their ranks (left, right, result), and the function."""

    labels: Callable[[int, int], tuple[list[int], list[int], list[int]]]
    function: Callable[[Tensor, Tensor], Tensor]

    def scales(self, inf: Any, x: Value, y: Value, shape: torch.Size) -> Any:
        left, right, out = self.labels(len(x.shape), len(y.shape))
        return contraction(inf, [(x, left), (y, right)], out, shape)

    def squares(self, c: Squares, x: Any, y: Any) -> Lifted:
        x, y = lifted(c, x), lifted(c, y)
        return Lifted(self.function(x.tensor, y.tensor), x.shift + y.shift).normalised()

    def listing(self, c: Listing, x: Any, y: Any) -> Table:
        x, y = table(c, x), table(c, y)
        left, right, out = self.labels(len(x.shape), len(y.shape))
        return joined(c, [(x, left), (y, right)], out)


def _matrix_labels(left: int, right: int) -> tuple[list[int], list[int], list[int]]:
    """``y[..., m, n] = sum_k x[..., m, k] w[..., k, n]``; vectors lack m or n."""
    m, k, n = -1, -2, -3
    batch = max(left, right, 2) - 2
    a = [*range(batch - left + 2, batch), m, k] if left > 1 else [k]
    b = [*range(batch - right + 2, batch), k, n] if right > 1 else [k]
    return a, b, [*range(batch), *([m] if left > 1 else []), *([n] if right > 1 else [])]


_MATRICES = Pairing(_matrix_labels, torch.matmul)
_SUMMED = Pairing(
    lambda left, right: ([0, 1, 2], [0, 2, 3], [1, 3]),
    lambda x, y: torch.einsum("bmk,bkn->mn", x, y),
)
_OUTER = Pairing(lambda left, right: ([0], [1], [0, 1]), torch.outer)


def _multiplied(pairing: Pairing) -> Operation:
    """The product alone. The second factor has another name in each schema."""

    def scales(
        inf: Any,
        call: Call,
        x: Any,
        y: Any = None,
        mat2: Any = None,
        vec: Any = None,
        tensor: Any = None,
    ) -> Any:
        return pairing.scales(inf, x, _given(y, mat2, vec, tensor), call.shape)

    def squares(
        c: Squares,
        call: Call,
        x: Any,
        y: Any = None,
        mat2: Any = None,
        vec: Any = None,
        tensor: Any = None,
    ) -> Lifted:
        return pairing.squares(c, x, _given(y, mat2, vec, tensor))

    def listing(
        c: Listing,
        call: Call,
        x: Any,
        y: Any = None,
        mat2: Any = None,
        vec: Any = None,
        tensor: Any = None,
    ) -> Table:
        return pairing.listing(c, x, _given(y, mat2, vec, tensor))

    return Operation(scales, squares, listing)


define("matmul mm bmm mv dot vdot", _multiplied(_MATRICES))


def _added(pairing: Pairing) -> Operation:
    """``beta * x + alpha * left @ right``; with ``beta = 0`` the term is not read."""

    def scales(
        inf: Any,
        call: Call,
        x: Any,
        mat1: Any = None,
        mat2: Any = None,
        mat: Any = None,
        vec: Any = None,
        batch1: Any = None,
        batch2: Any = None,
        vec1: Any = None,
        vec2: Any = None,
        beta: Any = 1,
        alpha: Any = 1,
    ) -> Any:
        left, right = _given(mat1, mat, batch1, vec1), _given(mat2, vec, batch2, vec2)
        product = pairing.scales(inf, left, right, call.shape)
        return plus(inf, product, x, call.shape) if beta else product

    def squares(
        c: Squares,
        call: Call,
        x: Any,
        mat1: Any = None,
        mat2: Any = None,
        mat: Any = None,
        vec: Any = None,
        batch1: Any = None,
        batch2: Any = None,
        vec1: Any = None,
        vec2: Any = None,
        beta: Any = 1,
        alpha: Any = 1,
    ) -> Lifted:
        left, right = _given(mat1, mat, batch1, vec1), _given(mat2, vec, batch2, vec2)
        product = pairing.squares(c, left, right).map(lambda t: t * c.coefficient(alpha))
        if not beta:
            return product
        term = lifted(c, x).map(lambda t: t * c.coefficient(beta))
        return c.plus(product, term).normalised()

    def listing(
        c: Listing,
        call: Call,
        x: Any,
        mat1: Any = None,
        mat2: Any = None,
        mat: Any = None,
        vec: Any = None,
        batch1: Any = None,
        batch2: Any = None,
        vec1: Any = None,
        vec2: Any = None,
        beta: Any = 1,
        alpha: Any = 1,
    ) -> Table:
        left, right = _given(mat1, mat, batch1, vec1), _given(mat2, vec, batch2, vec2)
        product = scaled(pairing.listing(c, left, right), alpha)
        return c.sum(product, scaled(table(c, x), beta)) if beta else product

    return Operation(scales, squares, listing)


define("addmm addmv baddbmm", _added(_MATRICES))
define("addbmm", _added(_SUMMED))
define("addr", _added(_OUTER))


# ------------------------------------------------------------------------------- Einstein sums


def _einsum_labels(equation: str, ranks: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """Labels of all operands and of the result: letters by code point, an ellipsis below 0."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    texts = left.split(",")
    if not arrow:
        letters = left.replace(",", "").replace("...", "")
        once = sorted(k for k in set(letters) if letters.count(k) == 1)
        right = ("..." if "..." in left else "") + "".join(once)
    inner = [r - len(t.replace("...", "")) for t, r in zip(texts, ranks, strict=True) if "." in t]

    def labels(text: str, width: int) -> list[int]:
        before, dots, after = text.partition("...")
        return [*map(ord, before), *(range(-width, 0) if dots else ()), *map(ord, after)]

    given = [labels(t, r - len(t.replace("...", ""))) for t, r in zip(texts, ranks, strict=True)]
    return given, labels(right, max(inner, default=0))


def _diagonal(labels: list[int]) -> tuple[list[int], Callable[[Tensor], Tensor]]:
    """A label that an operand carries twice stands for its diagonal."""
    steps = []
    while len(set(labels)) < len(labels):
        label = next(k for k in labels if labels.count(k) > 1)
        i = labels.index(label)
        j = labels.index(label, i + 1)
        labels = [k for d, k in enumerate(labels) if d not in (i, j)] + [label]
        steps.append((i, j))

    def run(t: Tensor) -> Tensor:
        for i, j in steps:
            t = t.diagonal(0, i, j)
        return t

    return labels, run


def _einsum_scales(
    inf: Any, call: Call, equation: str, tensors: Sequence[Value], path: Any = None
) -> Any:
    given, out = _einsum_labels(equation, [len(v.shape) for v in tensors])
    operands = []
    for value, labels in zip(tensors, given, strict=True):
        if len(set(labels)) < len(labels):
            labels, run = _diagonal(labels)
            shape = run(torch.empty(value.shape, device="meta")).shape
            value = Value(shape, inf.form(value).map(run, shape), zero=value.zero)
        operands.append((value, labels))
    return contraction(inf, operands, out, call.shape)


def _einsum_squares(
    c: Squares, call: Call, equation: str, tensors: Sequence[Any], path: Any = None
) -> Lifted:
    factors = [lifted(c, v) for v in tensors]
    out = call.run(tensors=[v.tensor for v in factors])
    return Lifted(out, sum(v.shift for v in factors)).normalised()


def _einsum_listing(
    c: Listing, call: Call, equation: str, tensors: Sequence[Any], path: Any = None
) -> Table:
    tables = [table(c, v) for v in tensors]
    given, out = _einsum_labels(equation, [len(t.shape) for t in tables])
    operands = []
    for one, labels in zip(tables, given, strict=True):
        labels, run = _diagonal(labels)
        operands.append((c.picked(one, run(numbers(one.shape))), labels))
    return joined(c, operands, out)


define("einsum", Operation(_einsum_scales, _einsum_squares, _einsum_listing))


def _trilinear_labels(expands: Sequence[Sequence[int]], ranks: Sequence[int]) -> list[list[int]]:
    """Every factor lacks the dimensions that it is expanded along."""
    return [
        [d for d in range(rank + len(expand)) if d not in expand]
        for expand, rank in zip(expands, ranks, strict=True)
    ]


def _trilinear_scales(
    inf: Any,
    call: Call,
    i1: Value,
    i2: Value,
    i3: Value,
    expand1: Any,
    expand2: Any,
    expand3: Any,
    sumdim: Any,
    unroll_dim: Any = 1,
) -> Any:
    factors = (i1, i2, i3)
    labels = _trilinear_labels((expand1, expand2, expand3), [len(v.shape) for v in factors])
    out = [d for d in range(len(i1.shape) + len(expand1)) if d not in sumdim]
    return contraction(inf, list(zip(factors, labels, strict=True)), out, call.shape)


def _trilinear_squares(
    c: Squares,
    call: Call,
    i1: Any,
    i2: Any,
    i3: Any,
    expand1: Any,
    expand2: Any,
    expand3: Any,
    sumdim: Any,
    unroll_dim: Any = 1,
) -> Lifted:
    a, b, w = (lifted(c, v) for v in (i1, i2, i3))
    out = call.run(i1=a.tensor, i2=b.tensor, i3=w.tensor)
    return Lifted(out, a.shift + b.shift + w.shift).normalised()


def _trilinear_listing(
    c: Listing,
    call: Call,
    i1: Any,
    i2: Any,
    i3: Any,
    expand1: Any,
    expand2: Any,
    expand3: Any,
    sumdim: Any,
    unroll_dim: Any = 1,
) -> Table:
    factors = [table(c, v) for v in (i1, i2, i3)]
    labels = _trilinear_labels((expand1, expand2, expand3), [len(t.shape) for t in factors])
    out = [d for d in range(len(factors[0].shape) + len(expand1)) if d not in sumdim]
    return joined(c, list(zip(factors, labels, strict=True)), out)


define("_trilinear", Operation(_trilinear_scales, _trilinear_squares, _trilinear_listing))
