"""Graphs done here and by SciPy say the same, and both what is so."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, dijkstra

from pathlift.symmetry import graphs


def random_edges(seed: int) -> tuple[int, graphs.Int, graphs.Int]:
    draw = np.random.default_rng(seed)
    count = int(draw.integers(2, 60))
    number = int(draw.integers(0, 2 * count))
    left, right = draw.integers(0, count, (2, number))
    if seed % 3 == 0:  # a star around its largest node, then a chain backwards
        left, right = np.full(count, count - 1), np.arange(count)
    if seed % 3 == 1:
        left, right = np.arange(count - 1)[::-1].copy(), np.arange(1, count)[::-1].copy()
    return count, left.astype(np.int64), right.astype(np.int64)


@pytest.mark.parametrize("small", [0, 1 << 20])
def test_components_and_shortest_paths(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "SMALL", small)
    for seed in range(40):
        count, left, right = random_edges(seed)
        edges = coo_array((np.ones(len(left)), (left, right)), (count, count)).tocsr()
        number, expected = connected_components(edges, directed=False)
        found = graphs.components(count, left, right)
        assert len(set(found.tolist())) == number
        assert len(set(zip(found.tolist(), expected.tolist(), strict=True))) == number
        far = dijkstra(edges, directed=False, indices=0, unweighted=True)
        before = graphs.parents(count, left, right)
        assert before[0] < 0
        for node in range(1, count):
            if np.isfinite(far[node]):
                assert far[before[node]] == far[node] - 1
            else:
                assert before[node] < 0


def test_a_spanning_forest_joins_what_the_edges_join() -> None:
    for seed in range(20):
        count, left, right = random_edges(seed)
        a, b = graphs.forest(count, left, right)
        before = graphs.components(count, left, right)
        assert len(a) == count - len(set(before.tolist()))
        after = graphs.components(count, a, b)
        assert len(set(zip(before.tolist(), after.tolist(), strict=True))) == len(set(before))
