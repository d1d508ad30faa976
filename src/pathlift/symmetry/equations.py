"""Equalities and sums of scales -> an integer basis of all solutions.

Nearly all equations say that two variables are equal; they are solved by connected components.
What is left (products, powers) is a sparse integer system, eliminated with unit pivots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import gcd

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.csgraph import breadth_first_order, connected_components

Int = NDArray[np.int64]


@dataclass
class Equations:
    """Linear equations ``sum_k c_k x[ids_k] = 0`` over variables ``0 … size-1``, ``x[0] = 0``."""

    size: int = 1
    pairs: list[tuple[Int, Int]] = field(default_factory=list)
    rows: list[tuple[tuple[int, ...], tuple[Int, ...]]] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)  # of pairs, what demanded them
    _before: Int | None = None

    def fresh(self, count: int) -> range:
        """``count`` new variables."""
        start = self.size
        self.size += count
        return range(start, self.size)

    def add(self, coefficients: Sequence[int], ids: Sequence[Int], origin: str = "") -> None:
        """Add one equation per entry of the (equally long, flat) id arrays."""
        if len(coefficients) == 1:
            self.pairs.append((ids[0], np.zeros_like(ids[0])))
            self.origins.append(origin)
        elif len(coefficients) == 2 and coefficients[0] == -coefficients[1]:
            self.pairs.append((ids[0], ids[1]))
            self.origins.append(origin)
        else:
            self.rows.append((tuple(coefficients), tuple(ids)))

    def solve(self) -> sp.csr_array:
        """Integer matrix (size, free): row ``v`` is variable ``v`` in terms of free scales."""
        labels = self._components()
        rows = self._rows_over(labels)
        while True:
            pairs = [r for r in rows if len(r) == 1 or _is_equality(r)]
            if not pairs:
                break
            for row in pairs:
                variables = sorted(row)
                self.pairs.append(
                    (
                        np.array([self._representative[v] for v in variables[-1:]]),
                        np.array(
                            [self._representative[variables[0]] if len(variables) == 2 else 0]
                        ),
                    )
                )
                self.origins.append("products of scales")
            labels = self._components()
            rows = self._rows_over(labels)
        count = int(labels.max()) + 1
        solution = eliminate(rows)
        free = [v for v in range(count) if v != labels[0] and v not in solution]
        column = {v: i for i, v in enumerate(free)}
        data, row_index, col_index = [1] * len(free), list(free), list(range(len(free)))
        for variable, form in solution.items():
            for v, c in form.items():
                row_index.append(variable)
                col_index.append(column[v])
                data.append(c)
        classes = sp.csr_array(
            (np.array(data, dtype=np.int64), (row_index, col_index)),
            shape=(count, len(free)),
        )
        return classes[labels]

    def why_zero(self, variable: int) -> str | None:
        """What pins a variable: the equation nearest to it that sets a scale to zero.

        The equalities are edges between variables; of a shortest path from the variable to 0 the
        last edge is the one that pins.
        """
        if self._before is None:
            left = np.concatenate([a for a, _ in self.pairs]) if self.pairs else np.zeros(0, int)
            right = np.concatenate([b for _, b in self.pairs]) if self.pairs else np.zeros(0, int)
            graph = sp.coo_array((np.ones(len(left), np.int8), (left, right)), (self.size,) * 2)
            _, self._before = breadth_first_order(graph.tocsr(), 0, directed=False)
        if variable == 0 or self._before[variable] < 0:
            return None
        while self._before[variable] != 0:
            variable = int(self._before[variable])
        for (a, b), origin in zip(self.pairs, self.origins, strict=True):
            hit = ((a == variable) & (b == 0)) | ((b == variable) & (a == 0))
            if bool(hit.any()):
                return origin
        return None

    def _components(self) -> Int:
        if self.pairs:
            left = np.concatenate([a for a, _ in self.pairs])
            right = np.concatenate([b for _, b in self.pairs])
        else:
            left = right = np.zeros(0, dtype=np.int64)
        graph = sp.coo_array((np.ones(len(left), dtype=np.int8), (left, right)), (self.size,) * 2)
        _, labels = connected_components(graph.tocsr(), directed=False)
        labels = labels.astype(np.int64)
        self._representative = np.zeros(int(labels.max()) + 1, dtype=np.int64)
        self._representative[labels[::-1]] = np.arange(self.size - 1, -1, -1)
        return labels

    def _rows_over(self, labels: Int) -> list[dict[int, int]]:
        """The general equations over components, each once, without zeros."""
        zero = int(labels[0])
        unique: dict[tuple[tuple[int, int], ...], dict[int, int]] = {}
        for coefficients, ids in self.rows:
            table = np.unique(np.stack([labels[i] for i in ids], axis=1), axis=0)
            for line in table.tolist():
                row: dict[int, int] = {}
                for c, v in zip(coefficients, line, strict=True):
                    if v != zero:
                        row[v] = row.get(v, 0) + c
                row = _primitive(row)
                if row:
                    unique[tuple(sorted(row.items()))] = row
        return list(unique.values())


def _primitive(row: dict[int, int]) -> dict[int, int]:
    row = {v: c for v, c in row.items() if c}
    divisor = gcd(*row.values()) if row else 1
    return {v: c // divisor for v, c in row.items()} if divisor > 1 else row


def _is_equality(row: dict[int, int]) -> bool:
    return len(row) == 2 and sum(row.values()) == 0


def eliminate(rows: list[dict[int, int]]) -> dict[int, dict[int, int]]:
    """Solve sparse homogeneous integer equations by unit pivots.

    Returns variable -> its form in the variables that stay free. Where no coefficient of an
    equation is +-1 after reduction, its variables are set to zero: fewer symmetries, never a
    wrong one.
    """
    solved: dict[int, dict[int, int]] = {}

    def reduce(row: dict[int, int]) -> dict[int, int]:
        while True:
            hit = next((v for v in row if v in solved), None)
            if hit is None:
                return _primitive(row)
            factor = row.pop(hit)
            for v, c in solved[hit].items():
                row[v] = row.get(v, 0) + factor * c
            row = {v: c for v, c in row.items() if c}

    hard: list[dict[int, int]] = []
    for row in sorted(rows, key=len):
        reduced = reduce(dict(row))
        if not reduced:
            continue
        pivot = max((v for v, c in reduced.items() if abs(c) == 1), default=None)
        if pivot is None:
            hard.append(reduced)
            continue
        sign = reduced.pop(pivot)
        solved[pivot] = {v: -sign * c for v, c in reduced.items()}
    for row in hard:
        for variable in reduce(dict(row)):
            solved.setdefault(variable, {})

    def resolve(variable: int) -> dict[int, int]:
        form: dict[int, int] = {}
        for v, c in solved[variable].items():
            for w, k in (resolve(v) if v in solved else {v: 1}).items():
                form[w] = form.get(w, 0) + c * k
        solved[variable] = {v: c for v, c in form.items() if c}
        return solved[variable]

    for variable in list(solved):
        resolve(variable)
    return solved
