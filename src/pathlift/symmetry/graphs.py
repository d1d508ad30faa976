"""Components, shortest paths and spanning forests of undirected graphs given as pairs of nodes.

Small graphs are done here, large ones by SciPy: to import its graphs takes longer than all that is
asked of them for a small network.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

Int = NDArray[np.int64]

# Edges up to which SciPy's graphs are not imported.
SMALL = 1 << 14


def components(count: int, left: Int, right: Int) -> Int:
    """A number per node, the same for nodes that edges join."""
    if len(left) > SMALL:
        from scipy.sparse.csgraph import connected_components

        _, joined = connected_components(_matrix(count, left, right), directed=False)
        return np.asarray(joined, dtype=np.int64)
    above = np.arange(count, dtype=np.int64)
    while True:
        low, high = np.minimum(above[left], above[right]), np.maximum(above[left], above[right])
        apart = low != high
        if not apart.any():
            return above
        # Of several, the smallest: it comes last.
        order = np.argsort(-low[apart], kind="stable")
        above[high[apart][order]] = low[apart][order]
        while not np.array_equal(above, roots := above[above]):
            above = roots


def parents(count: int, left: Int, right: Int) -> Int:
    """The node before each one on a shortest path from node 0; negative where there is none."""
    if len(left) > SMALL:
        from scipy.sparse.csgraph import breadth_first_order

        _, before = breadth_first_order(_matrix(count, left, right), 0, directed=False)
        return np.asarray(before, dtype=np.int64)
    beside: list[list[int]] = [[] for _ in range(count)]
    for a, b in zip(left.tolist(), right.tolist(), strict=True):
        beside[a].append(b)
        beside[b].append(a)
    before = np.full(count, -1, dtype=np.int64)
    waiting, seen = deque([0]), {0}
    while waiting:
        node = waiting.popleft()
        for other in beside[node]:
            if other not in seen:
                seen.add(other)
                before[other] = node
                waiting.append(other)
    return before


def forest(count: int, left: Int, right: Int) -> tuple[Int, Int]:
    """Edges of a spanning forest."""
    from scipy.sparse.csgraph import minimum_spanning_tree

    edges = _matrix(count, left, right)
    edges.data[:] = 1
    found = minimum_spanning_tree(edges).tocoo()
    return found.row.astype(np.int64), found.col.astype(np.int64)


def _matrix(count: int, left: Int, right: Int) -> sp.csr_array:
    ones = np.ones(len(left), dtype=np.int8)
    return sp.csr_array(sp.coo_array((ones, (left, right)), (count,) * 2).tocsr())
