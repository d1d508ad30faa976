"""Where the model's covariance has entries: found once per problem, filled for every weights.

``E^T diag(w) E`` and the matrices' sums have the same entries whatever the weights ``w`` of the
forms are, and each entry is a linear function of ``w``. So a preconditioner costs a few products
of a sparse matrix with ``w``; products of two sparse matrices, and orders of elimination, are for
here.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse

from pathlift.solve.matrix import Array
from pathlift.solve.operator import Operator
from pathlift.solve.problem import IntArray

# Non-zero entries per scale up to which the local part is factored: few are filled in.
_SPARSE = 8


def patterns(operator: Operator) -> Patterns:
    """The patterns of an operator, made at the first call."""
    if operator.patterns is None:
        operator.patterns = Patterns(operator)
    found: Patterns = operator.patterns
    return found


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


class Patterns:
    """The patterns of one operator.

    Attributes:
        squares: ``(H, forms)``; times weights, the diagonal of ``E^T diag(w) E``.
    """

    def __init__(self, operator: Operator) -> None:
        self._operator = operator
        self.squares = operator.forms_t.copy()
        self.squares.data = self.squares.data**2

    @cached_property
    def inner(self) -> Inner | None:
        """The local part of scales that meet others; None where there are none, or too many."""
        forms, h = self._operator.forms, self._operator.problem.num_scales
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

    @cached_property
    def low(self) -> Low:
        """The sums of every matrix's rows and columns, and one full row below them."""
        return Low(self._operator)


class Low:
    """``(2 B + 1, H)``: per matrix ``rows^T a / sqrt(S)`` and ``cols^T c / sqrt(S)``; the mean.

    Attributes:
        shape: of it.
        indices, indptr: of it as rows.
        across: (transposed) indices, indptr and, of its entries, which of those above they are.
    """

    def __init__(self, operator: Operator) -> None:
        h, parts = operator.problem.num_scales, 2 * len(operator.blocks)
        starts = operator.form_starts()[: parts + 1]
        forms = operator.forms[: int(starts[-1]) if parts else 0].tocoo()
        segment = np.searchsorted(starts, forms.row, side="right") - 1
        key = segment * h + forms.col
        entries, which = np.unique(key, return_inverse=True)
        self._sums = sparse.csr_array(
            (forms.data, (which, forms.row)), shape=(entries.size, operator.forms.shape[0])
        )
        self._segment = entries // max(h, 1)
        self._starts = starts
        self.shape = (parts + 1, h)
        counts = np.bincount(self._segment, minlength=parts)
        self.indices = np.concatenate([entries % max(h, 1), np.arange(h)])
        self.indptr = np.concatenate([[0], np.cumsum(counts), [entries.size + h]])
        number = sparse.csr_array(
            (np.arange(1, self.indices.size + 1), self.indices, self.indptr), shape=self.shape
        ).T.tocsr()
        self.across = (number.indices, number.indptr, number.data - 1)

    def data(self, weights: Array, mean: Array) -> Array:
        """The entries at these weights, in the order of :attr:`indices`."""
        parts = self.shape[0] - 1
        lengths = np.diff(self._starts)
        segment = np.repeat(np.arange(parts), lengths)
        sums = np.bincount(segment, weights[: segment.size], minlength=parts)
        root = np.sqrt(np.where(sums > 0, sums, 1.0))
        return np.concatenate([(self._sums @ weights) / root[self._segment], mean])

    def rows(self, data: Array) -> sparse.csr_array:
        """The matrix with these entries."""
        return sparse.csr_array((data, self.indices, self.indptr), shape=self.shape)

    def columns(self, data: Array) -> sparse.csr_array:
        """Its transpose, as rows."""
        indices, indptr, which = self.across
        return sparse.csr_array((data[which], indices, indptr), shape=self.shape[::-1])


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

    return linalg.splu(
        matrix, permc_spec=order, diag_pivot_thresh=0.0, options={"SymmetricMode": True}
    )
