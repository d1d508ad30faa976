"""The sum of all errors, and the scales that make it least.

Largest magnitudes are smoothed: ``max_i x_i`` is taken for ``(sum_i x_i^q)^(1/q)``, with q rising
in stages, each stage started where the last one ended. Every stage is convex and smooth, and one
evaluation is two products with every matrix of magnitudes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, sparse

from pathlift.quantization.terms import Term
from pathlift.solve.matrix import Array
from pathlift.solve.problem import LN2

# Orders of the norms that stand for maxima, and iterations for each.
STAGES = ((8.0, 40), (32.0, 40))
# Pull towards no scale, per scale squared: it decides where nothing else does.
_PULL = 1e-4


@dataclass(frozen=True)
class _Smooth:
    """A term at the centre of a stage: ``(size 2^(forms centre))^q``, its largest entry 1."""

    term: Term
    matrix: Array
    tops: Array
    q: float


class Errors:
    """The expected squared error at the output of all terms together.

    Args:
        terms: of the quantised tensors.
        num_scales: of the group.
    """

    def __init__(self, terms: Sequence[Term], num_scales: int) -> None:
        self.terms = tuple(terms)
        blocks = [f for t in self.terms for f in (t.rows, t.columns)]
        empty = sparse.csr_array((0, num_scales))
        self.forms = sparse.csr_array(sparse.vstack(blocks, format="csr") if blocks else empty)
        self.forms_t = sparse.csr_array(self.forms.T.tocsr())
        self.num_scales = num_scales
        self._ends = np.cumsum([0, *(b.shape[0] for b in blocks)])

    def _split(self, moved: Array) -> list[tuple[Array, Array]]:
        pieces = np.split(moved, self._ends[1:-1]) if self.terms else []
        return list(zip(pieces[::2], pieces[1::2], strict=True))

    def each(self, scales: Array) -> Array:
        """Per term, its error at ``scales`` ``(num_scales,)``, by its definition."""
        found = []
        for one, (row, column) in zip(self.terms, self._split(self.forms @ scales), strict=True):
            tops = _tops(one, _log2(one.size) + row[:, None] + column)
            found.append(_error(one, np.exp2(2.0 * tops), row, column).sum() + one.fixed)
        return np.asarray(found)

    def total(self, scales: Array) -> float:
        """The sum over all terms."""
        return float(self.each(scales).sum())

    def least(self, start: Array, lower: Array, upper: Array) -> tuple[Array, int]:
        """The scales within the bounds at which the sum is least, and the evaluations it took."""
        point, evaluations = np.clip(start, lower, upper), 0
        bounds = optimize.Bounds(lower, upper)
        for q, iterations in STAGES:
            centre = point
            smooth = [
                _smooth(one, row, column, q)
                for one, (row, column) in zip(
                    self.terms, self._split(self.forms @ centre), strict=True
                )
            ]
            found = optimize.minimize(
                lambda s, smooth=smooth, centre=centre: self._evaluate(smooth, centre, s),
                point,
                jac=True,
                method="L-BFGS-B",
                bounds=bounds,
                options={"maxiter": iterations, "maxcor": 12, "ftol": 1e-6, "gtol": 1e-9},
            )
            point, evaluations = np.asarray(found.x), evaluations + int(found.nfev)
        return point, evaluations

    def _evaluate(
        self, smooth: Sequence[_Smooth], centre: Array, point: Array
    ) -> tuple[float, Array]:
        """Log of the smoothed sum, and its gradient."""
        moved = self._split(self.forms @ point)
        beyond = self._split(self.forms @ (point - centre))
        total, slopes = 0.0, []
        for one, here, step in zip(smooth, moved, beyond, strict=True):
            value, row, column = _slope(one, here, step)
            total += value
            slopes += [row, column]
        pull = _PULL / max(self.num_scales, 1)
        gradient = self.forms_t @ (np.concatenate(slopes) * (2.0 * LN2 / total)) + pull * point
        value = float(np.log(total)) + 0.5 * pull * float(point @ point)
        return value, np.asarray(gradient)


def _log2(values: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log2(values))


def _tops(one: Term, logs: Array) -> Array:
    """Log2 of the largest magnitude of every group; a group of zeros has 2^-500."""
    tops = np.full(one.groups, -500.0)
    np.maximum.at(tops, one.group, logs.max(axis=1))
    return tops


def _error(one: Term, squares: Array, row: Array, column: Array) -> Array:
    """``floor * max^2 * sum of G`` per group; ``squares``: of the largest magnitudes."""
    weight = np.bincount(one.group, one.by_row * np.exp2(-2.0 * row), minlength=one.groups)
    return np.asarray(one.floor * squares * weight * _share(one, column))


def _share(one: Term, column: Array) -> float:
    """By how much columns change every row's sum of G."""
    total = float(one.by_column.sum())
    return float(one.by_column @ np.exp2(-2.0 * column)) / total if total > 0 else 0.0


def _smooth(one: Term, row: Array, column: Array, q: float) -> _Smooth:
    logs = _log2(one.size) + row[:, None] + column
    tops = _tops(one, logs)
    return _Smooth(one, np.exp2(q * (logs - tops[one.group][:, None])), tops, q)


def _slope(
    smooth: _Smooth, here: tuple[Array, Array], step: tuple[Array, Array]
) -> tuple[float, Array, Array]:
    """The smoothed error and its derivatives by rows' and columns' exponents, over ``2 ln 2``."""
    one, q = smooth.term, smooth.q
    # 2^(q step) stays within the range of float64.
    most = 900.0 / q
    row_factor = np.exp2(q * np.clip(step[0], -most / 2, most / 2))
    column_factor = np.exp2(q * np.clip(step[1], -most / 2, most / 2))
    rows = row_factor * (smooth.matrix @ column_factor)
    sums = np.maximum(np.bincount(one.group, rows, minlength=one.groups), 1e-300)
    squares = np.exp2(2.0 * smooth.tops) * sums ** (2.0 / q)
    errors = _error(one, squares, *here)
    per_row = (errors / sums)[one.group] * row_factor
    up_columns = column_factor * (per_row @ smooth.matrix)
    weight = one.by_row * np.exp2(-2.0 * here[0])
    each = np.bincount(one.group, weight, minlength=one.groups)
    down_rows = weight * (errors / np.where(each > 0, each, 1.0))[one.group]
    spread = one.by_column * np.exp2(-2.0 * here[1])
    total, below = float(errors.sum()), float(spread.sum())
    down_columns = spread * (total / below if below > 0 else 0.0)
    up_rows = (errors / sums)[one.group] * rows
    return total + one.fixed, up_rows - down_rows, up_columns - down_columns
