"""The inverse of the covariance of exponents, with every matrix of weights of rank one.

For a matrix with row weights a (sum S) and column weights c the model weight of entry (o, i) is
``a_o c_i / S``, so its part of ``E^T diag(w) E`` is ``rows^T diag(a) rows + cols^T diag(c) cols +
(A C^T + C A^T) / S`` with ``A = rows^T a``, ``C = cols^T c``. The first two terms and the single
entries are the *local* part: diagonal where every form has one scale, else a sparse matrix in which
few scales meet (a product's two factors, a chain of depthwise convolutions). The rest, and
``- mean mean^T``, is of low rank: the inverse is the Woodbury formula.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from pathlift.solve.inner import factored
from pathlift.solve.matrix import Array, BoolArray
from pathlift.solve.meetings import Meetings
from pathlift.solve.operator import Operator
from pathlift.solve.patterns import patterns

Precondition = Callable[[Array], Array]

# Keeps a matrix that is singular up to rounding positive; far below what a step can feel.
_RIDGE = 1e-7
# Up to this order the core is inverted with a cut on singular values; above, factored sparsely.
_DENSE_CORE = 32


class Covariance:
    """``scale`` times the model's covariance of exponents.

    ``weights``: per form. ``mean``: ``(H,)``, ``E^T w``.
    """

    def __init__(self, operator: Operator, weights: Array, mean: Array, scale: float) -> None:
        self._operator, self._weights, self._scale = operator, weights, scale
        low = patterns(operator).low
        data = low.data(weights, mean)
        self._low, self._low_t = low.rows(data), low.columns(data)
        last = 2 * len(operator.blocks)
        pair = np.arange(0, last, 2)
        row = np.concatenate([pair, pair + 1, [last]])
        col = np.concatenate([pair + 1, pair, [last]])
        sign = np.where(row == last, -1.0, 1.0)
        self._swap = sparse.csr_array((sign, (row, col)), shape=(last + 1, last + 1))

    def inverse(self, free: BoolArray) -> Precondition:
        """The inverse on the free scales; held ones get zero."""
        local = _local(self._operator, self._weights, free)
        core = sparse.csc_array(local.between(self._low, self._low_t) + self._swap)
        core_solve = _core_solver(core)

        def apply(r: Array) -> Array:
            part = local.solve(r)
            far = self._low_t @ core_solve(self._low @ part)
            return np.asarray((part - local.solve(far)) / self._scale)

        return apply

    def solve(self, residual: Array, free: BoolArray) -> Array:
        """See :class:`pathlift.solve.within.Quadratic`."""
        return self.inverse(free)(residual)

    def times(self, direction: Array) -> Array:
        """The covariance (of all scales) times ``direction``."""
        operator = self._operator
        near = operator.forms_t @ (self._weights * (operator.forms @ direction))
        far = self._low_t @ (self._swap @ (self._low @ direction))
        return np.asarray((near + far) * self._scale)


@dataclass(frozen=True)
class _Local:
    """Inverse of the local part.

    ``inverse``: ``(H,)``, of scales that meet no other; 0 for those held or in ``kept``.
    ``kept``: the scales that meet others, ``alive`` those of them that are not held (1 or 0);
    ``factored`` solves among them, ``meetings`` says what of the sums meets there.
    """

    inverse: Array
    kept: np.ndarray
    alive: Array
    factored: Precondition | None
    meetings: Meetings | None

    def solve(self, r: Array) -> Array:
        out = self.inverse * r
        if self.factored is not None:
            out[self.kept] = self.alive * self.factored(self.alive * r[self.kept])
        return out

    def between(self, low: sparse.csr_array, low_t: sparse.csr_array) -> sparse.csr_array:
        """``low @ inverse @ low^T``."""
        weighed = (low.data * self.inverse[low.indices], low.indices, low.indptr)
        core = sparse.csr_array(sparse.csr_array(weighed, shape=low.shape) @ low_t)
        if self.factored is not None and self.meetings is not None:
            core = core + self.meetings.core(low.data, self.alive, self.factored)
        return core


def _local(operator: Operator, weights: Array, free: BoolArray) -> _Local:
    """The local part factored where forms have several scales, or else a diagonal above it."""
    found = patterns(operator)
    inner = found.inner if operator.coupled else None
    if inner is not None:
        diagonal = found.squares @ weights
        top = float(diagonal.max(initial=0.0))
        alive = free & (diagonal > 0)
        diagonal = diagonal + _RIDGE * diagonal + 1e-14 * top
        here = alive[inner.kept]
        own = np.where(here, diagonal[inner.kept], 1.0)
        with suppress(RuntimeError):  # singular in spite of the ridge
            factors = factored(inner.matrix(weights, own, here.astype(np.float64)), "NATURAL")
            alive[inner.kept] = False
            return _Local(
                _inverse(diagonal, alive), inner.kept, here * 1.0, factors.solve, found.meetings
            )
    bound = operator.row_sum_bound() @ weights
    above = bound * (1.0 + _RIDGE) + 1e-14 * float(bound.max(initial=0.0))
    none = np.zeros(0, dtype=np.int64)
    return _Local(_inverse(above, free & (above > 0)), none, np.zeros(0), None, None)


def _inverse(diagonal: Array, kept: BoolArray) -> Array:
    return np.where(kept, 1.0 / np.where(kept, diagonal, 1.0), 0.0)


def _core_solver(core: sparse.csc_array) -> Precondition:
    """Solve with the core; that of many matrices is sparse, since only neighbours share a scale."""
    if core.shape[0] > _DENSE_CORE:
        from scipy.sparse import linalg  # 50 ms, and small problems have small cores

        with suppress(RuntimeError):  # exactly singular
            return linalg.splu(core).solve
    inverse = np.linalg.pinv(core.toarray())
    return lambda r: np.asarray(inverse @ r)
