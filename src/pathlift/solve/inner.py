"""The local part of the model's covariance among scales that meet others in a form."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from pathlift.solve.matrix import Array
from pathlift.solve.operator import Operator
from pathlift.solve.problem import IntArray

# Non-zero entries per scale up to which the local part is factored: few are filled in.
_SPARSE = 8


@dataclass(frozen=True)
class Inner:
    """The local part among scales that meet others, as a matrix of one pattern.

    Attributes:
        kept: those scales ``(K,)``, in an order that fills few entries in.
        off: ``(entries off the diagonal, forms)``.
        row, col: where those entries stand, among ``kept``.
        indices, indptr: of the matrix as columns.
        place: where among its entries those off the diagonal, then the diagonal, go.
    """

    kept: IntArray
    off: sparse.csr_array
    row: IntArray
    col: IntArray
    indices: IntArray
    indptr: IntArray
    place: IntArray

    def matrix(self, weights: Array, diagonal: Array, alive: Array) -> sparse.csc_array:
        """The matrix at these weights; scales that are not alive meet none. ``alive``: 0 or 1."""
        data = np.empty(self.indices.size)
        cut = alive[self.row] * alive[self.col]
        data[self.place] = np.concatenate([(self.off @ weights) * cut, diagonal])
        n = self.kept.size
        return sparse.csc_array((data, self.indices, self.indptr), shape=(n, n))


def inner_of(operator: Operator) -> Inner | None:
    """The local part of scales that meet others; None where there are none, or too many."""
    forms, h = operator.forms, operator.problem.num_scales
    form, row, col, product = _meetings(forms)
    if not row.size or np.unique(row.astype(np.int64) * h + col).size > _SPARSE * h:
        return None
    kept = np.unique(row)
    position = np.full(h, -1)
    position[kept] = np.arange(kept.size)
    order = _order(position[row], position[col], kept.size)
    kept = kept[order]
    position[kept] = np.arange(kept.size)
    key = position[col] * kept.size + position[row]
    entries, which = np.unique(key, return_inverse=True)
    off = sparse.csr_array((product, (which, form)), shape=(entries.size, forms.shape[0]))
    col, row = entries // kept.size, entries % kept.size
    both = np.concatenate([entries, np.arange(kept.size) * (kept.size + 1)])
    sorting = np.argsort(both)
    place = np.empty(both.size, dtype=np.int64)
    place[sorting] = np.arange(both.size)
    columns, indices = both[sorting] // kept.size, both[sorting] % kept.size
    indptr = np.concatenate([[0], np.cumsum(np.bincount(columns, minlength=kept.size))])
    return Inner(kept, off, row, col, indices, indptr, place)


def _meetings(forms: sparse.csr_array) -> tuple[IntArray, IntArray, IntArray, Array]:
    """Ordered pairs of two scales in one form: the form, both scales, the product of exponents."""
    lengths = np.diff(forms.indptr)
    several = np.flatnonzero(lengths > 1)
    sizes = lengths[several]
    form = np.repeat(several, sizes**2)
    start = np.repeat(forms.indptr[several], sizes**2)
    size = np.repeat(sizes, sizes**2)
    ends = np.cumsum(sizes**2)
    pair = np.arange(form.size) - np.repeat(ends - sizes**2, sizes**2)
    left, right = start + pair // np.maximum(size, 1), start + pair % np.maximum(size, 1)
    apart = left != right
    left, right, form = left[apart], right[apart], form[apart]
    product = forms.data[left] * forms.data[right]
    return form, forms.indices[left], forms.indices[right], product


def _order(row: IntArray, col: IntArray, size: int) -> IntArray:
    """An order in which elimination fills few entries in: minimum degree."""
    pattern = sparse.csc_array((np.ones(row.size), (row, col)), shape=(size, size))
    heavy = sparse.diags_array(np.diff(pattern.indptr) * float(pattern.data.max()) + 1.0)
    with suppress(RuntimeError):
        factors = factored(sparse.csc_array(pattern + heavy), "MMD_AT_PLUS_A")
        return np.argsort(factors.perm_c)
    return np.arange(size)


def factored(matrix: sparse.csc_array, order: str) -> Any:
    """Factors of a symmetric matrix (SuperLU).

    Raises:
        RuntimeError: it is singular.
    """
    from scipy.sparse import linalg  # 50 ms, and small problems factor nothing

    # few entries to a column: blocks of columns, which SuperLU is made for, only cost
    return linalg.splu(
        matrix,
        permc_spec=order,
        diag_pivot_thresh=0.0,
        relax=1,
        panel_size=1,
        options={"SymmetricMode": True},
    )
