"""What the sums of matrices have to do with each other through scales that meet in forms.

The core of the Woodbury formula (:mod:`pathlift.solve.preconditioner`) needs ``low A^-1 low^T``
with ``A`` the local part among scales that meet others: a solve for every row of ``low`` that has
an entry there. ``A`` falls apart into components (the heads of a layer, the chains of a cell), and
a row reaches few of them. So rows that share no component are solved for in one vector.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import sparse

from pathlift.solve.inner import Inner
from pathlift.solve.low import Low
from pathlift.solve.matrix import Array, BoolArray
from pathlift.solve.problem import IntArray
from pathlift.symmetry.graphs import components


class Meetings:
    """Which rows share a vector, and which part of a solution belongs to which two rows.

    Attributes:
        vectors: how many vectors are solved for.
    """

    def __init__(self, inner: Inner, low: Low) -> None:
        size, rows = inner.kept.size, low.shape[0]
        joined = components(size, inner.row, inner.col)
        part = np.unique(joined, return_inverse=True)[1]
        parts = int(part.max(initial=-1)) + 1
        position = np.full(low.shape[1], -1)
        position[inner.kept] = np.arange(size)
        place = position[low.indices]
        entries = np.flatnonzero(place >= 0)
        row = np.repeat(np.arange(rows), np.diff(low.indptr))[entries]
        pair = row * parts + part[place[entries]]
        order = np.argsort(pair, kind="stable")
        self._entries, row = entries[order], row[order]
        self._place = place[self._entries]
        pairs, self._starts = np.unique(pair[order], return_index=True)
        self._row, pair_part = pairs // parts, pairs % parts
        vector, self.vectors = _vectors(self._row, pair_part, (rows, parts))
        self._vector = vector[row]
        who = np.full((parts, self.vectors), -1)
        who[pair_part, vector[self._row]] = self._row
        self._partner = who[pair_part]
        self._shape, self._rows = (size, self.vectors), rows

    def core(self, low: Array, alive: Array, solve: Callable[[Array], Array]) -> sparse.csr_array:
        """``low A^-1 low^T``; ``low``: its entries, ``alive``: 0 or 1 per scale of ``A``."""
        values = low[self._entries] * alive[self._place]
        vectors = np.zeros(self._shape, order="F")
        vectors[self._place, self._vector] = values
        products = values[:, None] * solve(vectors)[self._place]
        sums = np.add.reduceat(products, self._starts, axis=0)
        met = self._partner >= 0
        left = np.broadcast_to(self._row[:, None], met.shape)[met]
        return sparse.csr_array((sums[met], (left, self._partner[met])), (self._rows, self._rows))


def _vectors(row: IntArray, part: IntArray, shape: tuple[int, int]) -> tuple[IntArray, int]:
    """The vector of every row, such that rows in one vector share no component; how many.

    ``row``, ``part``: the pairs of a row and a component that it reaches, in the order of rows.
    """
    rows, parts = shape
    vector = np.zeros(rows, dtype=np.int64)
    taken: list[BoolArray] = []
    starts = np.searchsorted(row, np.arange(rows + 1))
    for r in np.argsort(-np.diff(starts), kind="stable"):
        mine = part[starts[r] : starts[r + 1]]
        vector[r] = k = next((k for k, t in enumerate(taken) if not t[mine].any()), len(taken))
        if k == len(taken):
            taken.append(np.zeros(parts, dtype=bool))
        taken[k][mine] = True
    return vector, len(taken)
