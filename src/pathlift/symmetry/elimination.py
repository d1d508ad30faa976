"""Sparse homogeneous integer equations -> all their integer solutions, exactly.

Every step substitutes one variable by an integer form in others, so the solutions stay the same
lattice in fewer variables (a unimodular change): no division is ever needed. An equation with a
coefficient +-1 gives that variable. In any other, with smallest coefficient c at variable x, the
remainder of the rest modulo c is left by ``x = y - sum_k q_k z_k`` with a new variable y, as in
Euclid's algorithm; as the coefficients have no common divisor, a +-1 comes up in a few steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from math import gcd

Row = dict[int, int]  # variable -> coefficient, none of them 0


def eliminate(rows: Iterable[Row], fresh: int) -> dict[int, Row]:
    """Solve ``sum_v row[v] x_v = 0`` for every row.

    Args:
        rows: integer equations; Python's whole numbers, so nothing overflows.
        fresh: the first number that is free to name new variables.

    Returns:
        Solved variable -> its form in the variables that are not solved (new ones among them).
        Free choices of those give every integer solution, each once.
    """
    system = _System(rows, fresh)
    while (found := system.next()) is not None:
        system.solve(*found)
    return _substituted(system.solved)


def _substituted(solved: dict[int, Row]) -> dict[int, Row]:
    """The forms in free variables. A form holds only what was solved later, or never."""
    for variable in reversed(list(solved)):
        form: Row = {}
        for v, c in solved[variable].items():
            for w, k in solved.get(v, {v: 1}).items():
                form[w] = form.get(w, 0) + c * k
        solved[variable] = {v: c for v, c in form.items() if c}
    return solved


class _System:
    """The equations left, and in which of them a variable occurs."""

    def __init__(self, rows: Iterable[Row], fresh: int) -> None:
        self.fresh = fresh
        self.solved: dict[int, Row] = {}
        self.rows = dict(enumerate(p for row in rows if (p := _primitive(row))))
        self.where: dict[int, set[int]] = {}
        for k, row in self.rows.items():
            for v in row:
                self.where.setdefault(v, set()).add(k)
        self.rank = {v: len(found) for v, found in self.where.items()}
        self.queue = [(*self._cost(k), k) for k in self.rows]
        heapify(self.queue)

    def _pivot(self, row: Row) -> int:
        """The variable of smallest coefficient; of those, the one in the fewest equations.

        Equally good ones are told apart by how many equations they stood in at first: of a chain
        ``x_{k+1} = x_k + y_k`` the y are solved, so that no sum over the chain appears.
        """
        return min(row, key=lambda v: (abs(row[v]), len(self.where[v]), self.rank.get(v, 0), -v))

    def _cost(self, k: int) -> tuple[bool, int]:
        """Equations without +-1 come last; of the others, what fills in least (Markowitz)."""
        row = self.rows[k]
        pivot = self._pivot(row)
        return abs(row[pivot]) > 1, (len(row) - 1) * (len(self.where[pivot]) - 1)

    def next(self) -> tuple[int, int] | None:
        """An equation and the variable to solve it for."""
        while self.queue:
            *cost, k = heappop(self.queue)
            if k not in self.rows:
                continue
            now = self._cost(k)
            if now > tuple(cost):  # it has become worse since it was put there
                heappush(self.queue, (*now, k))
                continue
            return k, self._pivot(self.rows[k])
        return None

    def solve(self, k: int, pivot: int) -> None:
        """Substitute the pivot of equation ``k`` everywhere."""
        row = self.rows[k]
        c = row[pivot]
        if abs(c) == 1:
            form = {v: -c * a for v, a in row.items() if v != pivot}
            self._drop(k)
        else:
            # x = y - sum_k q_k z_k with the quotients nearest to a / c: remainders at most c / 2.
            form = {v: -q for v, a in row.items() if v != pivot and (q := _nearest(a, c))}
            form[self.fresh] = 1
            self.where[self.fresh] = set()
            self.fresh += 1
        self.solved[pivot] = form
        for j in list(self.where.pop(pivot)):
            self._substitute(j, pivot, form)

    def _substitute(self, j: int, pivot: int, form: Row) -> None:
        row = self.rows[j]
        factor = row.pop(pivot)
        for v, c in form.items():
            new = row.get(v, 0) + factor * c
            if new:
                row[v] = new
                self.where[v].add(j)
            else:
                row.pop(v, None)
                self.where[v].discard(j)
        if not row:
            del self.rows[j]
            return
        self.rows[j] = _primitive(row)
        heappush(self.queue, (*self._cost(j), j))

    def _drop(self, k: int) -> None:
        for v in self.rows.pop(k):
            self.where[v].discard(k)


def _nearest(a: int, c: int) -> int:
    """The whole number nearest to ``a / c``."""
    return (2 * a + c) // (2 * c)


def _primitive(row: Row) -> Row:
    row = {v: c for v, c in row.items() if c}
    divisor = gcd(*row.values())
    return {v: c // divisor for v, c in row.items()} if divisor > 1 else row
