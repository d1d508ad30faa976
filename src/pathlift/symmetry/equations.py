"""Equalities and sums of scales -> an integer basis of all solutions.

Nearly all equations say that two variables are equal or opposite; they are solved by connected
components.
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
    rows: list[tuple[Int, Int]] = field(default_factory=list)  # coefficients and ids, (m, terms)
    opposite: list[bool] = field(default_factory=list)  # of pairs, whether x = -y
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
            self._pair(ids[0], np.zeros_like(ids[0]), False, origin)
        elif len(coefficients) == 2 and abs(coefficients[0]) == abs(coefficients[1]):
            self._pair(ids[0], ids[1], coefficients[0] == coefficients[1], origin)
        else:
            table = np.stack(ids, axis=1)
            self.rows.append((np.broadcast_to(np.array(coefficients), table.shape), table))

    def add_matrix(self, matrix: sp.csr_array) -> None:
        """Add ``matrix @ x[1:] = 0``: one equation per row, column j for variable j + 1."""
        lengths = np.diff(matrix.indptr)
        for n in np.unique(lengths[lengths > 0]).tolist():
            start = matrix.indptr[:-1][lengths == n]
            at = start[:, None] + np.arange(n)
            self.rows.append((matrix.data[at].astype(np.int64), matrix.indices[at] + np.int64(1)))

    def _pair(self, a: Int, b: Int, opposite: bool, origin: str) -> None:
        self.pairs.append((a, b))
        self.opposite.append(opposite)
        self.origins.append(origin)

    def solve(self) -> sp.csr_array:
        """Integer matrix (size, free): row ``v`` is variable ``v`` in terms of free scales."""
        while True:
            labels, signs = self._components()
            before = len(self.pairs)
            rows = self._rows_over(labels, signs)
            if len(self.pairs) == before:
                break
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
        found = sp.csr_array(classes[labels])
        found.data *= np.repeat(signs, np.diff(found.indptr))
        return found

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

    def _components(self) -> tuple[Int, Int]:
        """Class and sign of every variable under the equations ``x = y`` and ``x = -y``.

        Every variable has two nodes, itself and its negative; an equation joins both of one
        variable to both of the other. A variable joined to its own negative is zero.
        """
        n = self.size
        left = [a + shift for a, _ in self.pairs for shift in (0, n)]
        right = [
            b + (n - shift if opposite else shift)
            for (_, b), opposite in zip(self.pairs, self.opposite, strict=True)
            for shift in (0, n)
        ]
        a, b = np.concatenate([[0], *left]), np.concatenate([[n], *right])
        graph = sp.coo_array((np.ones(len(a), dtype=np.int8), (a, b)), (2 * n,) * 2)
        _, joined = connected_components(graph.tocsr(), directed=False)
        plus, minus = joined[:n].astype(np.int64), joined[n:].astype(np.int64)
        either = np.minimum(plus, minus)
        either[plus == minus] = plus[0]
        _, labels = np.unique(either, return_inverse=True)
        labels = labels.reshape(-1).astype(np.int64)
        signs = np.where(plus <= minus, 1, -1).astype(np.int64)
        # Of every class the first variable, with sign +1, speaks for it.
        self._representative = np.zeros(int(labels.max()) + 1, dtype=np.int64)
        self._representative[labels[::-1]] = np.arange(n - 1, -1, -1)
        return labels, signs * signs[self._representative[labels]]

    def _rows_over(self, labels: Int, signs: Int) -> list[dict[int, int]]:
        """The general equations over classes, each once.

        Those that have become ``x = 0`` or ``x = +-y`` join the pairs instead.
        """
        zero, one = int(labels[0]), self._representative
        general: set[tuple[tuple[int, int], ...]] = set()
        for given, ids in self.rows:
            classes, coefficients = labels[ids], given * signs[ids]
            coefficients[classes == zero] = 0
            for k in range(1, ids.shape[1]):  # equal classes are merged into the first
                for j in range(k):
                    same = classes[:, j] == classes[:, k]
                    coefficients[same, j] += coefficients[same, k]
                    coefficients[same, k] = 0
            order = np.argsort(coefficients == 0, axis=1, kind="stable")
            classes = np.take_along_axis(classes, order, 1)
            coefficients = np.take_along_axis(coefficients, order, 1)
            terms = np.count_nonzero(coefficients, axis=1)
            a = one[classes[terms == 1, 0]]
            if len(a):
                self._pair(a, np.zeros_like(a), False, "products of scales")
            equal = np.zeros(len(terms), dtype=bool)
            if ids.shape[1] > 1:
                equal = (terms == 2) & (abs(coefficients[:, 0]) == abs(coefficients[:, 1]))
            for opposite in (False, True):
                alike = equal & (
                    (coefficients[:, 0] == coefficients[:, min(1, ids.shape[1] - 1)]) == opposite
                )
                if alike.any():
                    a, b = one[classes[alike, 0]], one[classes[alike, 1]]
                    self._pair(a, b, opposite, "products of scales")
            rest = (terms > 1) & ~equal
            table = np.unique(np.concatenate([classes[rest], coefficients[rest]], axis=1), axis=0)
            width = ids.shape[1]
            for line in table.tolist():
                row = {v: c for v, c in zip(line[:width], line[width:], strict=True) if c}
                general.add(tuple(sorted(_primitive(row).items())))
        return [dict(row) for row in general]


def _primitive(row: dict[int, int]) -> dict[int, int]:
    row = {v: c for v, c in row.items() if c}
    divisor = gcd(*row.values()) if row else 1
    return {v: c // divisor for v, c in row.items()} if divisor > 1 else row


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
