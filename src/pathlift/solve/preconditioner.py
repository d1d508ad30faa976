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
from scipy.sparse import linalg as _sparse_linalg

from pathlift.solve.matrix import Array, BoolArray
from pathlift.solve.operator import Operator

Precondition = Callable[[Array], Array]

# Keeps a matrix that is singular up to rounding positive; far below what a step can feel.
_RIDGE = 1e-7
# Up to this order the core is inverted with a cut on singular values; above, factored sparsely.
_DENSE_CORE = 32
# Non-zero entries per scale up to which the local part is factored: few are filled in.
_SPARSE = 8


def preconditioner(
    operator: Operator, weights: Array, mean: Array, free: BoolArray, scale: float
) -> Precondition:
    """Inverse of ``scale`` times the model's covariance on the free scales; held ones get zero.

    ``weights``: per form. ``mean``: ``(H,)``, ``E^T w``.
    """
    blocks = len(operator.blocks)
    local = _local(operator, weights, free)
    pair = 2 * np.arange(blocks)
    row = np.concatenate([pair, pair + 1, [2 * blocks]])
    col = np.concatenate([pair + 1, pair, [2 * blocks]])
    swap = np.ones(row.size)
    swap[-1] = -1.0
    low = sparse.csr_array(
        sparse.vstack([operator.block_sums(weights), mean[None, :]], format="csr")
    )
    low_t = sparse.csr_array(low.T.tocsr())
    core = local.between(low) + sparse.csr_array((swap, (row, col)), shape=(row.size,) * 2)
    solve = _core_solver(sparse.csc_array(core))

    def apply(r: Array) -> Array:
        part = local.solve(r)
        return np.asarray((part - local.solve(low_t @ solve(low @ part))) / scale)

    return apply


@dataclass(frozen=True)
class _Local:
    """Inverse of the local part.

    ``inverse``: ``(H,)``, of scales that meet no other; 0 for those held or in ``kept``.
    ``kept``: the scales that meet others; ``factored`` solves among them.
    """

    inverse: Array
    kept: np.ndarray
    factored: Precondition | None

    def solve(self, r: Array) -> Array:
        out = self.inverse * r
        if self.factored is not None:
            out[self.kept] = self.factored(r[self.kept])
        return out

    def between(self, low: sparse.csr_array) -> sparse.csr_array:
        """``low @ inverse @ low^T``."""
        thin = sparse.csr_array(low.multiply(self.inverse[None, :]))
        core = sparse.csr_array(thin @ low.T)
        if self.factored is not None:
            met = sparse.csc_array(low)[:, self.kept].tocsr()
            rows = np.flatnonzero(np.diff(met.indptr))
            solved = self.factored(np.ascontiguousarray(met[rows].toarray().T))
            part = sparse.coo_array(met @ solved)
            place = (part.row, rows[part.col])
            core = core + sparse.csr_array((part.data, place), shape=core.shape)
        return core


def _local(operator: Operator, weights: Array, free: BoolArray) -> _Local:
    """The local part factored where forms have several scales, or else a diagonal above it."""
    if operator.coupled:
        forms = operator.forms
        matrix = sparse.csr_array(operator.forms_t @ sparse.diags_array(weights) @ forms)
        diagonal = matrix.diagonal()
        top = float(diagonal.max(initial=0.0))
        matrix = sparse.csr_array(matrix + sparse.diags_array(_RIDGE * diagonal + 1e-14 * top))
        alive = free & (diagonal > 0)
        meets = alive & (np.diff(matrix.indptr) > 1)
        kept = np.flatnonzero(meets)
        inner = sparse.csc_array(matrix[kept][:, kept])
        if kept.size and inner.nnz <= _SPARSE * np.count_nonzero(alive):
            with suppress(RuntimeError):  # singular in spite of the ridge
                factors = _sparse_linalg.splu(
                    inner,
                    permc_spec="MMD_AT_PLUS_A",
                    diag_pivot_thresh=0.0,
                    options={"SymmetricMode": True},
                )
                return _Local(_inverse(matrix.diagonal(), alive & ~meets), kept, factors.solve)
    bound = operator.row_sum_bound() @ weights
    above = bound * (1.0 + _RIDGE) + 1e-14 * float(bound.max(initial=0.0))
    return _Local(_inverse(above, free & (above > 0)), np.zeros(0, dtype=np.int64), None)


def _inverse(diagonal: Array, kept: BoolArray) -> Array:
    return np.where(kept, 1.0 / np.where(kept, diagonal, 1.0), 0.0)


def _core_solver(core: sparse.csc_array) -> Precondition:
    """Solve with the core; that of many matrices is sparse, since only neighbours share a scale."""
    if core.shape[0] > _DENSE_CORE:
        with suppress(RuntimeError):  # exactly singular
            return _sparse_linalg.splu(core).solve
    inverse = np.linalg.pinv(core.toarray())
    return lambda r: np.asarray(inverse @ r)
