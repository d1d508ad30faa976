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

from pathlift.solve.matrix import Array, BoolArray
from pathlift.solve.operator import Operator
from pathlift.solve.patterns import factored, patterns

Precondition = Callable[[Array], Array]

# Keeps a matrix that is singular up to rounding positive; far below what a step can feel.
_RIDGE = 1e-7
# Up to this order the core is inverted with a cut on singular values; above, factored sparsely.
_DENSE_CORE = 32


def preconditioner(
    operator: Operator, weights: Array, mean: Array, free: BoolArray, scale: float
) -> Precondition:
    """Inverse of ``scale`` times the model's covariance on the free scales; held ones get zero.

    ``weights``: per form. ``mean``: ``(H,)``, ``E^T w``.
    """
    blocks = len(operator.blocks)
    found = patterns(operator)
    local = _local(operator, weights, free)
    data = found.low.data(weights, mean)
    low, low_t = found.low.rows(data), found.low.columns(data)
    pair = 2 * np.arange(blocks)
    row = np.concatenate([pair, pair + 1, [2 * blocks]])
    col = np.concatenate([pair + 1, pair, [2 * blocks]])
    swap = np.ones(row.size)
    swap[-1] = -1.0
    core = local.between(low, low_t) + sparse.csr_array((swap, (row, col)), shape=(row.size,) * 2)
    solve = _core_solver(sparse.csc_array(core))

    def apply(r: Array) -> Array:
        part = local.solve(r)
        return np.asarray((part - local.solve(low_t @ solve(low @ part))) / scale)

    return apply


@dataclass(frozen=True)
class _Local:
    """Inverse of the local part.

    ``inverse``: ``(H,)``, of scales that meet no other; 0 for those held or in ``kept``.
    ``kept``: the scales that meet others, ``alive`` those of them that are not held (1 or 0);
    ``factored`` solves among them.
    """

    inverse: Array
    kept: np.ndarray
    alive: Array
    factored: Precondition | None

    def solve(self, r: Array) -> Array:
        out = self.inverse * r
        if self.factored is not None:
            out[self.kept] = self.alive * self.factored(self.alive * r[self.kept])
        return out

    def between(self, low: sparse.csr_array, low_t: sparse.csr_array) -> sparse.csr_array:
        """``low @ inverse @ low^T``."""
        weighed = (low.data * self.inverse[low.indices], low.indices, low.indptr)
        core = sparse.csr_array(sparse.csr_array(weighed, shape=low.shape) @ low_t)
        if self.factored is not None:
            met_t = sparse.csr_array(low_t[self.kept])
            met_t.data *= np.repeat(self.alive, np.diff(met_t.indptr))
            rows = np.unique(met_t.indices)
            dense = met_t[:, rows].toarray()
            part = sparse.coo_array(met_t.T @ self.factored(dense))
            place = (part.row, rows[part.col])
            core = core + sparse.csr_array((part.data, place), shape=core.shape)
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
            return _Local(_inverse(diagonal, alive), inner.kept, here * 1.0, factors.solve)
    bound = operator.row_sum_bound() @ weights
    above = bound * (1.0 + _RIDGE) + 1e-14 * float(bound.max(initial=0.0))
    none = np.zeros(0, dtype=np.int64)
    return _Local(_inverse(above, free & (above > 0)), none, np.zeros(0), None)


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
