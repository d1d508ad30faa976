"""Group and coefficients -> :class:`Problem`: every tensor summed over entries of equal scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathlift.capture.program import Program
from pathlift.criteria.protocol import Coefficients, Criterion
from pathlift.solve.matrix import Store, to_numpy
from pathlift.solve.problem import MatrixBlock, Operator, Problem, as_is
from pathlift.solve.ranges import value
from pathlift.symmetry.group import ParameterScales, RescalingGroup
from pathlift.symmetry.scales import distinct
from pathlift.tensors.pieces import entries_at_a_time
from pathlift.tensors.product import Product, dense

Array = NDArray[np.float64]
# A group of axes and the terms of the exponent that vary along them.
Part = tuple[tuple[int, ...], list[tuple[int, Tensor]]]


@dataclass(frozen=True)
class Assembled:
    """The problem, and what its report needs.

    Attributes:
        log_mean: mean of the natural logarithm of the counted coefficients.
        slope: ``(H,)``, sum of the exponent rows of the counted entries (the linear term of a
            balanced objective, also where the problem has none).
        dead: indices of scales held at 0 because nothing with a positive coefficient enters or
            leaves.
    """

    problem: Problem
    log_mean: float
    slope: Array
    dead: NDArray[np.int64]

    @cached_property
    def operator(self) -> Operator:
        """The problem's products, made once."""
        return Operator(self.problem)

    def imbalance(self, scales: Array) -> float:
        """``log(AM/GM)`` of the coefficients, per counted entry, after rescaling by ``scales``.

        For ranges: the mean over channels of ``|log(range in / range out)|``.
        """
        count = self.problem.count
        if not count:
            return 0.0
        if self.problem.reduction == "max":
            return value(self.operator, scales)
        slant = 2 * math.log(2) * float((self.slope - self.problem.linear) @ scales)
        log_sum = (value(self.operator, scales) + slant) / count
        return max(0.0, log_sum - math.log(count) - self.log_mean)


def assemble(
    group: RescalingGroup,
    criterion: Coefficients,
    trainable: Mapping[str, bool],
    lower: Array,
    upper: Array,
) -> Assembled:
    """Sum the coefficients over kernel positions and over entries with equal scales.

    Args:
        group: ``H`` free scales.
        criterion: coefficients per parameter entry and their objective; only entries with a
            positive coefficient count.
        trainable: parameter name -> whether it counts.
        lower, upper: bounds ``(H,)`` on the scales, log2.
    """
    sums = {
        name: sum_up(
            group.parameters[name], g, criterion.reduction == "max", trainable.get(name, True)
        )
        for name, g in criterion.values.items()
    }
    return assemble_sums(group, sums, criterion, trainable, lower, upper)


def assemble_from(
    group: RescalingGroup,
    criterion: Criterion,
    program: Program,
    lower: Array,
    upper: Array,
    store: Store = as_is,
) -> tuple[Assembled, dict[str, int]]:
    """Like :func:`assemble`, a parameter at a time: no coefficients are kept.

    ``store``: where the reduced matrices are put; see :class:`Problem`.

    Also returns the operations a stand-in was used for, with counts.
    """
    trainable = {n: p.requires_grad for n, p in program.parameters.items()}
    maxima = criterion.reduction == "max"
    sums: dict[str, Sums] = {}

    def take(name: str, g: Tensor | Product) -> None:
        found = sum_up(group.parameters[name], g, maxima, trainable[name])
        if isinstance(found.matrix, Tensor):
            found = replace(found, matrix=store(found.matrix))
        sums[name] = found

    approximated = criterion.hand_on(program, take)
    ordered = {n: sums[n] for n in program.parameters if n in sums}
    objective = criterion.coefficients({}, approximated)
    assembled = assemble_sums(group, ordered, objective, trainable, lower, upper, store)
    return assembled, approximated


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
    """

    numel: int
    positive: int
    log_sum: float
    parts: list[Part]
    matrix: Tensor | Product
    labels: list[NDArray[np.int64]]
    tallies: list[Array]


def sum_up(spec: ParameterScales, g: Tensor | Product, maxima: bool, counted: bool = True) -> Sums:
    """Sum a parameter's coefficients (or take maxima) over entries of equal scale."""
    parts = _two_parts(spec)
    classes = [_classes(g.shape, axes, terms) for axes, terms in parts]
    if isinstance(g, Product):
        if not maxima and _separable(g, parts):
            return _sum_up_product(g, parts, classes, counted)
        g = g.dense()
    positive = int(torch.count_nonzero(g))
    if not positive:
        return Sums(g.numel(), 0, 0.0, [], torch.zeros((), dtype=torch.float64), [], [])
    full = positive == g.numel()
    log_sum = _log_sum(g, full) if counted else 0.0
    if not parts:
        total = g.sum(dtype=torch.float64)
        return Sums(g.numel(), positive, log_sum, [], total, [], [])
    matrix = _reduce(g, parts, classes, maxima)
    tallies = _all_positive(g.numel(), classes) if full else _tallies(g, parts, classes)
    if len(parts) == 1 or matrix.dtype != torch.float32:
        matrix = matrix.to(torch.float64)
    labels = [c.tuples for c in classes]
    return Sums(g.numel(), positive, log_sum, parts, matrix.contiguous(), labels, tallies)


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
        return Sums(g.numel(), positive, log_sum, parts, matrix, labels, tallies)
    # What carries no scale of its own is summed.
    others = {0, 1} - {axis for (axis,), _ in parts}
    total = torch.stack([factors[axis].sum(1) for axis in others]).prod(0)
    vector = total @ merged[0] if merged else total.sum()
    return Sums(g.numel(), positive, log_sum, parts, vector, labels, tallies)


def _all_positive(numel: int, classes: Sequence[Classes]) -> list[Array]:
    """The tallies of a parameter without zeros: every slice has its full share of entries."""
    sizes = [torch.from_numpy(c.counts).to(torch.float64) for c in classes]
    total = numel / math.prod(int(s.sum()) for s in sizes)
    return [
        s.numpy() * total * math.prod(int(o.sum()) for k, o in enumerate(sizes) if k != j)
        for j, s in enumerate(sizes)
    ]


def _tallies(g: Tensor, parts: Sequence[Part], classes: Sequence[Classes]) -> list[Array]:
    number = _reduce((g > 0).to(torch.float64), parts, classes)
    sums = [number] if len(parts) == 1 else [number.sum(1), number.sum(0)]
    return [to_numpy(s) for s in sums]


def assemble_sums(
    group: RescalingGroup,
    sums: Mapping[str, Sums],
    criterion: Coefficients,
    trainable: Mapping[str, bool],
    lower: Array,
    upper: Array,
    store: Store = as_is,
) -> Assembled:
    """The problem of parameters whose coefficients are summed already; see :func:`assemble`.

    ``criterion``: its values are not read. ``store``: see :class:`Problem`.
    """
    # The problem is written for the rate -2; other rates multiply the exponents.
    factor = -criterion.rate / 2
    h = group.num_scales
    live = {n: e for n, e in sums.items() if e.positive}
    counted = {n: e for n, e in live.items() if trainable.get(n, True)}
    pairs = [e for e in counted.values() if len(e.parts) == 2]
    singles = [e for e in counted.values() if len(e.parts) == 1]
    others = [e for n, e in live.items() if n not in counted]
    constant = math.fsum(float(dense(e.matrix)) for e in counted.values() if not e.parts)
    count = sum(e.positive for e in counted.values())
    log_sum = math.fsum(e.log_sum for e in counted.values())

    ordered = [*pairs, *singles, *others]
    forms, starts = _stacked_forms(ordered, group.basis)
    tally = np.concatenate([t for e in ordered for t in e.tallies] or [np.zeros(0)])
    counting = np.zeros(len(tally))
    counting[: starts[2 * len(pairs) + len(singles)]] = 1.0
    exponents, scale = forms.data, forms.indices
    weighed = exponents * np.repeat(tally, np.diff(forms.indptr))
    entering = np.bincount(scale, np.maximum(weighed, 0), minlength=h) * abs(factor)
    leaving = np.bincount(scale, np.maximum(-weighed, 0), minlength=h) * abs(factor)
    linear = (forms.T @ (tally * counting)) * factor
    forms = forms * factor
    blocks = tuple(
        MatrixBlock(
            e.matrix,
            _rows(forms, starts[2 * k], starts[2 * k + 1]),
            _rows(forms, starts[2 * k + 1], starts[2 * k + 2]),
        )
        for k, e in enumerate(pairs)
    )
    single_forms = _rows(forms, starts[2 * len(pairs)], starts[2 * len(pairs) + len(singles)])
    vector = np.concatenate([np.zeros(0), *(to_numpy(dense(e.matrix)) for e in singles)])
    carried = _carried(group)
    gains, loses = _sides(group, carried, sums)
    one_sided = (gains & (entering == 0)) | (loses & (leaving == 0))
    if not criterion.balanced:  # a sum without the linear term needs both sides
        one_sided = (entering == 0) | (leaving == 0)
    dead = np.flatnonzero(one_sided | (entering + leaving == 0))
    lower, upper = lower.copy(), upper.copy()
    lower[dead] = upper[dead] = 0.0
    problem = Problem(
        h,
        blocks,
        vector,
        single_forms,
        constant,
        linear if criterion.balanced else np.zeros(h),
        count,
        lower,
        upper,
        _layers(group, carried),
        criterion.reduction,
        store,
    )
    return Assembled(problem, log_sum / count if count else 0.0, linear, dead)


def _stacked_forms(
    entries: Sequence[Sums], basis: sp.csr_array
) -> tuple[sp.csr_array, NDArray[np.int64]]:
    """The exponent rows of all labels, one under the other, and where each part's begin."""
    tables = [table for e in entries for table in e.labels]
    terms = [[c for c, _ in t] for e in entries for _, t in e.parts]
    ends = np.cumsum([0, *(len(t) for t in tables)])
    widths = np.repeat(np.asarray([t.shape[1] for t in tables], np.int64), np.diff(ends))
    chosen = sp.csr_array(
        (
            np.concatenate(
                [np.zeros(0), *(np.tile(c, len(t)) for c, t in zip(terms, tables, strict=True))]
            ),
            np.concatenate([np.zeros(0, np.int64), *(t.reshape(-1) for t in tables)]),
            np.concatenate([[0], np.cumsum(widths)]).astype(np.int64),
        ),
        shape=(int(ends[-1]), basis.shape[0]),
    )
    return sp.csr_array(chosen @ basis), ends


def _rows(forms: sp.csr_array, start: int, end: int) -> sp.csr_array:
    """Some rows, one after the other."""
    a, b = forms.indptr[start], forms.indptr[end]
    part = (forms.data[a:b], forms.indices[a:b], forms.indptr[start : end + 1] - a)
    return sp.csr_array(part, shape=(end - start, forms.shape[1]))


@dataclass(frozen=True)
class _Carried:
    """Which free scales the terms of parameters carry, in the order of parameters and terms.

    Attributes:
        scale: indices of free scales.
        parameter: the number of the parameter.
        term: the number of the term within it.
        sign: of the exponent.
    """

    scale: NDArray[np.int64]
    parameter: NDArray[np.int64]
    term: NDArray[np.int64]
    sign: NDArray[np.float64]


def _carried(group: RescalingGroup) -> _Carried:
    found = [
        (distinct(ids.numpy().reshape(-1)), k, j, coefficient)
        for k, spec in enumerate(group.parameters.values())
        for j, (coefficient, ids) in enumerate(spec.terms)
    ]
    variables = np.concatenate([np.zeros(0, np.int64), *(ids for ids, *_ in found)])
    rows = group.basis[variables]
    repeats = np.diff(rows.indptr)
    lengths = [len(ids) for ids, *_ in found]
    tags = np.asarray([tag for _, *tag in found], dtype=np.int64).reshape(-1, 3)
    tags = np.repeat(np.repeat(tags, lengths, axis=0), repeats, axis=0)
    return _Carried(rows.indices, tags[:, 0], tags[:, 1], np.sign(tags[:, 2] * rows.data))


def _sides(
    group: RescalingGroup, carried: _Carried, names: Iterable[str]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Per free scale, whether any entry (also with g = 0) grows with it, and whether any shrinks.

    A scale with one side only (in front of a batch norm whose statistics move along) still has a
    minimiser; one of whose sides all entries have g = 0 is dead.
    """
    names = set(names)
    known = np.asarray([n in names for n in group.parameters], dtype=bool)[carried.parameter]
    gains = np.zeros(group.num_scales, dtype=bool)
    loses = np.zeros(group.num_scales, dtype=bool)
    gains[carried.scale[known & (carried.sign > 0)]] = True
    loses[carried.scale[known & (carried.sign < 0)]] = True
    return gains, loses


def _log_sum(g: Tensor, full: bool) -> float:
    """Sum of natural logarithms of positive entries, logarithms in their dtype, sums in float64."""
    size = entries_at_a_time(g.device)
    rows = max(1, size * max(len(g), 1) // max(g.numel(), 1)) if g.dim() else 1
    pieces = g.split(rows) if g.dim() else [g]
    positive = (piece if full else piece[piece > 0] for piece in pieces)
    return math.fsum(float(piece.log().sum(dtype=torch.float64)) for piece in positive)


def _log_sum_of_product(g: Product, alive: Sequence[Tensor]) -> float:
    """Sum of natural logarithms of the positive entries."""
    left, right = (f[:, a] for f, a in zip((g.left, g.right), alive, strict=True))
    if len(left) == 1:
        logs = [float(f.to(torch.float64).log().sum()) for f in (left, right)]
        return right.shape[1] * logs[0] + left.shape[1] * logs[1]
    columns = max(1, entries_at_a_time(g.device) // right.shape[1])
    products = (piece.t() @ right for piece in left.split(columns, 1))
    return math.fsum(float(p.log_().sum(dtype=torch.float64)) for p in products)


def _layers(group: RescalingGroup, carried: _Carried) -> NDArray[np.int64]:
    """A number per free scale: the parameter in whose rows or columns it stands first."""
    found = np.full(group.num_scales, -1, dtype=np.int64)
    number = 4 * carried.parameter + np.minimum(carried.term, 3)
    found[carried.scale[::-1]] = number[::-1]  # the first one is written last
    return found


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


def _classes(
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


def _reduce(
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
