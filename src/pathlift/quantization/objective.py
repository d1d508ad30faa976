"""The sum of all errors, and the scales that make it least.

Largest magnitudes are smoothed: ``max_i x_i`` is taken for ``(sum_i x_i^q)^(1/q)``, with q rising
in stages, each stage started where the last one ended. Every stage is convex and smooth, and one
evaluation is two products with every matrix of magnitudes, which are float32; everything else is
float64.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from pathlift.quantization.descent import Curvature, descend, dot
from pathlift.quantization.terms import Forms, Term
from pathlift.solve.matrix import Array
from pathlift.solve.problem import LN2

_Single = NDArray[np.float32]
_Entries = tuple[_Single, NDArray[np.int64], NDArray[np.int64]]

# Orders of the norms that stand for maxima, and iterations for each.
STAGES = ((8.0, 20), (32.0, 25))
# Pull towards no scale, per scale squared: it decides where nothing else does.
_PULL = 1e-4
# Log2 of the largest magnitude of nothing but zeros.
_NOTHING = -500.0
# Log2 of how far q-th powers may move before the matrices are made anew, of what is taken for 0
# beside the largest (it stays small, wherever rows and columns move until then), and of what is
# taken for 0 of slopes. No product of these is subnormal in float32, which would be slow.
_FAR, _SMALLEST, _FLAT = 35.0, -80.0, -40.0
# Share of entries that are not 0, below which they alone are kept: at large q they are few.
_SPARSE = 0.15


class Errors:
    """The expected squared error at the output of all terms together.

    Rows, columns, groups (largest magnitudes) and terms are numbered throughout.

    Args:
        terms: of the quantised tensors.
        basis: of the group, ``(variables, num_scales)``.
    """

    def __init__(self, terms: Sequence[Term], basis: sparse.csr_array) -> None:
        self.num_scales: int = basis.shape[1]
        self._rows = _exponents([t.rows for t in terms], basis)
        self._columns = _exponents([t.columns for t in terms], basis)
        self._rows_t = sparse.csr_array(self._rows.T.tocsr())
        self._columns_t = sparse.csr_array(self._columns.T.tocsr())
        self._row_ends = np.cumsum([0, *(len(t.by_row) for t in terms)])
        self._column_ends = np.cumsum([0, *(len(t.by_column) for t in terms)])
        first = np.cumsum([0, *(t.groups for t in terms)])
        counts = [t.groups for t in terms]
        self._groups = int(first[-1])
        self._group = _joined([t.group + k for t, k in zip(terms, first, strict=False)]).astype(
            np.int64
        )
        self._term = np.repeat(np.arange(len(terms)), counts)
        self._column_term = np.repeat(np.arange(len(terms)), np.diff(self._column_ends))
        self._floor = np.repeat([t.floor for t in terms], counts)
        self._take(terms)

    def _take(self, terms: Sequence[Term]) -> None:
        self.terms = tuple(terms)
        self._by_row = _joined([t.by_row for t in terms])
        totals = [float(t.by_column.sum()) or 1.0 for t in terms]
        self._by_column = _joined([t.by_column / n for t, n in zip(terms, totals, strict=True)])
        self._fixed = np.asarray([t.fixed for t in terms], dtype=np.float64)

    def replaced(self, terms: Sequence[Term]) -> Errors:
        """The errors with other sums of G, from the same tensors."""
        made = copy.copy(self)
        made._take(terms)
        return made

    def each(self, scales: Array) -> Array:
        """Per term, its error at ``scales`` ``(num_scales,)``, by its definition."""
        row, column = self._rows @ scales, self._columns @ scales
        tops = self._tops(row, column)
        weight, share = self._weights(row, column)
        errors = self._floor * np.exp2(2.0 * tops) * weight[0] * share[0][self._term]
        return _summed(self._term, errors, len(self.terms)) + self._fixed

    def total(self, scales: Array) -> float:
        """The sum over all terms."""
        return float(self.each(scales).sum())

    def least(
        self, start: Array, lower: Array, upper: Array, stages: Sequence[tuple[float, int]] = STAGES
    ) -> tuple[Array, int]:
        """The scales within the bounds at which the sum is least, and the evaluations it took."""
        point, evaluations, curvature = np.clip(start, lower, upper), 0, Curvature()
        for q, iterations in stages:
            stage = _Stage(self, q)
            point, more = descend(stage, point, lower, upper, iterations, curvature)
            evaluations += more
        return point, evaluations

    def _tops(self, row: Array, column: Array) -> Array:
        """Log2 of every group's largest magnitude."""
        tops = np.full(self._groups, _NOTHING)
        largest = [self._logs(k, row, column).max(axis=1) for k in range(len(self.terms))]
        np.maximum.at(tops, self._group, _joined(largest))
        return tops

    def _logs(self, k: int, row: Array, column: Array) -> _Single:
        """Log2 of the magnitudes of a term, moved."""
        rows = row[self._row_ends[k] : self._row_ends[k + 1], None].astype(np.float32)
        columns = column[self._column_ends[k] : self._column_ends[k + 1]].astype(np.float32)
        found = self.terms[k].logs + rows
        found += columns
        return found

    def _weights(
        self, row: Array, column: Array
    ) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """Sums of G per group and row; what columns multiply them by, per term and column."""
        rows = self._by_row * np.exp2(-2.0 * row)
        columns = self._by_column * np.exp2(-2.0 * column)
        by_group = _summed(self._group, rows, self._groups)
        by_term = _summed(self._column_term, columns, len(self.terms))
        return (by_group, rows), (by_term, columns)


class _Stage:
    """The log of the smoothed sum and its gradient, for one q.

    Powers are relative to the largest of a group at a point nearby; where that lies changes
    rounding, not the function.
    """

    def __init__(self, errors: Errors, q: float) -> None:
        self.errors, self.q = errors, q
        self.row = self.column = np.full(1, np.inf)

    def _move(self, row: Array, column: Array) -> None:
        """Make the matrices around a point."""
        errors, q = self.errors, self.q
        self.row, self.column = row, column
        logs = [errors._logs(k, row, column) for k in range(len(errors.terms))]
        self.tops = np.full(errors._groups, _NOTHING)
        np.maximum.at(self.tops, errors._group, _joined([one.max(axis=1) for one in logs]))
        tops = self.tops[errors._group].astype(np.float32)
        self.constant = np.zeros(len(tops))
        # Terms of one column, which nothing scales, have no product.
        self.matrices: list[tuple[slice, slice, Tensor]] = []
        few: list[_Entries] = []
        for k, matrix in enumerate(logs):
            rows = slice(errors._row_ends[k], errors._row_ends[k + 1])
            columns = slice(errors._column_ends[k], errors._column_ends[k + 1])
            matrix -= tops[rows, None]
            matrix *= q
            where = np.flatnonzero(matrix >= _SMALLEST)
            if len(where) < _SPARSE * matrix.size:
                row_of, column_of = np.divmod(where, matrix.shape[1])
                values = np.exp2(matrix.reshape(-1)[where])
                few.append((values, row_of + rows.start, column_of + columns.start))
                continue
            matrix[matrix < _SMALLEST] = -np.inf
            np.exp2(matrix, out=matrix)
            if len(errors.terms[k].columns.coefficients):
                self.matrices.append((rows, columns, torch.from_numpy(matrix)))
            else:
                self.constant[rows] = matrix.sum(1)
        self.few = _matrix(few, (len(row), len(column)))
        self.few_t = sparse.csc_array(self.few.T)

    def __call__(self, point: Array) -> tuple[float, Array]:
        errors, q = self.errors, self.q
        row, column = errors._rows @ point, errors._columns @ point
        if q * max(_distance(row, self.row), _distance(column, self.column)) > _FAR:
            self._move(row, column)
        up_row = np.exp2(q * (row - self.row))
        up_column = np.exp2(q * (column - self.column))
        single = up_column.astype(np.float32)
        across = self.constant + self.few @ single
        # Not NumPy's product: a second thread of its BLAS takes more time than it saves.
        vector = torch.from_numpy(single)
        for rows, columns, matrix in self.matrices:
            across[rows] += torch.mv(matrix, vector[columns]).numpy()
        powers = up_row * across
        sums = _summed(errors._group, powers, errors._groups)
        sums = np.maximum(sums, 1e-290)
        (weight, rows_down), (share, columns_down) = errors._weights(row, column)
        each = errors._floor * np.exp2(2.0 * self.tops) * sums ** (2.0 / q)
        each = each * weight * share[errors._term]
        total = float(each.sum() + errors._fixed.sum())
        over = (each / sums)[errors._group]
        per_row = over * up_row
        largest = float(per_row.max(initial=0.0)) or 1.0
        per_row /= largest
        single = np.where(per_row < 2.0**_FLAT, 0.0, per_row).astype(np.float32)
        down = (self.few_t @ single).astype(np.float64)
        vector = torch.from_numpy(single)
        for rows, columns, matrix in self.matrices:
            down[columns] += torch.mv(matrix.T, vector[rows]).numpy()
        by_term = _summed(errors._term, each, len(errors.terms))
        slope_row = over * powers - rows_down * _over(each, weight)[errors._group]
        slope_column = largest * up_column * down
        slope_column -= columns_down * _over(by_term, share)[errors._column_term]
        pull = _PULL / max(errors.num_scales, 1)
        slope = errors._rows_t @ slope_row + errors._columns_t @ slope_column
        gradient = slope * (2.0 * LN2 / total) + pull * point
        return float(np.log(total)) + 0.5 * pull * dot(point, point), np.asarray(gradient)


def _matrix(parts: Sequence[_Entries], shape: tuple[int, int]) -> sparse.csr_array:
    """All entries (values, rows, columns; by row) as one matrix."""
    values, rows, columns = (
        (_joined(list(p)) for p in zip(*parts, strict=True)) if parts else 3 * [np.zeros(0)]
    )
    places = (rows.astype(np.int32), columns.astype(np.int32))
    return sparse.csr_array((values.astype(np.float32), places), shape=shape)


def _exponents(forms: Sequence[Forms], basis: sparse.csr_array) -> sparse.csr_array:
    """All exponents in the free scales, ``(exponents, num_scales)``."""
    first = np.cumsum([0, *(len(f.variables) for f in forms)])
    places = [
        np.repeat(np.arange(len(f.variables)) + k, len(f.coefficients))
        for f, k in zip(forms, first, strict=False)
    ]
    values = _joined([np.tile(f.coefficients, len(f.variables)) for f in forms])
    columns = _joined([f.variables.reshape(-1) for f in forms]).astype(np.int64)
    rows = _joined(places).astype(np.int64)
    chosen = sparse.csr_array((values, (rows, columns)), shape=(int(first[-1]), basis.shape[0]))
    return sparse.csr_array(chosen @ basis)


def _distance(one: Array, other: Array) -> float:
    return float(np.abs(one - other).max(initial=0.0))


def _over(values: Array, by: Array) -> Array:
    return np.asarray(values / np.where(by > 0, by, 1.0))


def _joined(parts: Sequence[NDArray[np.generic]]) -> Array:
    return np.concatenate([np.zeros(0), *parts])


def _summed(index: NDArray[np.int64], values: Array, count: int) -> Array:
    """Sums of the values of each index."""
    return np.asarray(np.bincount(index, values, minlength=count), dtype=np.float64)
