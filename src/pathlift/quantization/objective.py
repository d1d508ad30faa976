"""The sum of all errors, and the scales that make it least.

Largest magnitudes are smoothed: ``max_i x_i`` is taken for ``(sum_i x_i^q)^(1/q)``, with q rising
in stages, each stage started where the last one ended. Every stage is convex and smooth, and one
evaluation is two products with every matrix of magnitudes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

from pathlift.quantization.terms import Term
from pathlift.solve.matrix import Array
from pathlift.solve.problem import LN2

# Orders of the norms that stand for maxima, and iterations for each.
STAGES = ((8.0, 30), (32.0, 40))
# Pull towards no scale, per scale squared: it decides where nothing else does.
_PULL = 1e-4
# Log2 of the largest magnitude of nothing but zeros.
_NOTHING = -500.0


class Errors:
    """The expected squared error at the output of all terms together.

    Rows, columns, groups (largest magnitudes) and terms are numbered throughout.

    Args:
        terms: of the quantised tensors.
        num_scales: of the group.
    """

    def __init__(self, terms: Sequence[Term], num_scales: int) -> None:
        self.terms = tuple(terms)
        self.num_scales = num_scales
        empty = sparse.csr_array((0, num_scales))
        self._rows = sparse.csr_array(sparse.vstack([empty, *(t.rows for t in self.terms)], "csr"))
        self._columns = sparse.csr_array(
            sparse.vstack([empty, *(t.columns for t in self.terms)], "csr")
        )
        self._rows_t = sparse.csr_array(self._rows.T.tocsr())
        self._columns_t = sparse.csr_array(self._columns.T.tocsr())
        self._row_ends = np.cumsum([0, *(len(t.by_row) for t in self.terms)])
        self._column_ends = np.cumsum([0, *(len(t.by_column) for t in self.terms)])
        first = np.cumsum([0, *(t.groups for t in self.terms)])
        counts = [t.groups for t in self.terms]
        self._groups = int(first[-1])
        self._group = _joined(
            [t.group + k for t, k in zip(self.terms, first, strict=False)]
        ).astype(np.int64)
        self._term = np.repeat(np.arange(len(self.terms)), counts)
        self._column_term = np.repeat(np.arange(len(self.terms)), np.diff(self._column_ends))
        self._by_row = _joined([t.by_row for t in self.terms])
        totals = [float(t.by_column.sum()) or 1.0 for t in self.terms]
        self._by_column = _joined(
            [t.by_column / n for t, n in zip(self.terms, totals, strict=True)]
        )
        self._floor = np.repeat([t.floor for t in self.terms], counts)
        self._fixed = np.asarray([t.fixed for t in self.terms], dtype=np.float64)

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

    def least(self, start: Array, lower: Array, upper: Array) -> tuple[Array, int]:
        """The scales within the bounds at which the sum is least, and the evaluations it took."""
        point, evaluations = np.clip(start, lower, upper), 0
        for q, iterations in STAGES:
            found = optimize.minimize(
                _Stage(self, point, q),
                point,
                jac=True,
                method="L-BFGS-B",
                bounds=optimize.Bounds(lower, upper),
                options={"maxiter": iterations, "maxcor": 12, "ftol": 1e-6, "gtol": 1e-9},
            )
            point, evaluations = np.asarray(found.x), evaluations + int(found.nfev)
        return point, evaluations

    def _tops(self, row: Array, column: Array) -> Array:
        """Log2 of every group's largest magnitude."""
        tops = np.full(self._groups, _NOTHING)
        largest = [self._logs(k, row, column).max(axis=1) for k in range(len(self.terms))]
        np.maximum.at(tops, self._group, _joined(largest))
        return tops

    def _logs(self, k: int, row: Array, column: Array) -> Array:
        """Log2 of the magnitudes of a term, moved."""
        rows = row[self._row_ends[k] : self._row_ends[k + 1], None]
        return self.terms[k].logs + rows + column[self._column_ends[k] : self._column_ends[k + 1]]

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
    """The log of the smoothed sum and its gradient, for one q, around one point."""

    def __init__(self, errors: Errors, centre: Array, q: float) -> None:
        self.errors, self.q = errors, q
        self.row, self.column = errors._rows @ centre, errors._columns @ centre
        self.tops = errors._tops(self.row, self.column)
        tops = self.tops[errors._group]
        self.constant = np.zeros(len(tops))
        # Terms of one column, which nothing scales, have no product.
        self.matrices: list[tuple[slice, slice, Array]] = []
        for k, one in enumerate(errors.terms):
            rows = slice(errors._row_ends[k], errors._row_ends[k + 1])
            columns = slice(errors._column_ends[k], errors._column_ends[k + 1])
            logs = errors._logs(k, self.row, self.column) - tops[rows, None]
            if one.columns.nnz:
                self.matrices.append((rows, columns, np.exp2(q * logs)))
            else:
                self.constant[rows] = np.exp2(q * logs).sum(1)

    def __call__(self, point: Array) -> tuple[float, Array]:
        errors, q = self.errors, self.q
        row, column = errors._rows @ point, errors._columns @ point
        # 2^(q step) stays within the range of float64.
        most = 450.0 / q
        up_row = np.exp2(q * np.clip(row - self.row, -most, most))
        up_column = np.exp2(q * np.clip(column - self.column, -most, most))
        across = self.constant.copy()
        for rows, columns, matrix in self.matrices:
            across[rows] = matrix @ up_column[columns]
        powers = up_row * across
        sums = _summed(errors._group, powers, errors._groups)
        sums = np.maximum(sums, 1e-290)
        (weight, rows_down), (share, columns_down) = errors._weights(row, column)
        each = errors._floor * np.exp2(2.0 * self.tops) * sums ** (2.0 / q)
        each = each * weight * share[errors._term]
        total = float(each.sum() + errors._fixed.sum())
        over = (each / sums)[errors._group]
        down = np.zeros(len(up_column))
        per_row = over * up_row
        for rows, columns, matrix in self.matrices:
            down[columns] = per_row[rows] @ matrix
        by_term = _summed(errors._term, each, len(errors.terms))
        slope_row = over * powers - rows_down * _over(each, weight)[errors._group]
        slope_column = up_column * down - columns_down * _over(by_term, share)[errors._column_term]
        pull = _PULL / max(errors.num_scales, 1)
        slope = errors._rows_t @ slope_row + errors._columns_t @ slope_column
        gradient = slope * (2.0 * LN2 / total) + pull * point
        return float(np.log(total)) + 0.5 * pull * float(point @ point), np.asarray(gradient)


def _over(values: Array, by: Array) -> Array:
    return np.asarray(values / np.where(by > 0, by, 1.0))


def _joined(parts: Sequence[Array]) -> Array:
    return np.concatenate([np.zeros(0), *parts])


def _summed(index: NDArray[np.int64], values: Array, count: int) -> Array:
    """Sums of the values of each index."""
    return np.asarray(np.bincount(index, values, minlength=count), dtype=np.float64)
