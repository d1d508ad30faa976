"""The sums of every matrix's rows and columns, as rows over the scales."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from pathlift.solve.matrix import Array
from pathlift.solve.operator import Operator


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
