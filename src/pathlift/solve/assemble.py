"""Group and coefficients -> :class:`Problem`: every tensor summed over entries of equal scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathlift.solve.problem import MatrixBlock, Problem
from pathlift.symmetry.group import ParameterScales, RescalingGroup

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Assembled:
    """The problem, and what its report needs.

    Attributes:
        log_mean: mean of ``log g`` over counted entries (natural logarithm).
        dead: indices of scales held at 0 because nothing with g > 0 enters or leaves.
    """

    problem: Problem
    log_mean: float
    dead: NDArray[np.int64]

    def imbalance(self, objective: float) -> float:
        """``log(AM/GM)`` per parameter, from ``F(s)`` without its constant."""
        count = self.problem.count
        if not count:
            return 0.0
        return max(0.0, objective / count - math.log(count) - self.log_mean)


def assemble(
    group: RescalingGroup,
    coefficients: Mapping[str, Tensor],
    trainable: Mapping[str, bool],
    lower: Array,
    upper: Array,
) -> Assembled:
    """Sum the coefficients over kernel positions and over entries with equal scales.

    Args:
        group: ``H`` free scales.
        coefficients: parameter name -> ``g`` of its shape; only entries with g > 0 count.
        trainable: parameter name -> whether it counts.
        lower, upper: bounds ``(H,)`` on the scales, log2.
    """
    h = group.num_scales
    blocks: list[MatrixBlock] = []
    vectors: list[Tensor] = []
    forms: list[sp.csr_array] = []
    constant, count, log_sum = 0.0, 0, 0.0
    linear, entering, leaving = np.zeros(h), np.zeros(h), np.zeros(h)
    for name, g in coefficients.items():
        positive = int(torch.count_nonzero(g))
        if not positive:
            continue
        full = positive == g.numel()
        counted = trainable.get(name, True)
        if counted:
            count += positive
            log_sum += _log_sum(g if full else g[g > 0])
        spec = group.parameters[name]
        parts = _two_parts(spec)
        if not parts:
            constant += float(g.sum(dtype=torch.float64)) if counted else 0.0
            continue
        matrix, labels = _reduce(g, parts)
        matrix = matrix.to(torch.float64)
        number = matrix_counts = None
        if not full:
            number, _ = _reduce((g > 0).to(torch.float64), parts)
        rows = [
            _forms(table, [c for c, _ in terms], group.basis)
            for (_, terms), (table, _) in zip(parts, labels, strict=True)
        ]
        sizes = [torch.from_numpy(n).to(torch.float64) for _, n in labels]
        if number is None:
            total = g.numel() / math.prod(int(s.sum()) for s in sizes)
            matrix_counts = [
                s.numpy() * total * math.prod(int(o.sum()) for k, o in enumerate(sizes) if k != j)
                for j, s in enumerate(sizes)
            ]
        elif len(parts) == 1:
            matrix_counts = [number.numpy()]
        else:
            matrix_counts = [number.sum(1).numpy(), number.sum(0).numpy()]
        for form, tally in zip(rows, matrix_counts, strict=True):
            if counted:
                linear += form.T @ tally
            entering += form.maximum(0).T @ tally
            leaving += (-form).maximum(0).T @ tally
        if not counted:
            continue
        if len(parts) == 1:
            vectors.append(matrix)
            forms.append(rows[0])
        else:
            blocks.append(MatrixBlock(matrix.contiguous(), rows[0], rows[1]))
    gains, loses = _sides(group, coefficients)
    dead = np.flatnonzero(
        (gains & (entering == 0)) | (loses & (leaving == 0)) | (entering + leaving == 0)
    )
    lower, upper = lower.copy(), upper.copy()
    lower[dead] = upper[dead] = 0.0
    stacked = sp.csr_array(sp.vstack(forms)) if forms else sp.csr_array((0, h))
    vector = torch.cat(vectors) if vectors else torch.zeros(0, dtype=torch.float64)
    problem = Problem(
        h,
        tuple(blocks),
        vector,
        stacked,
        constant,
        linear,
        count,
        lower,
        upper,
        layers(group),
    )
    return Assembled(problem, log_sum / count if count else 0.0, dead)


def _sides(
    group: RescalingGroup, coefficients: Mapping[str, Tensor]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Per free scale, whether any entry (also with g = 0) grows with it, and whether any shrinks.

    A scale with one side only (in front of a batch norm whose statistics move along) still has a
    minimiser; one of whose sides all entries have g = 0 is dead.
    """
    positive, negative = group.basis > 0, group.basis < 0
    gains = np.zeros(group.num_scales, dtype=bool)
    loses = np.zeros(group.num_scales, dtype=bool)
    for name in coefficients:
        for coefficient, ids in group.parameters[name].terms:
            rows = np.unique(ids.numpy())
            up = positive[rows].indices if coefficient > 0 else negative[rows].indices
            down = negative[rows].indices if coefficient > 0 else positive[rows].indices
            gains[up] = True
            loses[down] = True
    return gains, loses


def _log_sum(g: Tensor) -> float:
    """Sum of natural logarithms, accumulated in float64."""
    return float(g.log().sum(dtype=torch.float64))


def layers(group: RescalingGroup) -> NDArray[np.int64]:
    """A number per free scale: the parameter in whose rows or columns it stands first."""
    found = np.full(group.num_scales, -1, dtype=np.int64)
    for k, spec in enumerate(group.parameters.values()):
        for j, (_, ids) in enumerate(spec.terms):
            touched = np.unique(group.basis[np.unique(ids.numpy())].indices)
            new = touched[found[touched] < 0]
            found[new] = 4 * k + min(j, 3)
    return found


Part = tuple[tuple[int, ...], list[tuple[int, Tensor]]]


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


def _reduce(
    g: Tensor, parts: Sequence[Part]
) -> tuple[Tensor, list[tuple[NDArray[np.int64], NDArray[np.int64]]]]:
    """Sum ``g`` to one axis per part, then over equal scales.

    Returns the vector or matrix, and per part the distinct tuples of variables (one row each) and
    how many indices share them.
    """
    kept = [d for axes, _ in parts for d in axes]
    rest = [d for d in range(g.dim()) if d not in kept]
    moved = g.permute(*kept, *rest) if g.dim() else g
    sizes = [math.prod(g.shape[d] for d in axes) for axes, _ in parts]
    summed = moved.reshape(*sizes, -1).sum(-1) if rest else moved.reshape(sizes)
    labels = []
    for axis, (axes, terms) in enumerate(parts):
        shape = [n if d in axes else 1 for d, n in enumerate(g.shape)]
        order = [*axes, *(d for d in range(g.dim()) if d not in axes)]
        table = np.stack(
            [ids.expand(shape).permute(order).reshape(-1).numpy() for _, ids in terms],
            axis=1,
        )
        if table.shape[1] == 1:
            unique, inverse, counts = np.unique(
                table[:, 0], return_inverse=True, return_counts=True
            )
            unique = unique[:, None]
        else:
            unique, inverse, counts = np.unique(
                table, axis=0, return_inverse=True, return_counts=True
            )
        inverse = inverse.reshape(-1)
        labels.append((unique, counts))
        if len(unique) < len(inverse):
            summed = _sum_over(summed, axis, torch.from_numpy(inverse), len(unique))
        else:
            order_back = np.empty_like(inverse)
            order_back[inverse] = np.arange(len(inverse))
            if not np.array_equal(order_back, np.arange(len(inverse))):
                summed = summed.index_select(axis, torch.from_numpy(order_back))
    return summed, labels


def _sum_over(values: Tensor, axis: int, label: Tensor, count: int) -> Tensor:
    """Sum slices with equal label; runs of one length (a flattened feature map) by reshaping."""
    run = values.shape[axis] // count
    regular = torch.arange(count).repeat_interleave(run)
    if len(regular) == len(label) and torch.equal(regular, label):
        return values.unflatten(axis, (count, run)).sum(axis + 1)
    shape = list(values.shape)
    shape[axis] = count
    return values.new_zeros(shape).index_add_(axis, label, values)


def _forms(
    table: NDArray[np.int64], coefficients: Sequence[int], basis: sp.csr_array
) -> sp.csr_array:
    """Exponent rows of distinct tuples of variables."""
    total = coefficients[0] * basis[table[:, 0]]
    for k, c in enumerate(coefficients[1:], 1):
        total = total + c * basis[table[:, k]]
    return sp.csr_array(total)
