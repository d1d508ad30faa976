"""A parameter's coefficients, summed (or their largest taken) over entries of equal scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathlift.errors import ArgumentError
from pathlift.solve.matrix import Array, to_numpy
from pathlift.symmetry.rows import ParameterScales
from pathlift.tensors.alike import fetched
from pathlift.tensors.pieces import entries_at_a_time
from pathlift.tensors.product import Product

# A group of axes and the terms of the exponent that vary along them.
Part = tuple[tuple[int, ...], list[tuple[int, Tensor]]]


@dataclass(frozen=True)
class Sums:
    """What the problem needs of one parameter's coefficients.

    Attributes:
        numel: entries of the parameter.
        positive: entries with a positive coefficient.
        log_sum: sum of their natural logarithms (0 for a parameter that does not count).
        parts: the groups of axes that carry scales, two at most; none where no scale acts.
        matrix: sums (or maxima) over entries of equal scale, one axis per part; without parts the
            sum of all. float64, or a matrix in the dtype of the coefficients, or a product.
        labels: per part, the distinct tuples of variables.
        tallies: per part, how many positive entries stand in each slice of ``matrix``.
        finite: whether no coefficient is NaN or infinite, nor a sum of them.
    """

    numel: int
    positive: int
    log_sum: float
    parts: list[Part]
    matrix: Tensor | Product
    labels: list[NDArray[np.int64]]
    tallies: list[Array]
    finite: bool = True


def sum_up(
    spec: ParameterScales, g: Tensor | Product, *, largest: bool = False, counted: bool = True
) -> Sums:
    """Sum a parameter's coefficients (or take the largest) over entries of equal scale.

    ``counted``: whether the parameter counts, so that its logarithms are summed, too.

    Raises:
        ArgumentError: a coefficient is NaN or infinite; the message names the parameter.
    """
    found = _summed(spec, g, largest, counted)
    if not found.finite:
        if isinstance(g, Tensor) and g.dtype != torch.float64:  # sums leave the range first
            return sum_up(spec, g.double(), largest=largest, counted=counted)
        raise ArgumentError(
            f"the criterion's coefficients of parameter '{spec.name}' are NaN or infinite. "
            f"Coefficients must be finite and >= 0: look at the values of this parameter and of "
            f"those on its paths, or choose another criterion (criterion='weight-norm')."
        )
    return found


def _summed(spec: ParameterScales, g: Tensor | Product, maxima: bool, counted: bool) -> Sums:
    parts = _two_parts(spec)
    classes = [classes_of(g.shape, axes, terms) for axes, terms in parts]
    if isinstance(g, Product):
        if not maxima and _separable(g, parts):
            return _sum_up_product(g, parts, classes, counted)
        g = g.dense()
    matrix = reduce_to(g, parts, classes, maxima) if parts else g.sum(dtype=torch.float64)
    # All that is asked of a parameter, in one transfer.
    pieces = _pieces(g) if counted else []
    logs = [piece.log().sum(dtype=torch.float64) for piece in pieces]
    count, finite, *sums = fetched([torch.count_nonzero(g), matrix.isfinite().all(), *logs])
    positive = int(count)
    if not positive:
        zero = torch.zeros((), dtype=torch.float64)
        return Sums(g.numel(), 0, 0.0, [], zero, [], [], bool(finite))
    full = positive == g.numel()
    if not full:
        sums = fetched([p[p > 0].log().sum(dtype=torch.float64) for p in pieces])
    log_sum = math.fsum(sums) if finite else 0.0
    if not parts:
        return Sums(g.numel(), positive, log_sum, [], matrix, [], [], bool(finite))
    tallies = _all_positive(g.numel(), classes) if full else _tallies(g, parts, classes)
    if len(parts) == 1 or matrix.dtype != torch.float32:
        matrix = matrix.to(torch.float64)
    labels = [c.tuples for c in classes]
    matrix = matrix.contiguous()
    return Sums(g.numel(), positive, log_sum, parts, matrix, labels, tallies, bool(finite))


def _separable(g: Product, parts: Sequence[Part]) -> bool:
    """Whether the sums of a product follow from its factors.

    Rows and columns must scale on their own, and zeros be those of whole rows and columns.
    """
    alone = all(len(axes) == 1 for axes, _ in parts)
    return alone and (len(g.left) == 1 or g.bounds()[0] > 0)


def _sum_up_product(
    g: Product, parts: list[Part], classes: Sequence[Classes], counted: bool
) -> Sums:
    """The sums of coefficients that are a product, without forming it."""
    factors = [f.to(torch.float64) for f in (g.left, g.right)]
    alive = [(f > 0).any(0) for f in factors]
    sizes = [int(a.sum()) for a in alive]
    positive = sizes[0] * sizes[1]
    if not positive:
        return Sums(g.numel(), 0, 0.0, [], torch.zeros((), dtype=torch.float64), [], [])
    log_sum = _log_sum_of_product(g, alive) if counted else 0.0
    merged: list[Tensor] = []
    labels: list[NDArray[np.int64]] = []
    tallies: list[Array] = []
    for ((axis,), _), found in zip(parts, classes, strict=True):
        tally = found.merge(alive[axis].to(torch.float64), 0) * sizes[1 - axis]
        kept = tally > 0
        merged.append(found.merge(factors[axis], 1)[:, kept])
        labels.append(found.tuples[kept.cpu().numpy()])
        tallies.append(to_numpy(tally[kept]))
    if len(parts) == 2:
        product = Product(merged[0], merged[1])
        matrix = product if product.thin else product.dense()
        values = (matrix.left, matrix.right) if isinstance(matrix, Product) else (matrix,)
        finite = all(bool(v.isfinite().all()) for v in values)
        return Sums(g.numel(), positive, log_sum, parts, matrix, labels, tallies, finite)
    # What carries no scale of its own is summed.
    others = {0, 1} - {axis for (axis,), _ in parts}
    total = torch.stack([factors[axis].sum(1) for axis in others]).prod(0)
    vector = total @ merged[0] if merged else total.sum()
    finite = bool(vector.isfinite().all())
    return Sums(g.numel(), positive, log_sum, parts, vector, labels, tallies, finite)


def _all_positive(numel: int, classes: Sequence[Classes]) -> list[Array]:
    """The tallies of a parameter without zeros: every slice has its full share of entries."""
    sizes = [torch.from_numpy(c.counts).to(torch.float64) for c in classes]
    total = numel / math.prod(int(s.sum()) for s in sizes)
    return [
        s.numpy() * total * math.prod(int(o.sum()) for k, o in enumerate(sizes) if k != j)
        for j, s in enumerate(sizes)
    ]


def _tallies(g: Tensor, parts: Sequence[Part], classes: Sequence[Classes]) -> list[Array]:
    number = reduce_to((g > 0).to(torch.float64), parts, classes)
    sums = [number] if len(parts) == 1 else [number.sum(1), number.sum(0)]
    return [to_numpy(s) for s in sums]


def _pieces(g: Tensor) -> Sequence[Tensor]:
    """Parts that are worked on at a time."""
    size = entries_at_a_time(g.device)
    rows = max(1, size * max(len(g), 1) // max(g.numel(), 1)) if g.dim() else 1
    return g.split(rows) if g.dim() else [g]


def _log_sum_of_product(g: Product, alive: Sequence[Tensor]) -> float:
    """Sum of natural logarithms of the positive entries."""
    left, right = (f[:, a] for f, a in zip((g.left, g.right), alive, strict=True))
    if len(left) == 1:
        logs = [float(f.to(torch.float64).log().sum()) for f in (left, right)]
        return right.shape[1] * logs[0] + left.shape[1] * logs[1]
    columns = max(1, entries_at_a_time(g.device) // right.shape[1])
    products = (piece.t() @ right for piece in left.split(columns, 1))
    return math.fsum(float(p.log_().sum(dtype=torch.float64)) for p in products)


def _two_parts(spec: ParameterScales) -> list[Part]:
    """At most two groups of axes with their terms (further groups are joined into the second)."""
    parts: list[Part] = spec.components()
    constants = [t for axes, terms in parts if not axes for t in terms]
    parts = [(axes, terms) for axes, terms in parts if axes]
    if constants:
        if not parts:
            return [((), constants)]
        parts[0] = (parts[0][0], parts[0][1] + constants)
    parts.sort(key=lambda part: -math.prod(spec.shape[d] for d in part[0]))
    if len(parts) > 2:
        axes = tuple(sorted(d for part in parts[1:] for d in part[0]))
        parts = [parts[0], (axes, [t for part in parts[1:] for t in part[1]])]
    return parts


@dataclass(frozen=True)
class Classes:
    """Indices along a part's axes, in classes of equal scale.

    Attributes:
        tuples: the distinct tuples of variables, one row each.
        index: the class of every index.
        counts: how many indices each class has.
    """

    tuples: NDArray[np.int64]
    index: NDArray[np.int64]
    counts: NDArray[np.int64]

    def merge(self, values: Tensor, axis: int, maxima: bool = False) -> Tensor:
        """Sums (or maxima) of the slices of each class, in their order."""
        number = len(self.tuples)
        if number < len(self.index):
            label = torch.from_numpy(self.index).to(values.device)
            over = _max_over if maxima else _sum_over
            return over(values, axis, label, number)
        order = np.argsort(self.index)
        if np.array_equal(order, np.arange(number)):
            return values
        return values.index_select(axis, torch.from_numpy(order).to(values.device))


def classes_of(
    shape: torch.Size, axes: Sequence[int], terms: Sequence[tuple[int, Tensor]]
) -> Classes:
    sizes = [n if d in axes else 1 for d, n in enumerate(shape)]
    order = [*axes, *(d for d in range(len(shape)) if d not in axes)]
    table = np.stack(
        [ids.expand(sizes).permute(order).reshape(-1).numpy() for _, ids in terms], axis=1
    )
    key = table[:, 0]
    for column in table.T[1:]:  # numbers that order as the tuples do
        key = np.unique(key, return_inverse=True)[1] * (int(column.max()) + 1) + column
    if bool((key[1:] > key[:-1]).all()):
        return Classes(table, np.arange(len(table)), np.ones(len(table), np.int64))
    _, first, index, counts = np.unique(
        key, return_index=True, return_inverse=True, return_counts=True
    )
    return Classes(table[first], index.reshape(-1), counts)


def reduce_to(
    g: Tensor, parts: Sequence[Part], classes: Sequence[Classes], maxima: bool = False
) -> Tensor:
    """Sum ``g`` (or take its maxima) to one axis per part, then over equal scales."""
    kept = [d for axes, _ in parts for d in axes]
    rest = [d for d in range(g.dim()) if d not in kept]
    moved = g.permute(*kept, *rest) if g.dim() else g
    sizes = [math.prod(g.shape[d] for d in axes) for axes, _ in parts]
    summed = moved.reshape(*sizes, -1) if rest else moved.reshape(sizes)
    if rest:
        summed = summed.amax(-1) if maxima else summed.sum(-1)
    for axis, found in enumerate(classes):
        summed = found.merge(summed, axis, maxima)
    return summed


def _sum_over(values: Tensor, axis: int, label: Tensor, count: int) -> Tensor:
    """Sum slices with equal label; runs of one length (a flattened feature map) by reshaping."""
    run = values.shape[axis] // count
    regular = torch.arange(count, device=label.device).repeat_interleave(run)
    if len(regular) == len(label) and torch.equal(regular, label):
        return values.unflatten(axis, (count, run)).sum(axis + 1)
    shape = list(values.shape)
    shape[axis] = count
    return values.new_zeros(shape).index_add_(axis, label, values)


def _max_over(values: Tensor, axis: int, label: Tensor, count: int) -> Tensor:
    """Maximum of slices with equal label."""
    shape = list(values.shape)
    shape[axis] = count
    view = [-1 if d == axis else 1 for d in range(values.dim())]
    index = label.reshape(view).expand(values.shape)
    return values.new_zeros(shape).scatter_reduce_(axis, index, values, "amax")
