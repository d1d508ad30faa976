"""Equalities and sums of scales -> an integer basis of all solutions.

Nearly all equations say that two variables are equal or opposite; they are solved by connected
components. What is left (products, powers) is a sparse integer system, solved exactly
(:mod:`pathlift.symmetry.elimination`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from pathlift.symmetry import graphs
from pathlift.symmetry.elimination import Row, eliminate
from pathlift.symmetry.scales import distinct

Int = NDArray[np.int64]
Pairs = tuple[Int, Int, NDArray[np.bool_]]  # x = y, or x = -y where opposite
Rows = tuple[Int, Int]  # coefficients and ids, (m, terms)

# So often are equations rewritten over classes. Chains that join one more class each time are left
# to the elimination, which takes them one by one.
_ROUNDS = 12
# A scale that enters another one with a larger factor is kept at 0: no float holds 2^(2^31).
_LARGEST = 2**31


@dataclass
class Equations:
    """Linear equations ``sum_k c_k x[ids_k] = 0`` over variables ``0 … size-1``, ``x[0] = 0``."""

    size: int = 1
    pairs: list[tuple[Int, Int]] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    opposite: list[bool] = field(default_factory=list)  # of pairs, whether x = -y
    origins: list[str] = field(default_factory=list)  # of pairs, what demanded them
    _before: Int | None = None
    _zero: NDArray[np.bool_] = field(default_factory=lambda: np.ones(1, dtype=bool))

    def fresh(self, count: int) -> range:
        """``count`` new variables."""
        start = self.size
        self.size += count
        return range(start, self.size)

    def add(self, coefficients: Sequence[int], ids: Sequence[Int], origin: str = "") -> None:
        """Add one equation per entry of the (equally long, flat) id arrays."""
        if len(coefficients) == 1:
            new = distinct(ids[0][~self.is_zero(ids[0])])
            self._pinned()[new] = True
            self._pair(new, np.zeros_like(new), False, origin)
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

    def is_zero(self, ids: Int) -> NDArray[np.bool_]:
        """Which variables an equation ``x = 0`` has set already; says nothing of the others."""
        return np.asarray(self._pinned()[ids])

    def _pinned(self) -> NDArray[np.bool_]:
        if len(self._zero) < self.size:
            self._zero = np.concatenate([self._zero, np.zeros(self.size, dtype=bool)])
        return self._zero

    def solve(self) -> sp.csr_array:
        """Integer matrix (size, free): row ``v`` is variable ``v`` in terms of free scales.

        Its columns are a basis of all integer solutions: each is a combination of them with whole
        coefficients, which are unique.
        """
        count = self.size
        labels, signs = np.arange(count), np.ones(count, dtype=np.int64)
        pairs: Pairs | None = self._joined_pairs()
        rows = _by_length(self.rows)
        for _ in range(_ROUNDS):
            if pairs is None:
                break
            # What is equal becomes one class; the equations are rewritten over classes, and those
            # that have become equalities join further classes.
            joined, sign = components(count, *pairs)
            signs *= sign[labels]
            labels, count = joined[labels], int(joined.max()) + 1
            pairs, rows = _over_classes(rows, joined, sign)
        left = [{0: 1}, *_as_dicts(rows), *_pairs_as_dicts(pairs)]
        classes = _columns(eliminate(left, count), count)
        found = sp.csr_array(classes[labels])
        found.data *= np.repeat(signs, np.diff(found.indptr))
        return found

    def _joined_pairs(self) -> Pairs:
        if not self.pairs:
            return _no_pairs()
        a, b = (np.concatenate(side) for side in zip(*self.pairs, strict=True))
        return a, b, np.repeat(self.opposite, [len(a) for a, _ in self.pairs])

    def why_zero(self, variable: int) -> str | None:
        """What pins a variable: the equation nearest to it that sets a scale to zero.

        The equalities are edges between variables; of a shortest path from the variable to 0 the
        last edge is the one that pins.
        """
        if self._before is None:
            left = np.concatenate([a for a, _ in self.pairs]) if self.pairs else np.zeros(0, int)
            right = np.concatenate([b for _, b in self.pairs]) if self.pairs else np.zeros(0, int)
            self._before = graphs.parents(self.size, left, right)
        if variable == 0 or self._before[variable] < 0:
            return None
        while self._before[variable] != 0:
            variable = int(self._before[variable])
        for (a, b), origin in zip(self.pairs, self.origins, strict=True):
            hit = ((a == variable) & (b == 0)) | ((b == variable) & (a == 0))
            if bool(hit.any()):
                return origin
        return None


def components(count: int, a: Int, b: Int, opposite: NDArray[np.bool_]) -> tuple[Int, Int]:
    """Class and sign of ``count`` variables under the equations ``a = b`` and ``a = -b``.

    Every variable has two nodes, itself and its negative; an equation joins both of one variable
    to both of the other. A variable joined to its own negative is zero, as variable 0 is. Class 0
    holds what is zero; of every other class the first variable has sign +1.
    """
    flip = opposite * np.int64(count)
    left = np.concatenate([[0], a, a + count])
    right = np.concatenate([[count], b + flip, b + count - flip])
    joined = graphs.components(2 * count, left, right)
    plus, minus = joined[:count], joined[count:]
    either = np.minimum(plus, minus)
    either[plus == minus] = plus[0]
    _, first, labels = np.unique(either, return_index=True, return_inverse=True)
    labels = labels.reshape(-1).astype(np.int64)
    signs = np.where(plus <= minus, 1, -1).astype(np.int64)
    signs *= signs[first[labels]]
    # The class of variable 0 comes first.
    order = np.argsort(np.argsort(first))
    return order[labels], signs


def _no_pairs() -> Pairs:
    nothing = np.zeros(0, dtype=np.int64)
    return nothing, nothing, np.zeros(0, dtype=bool)


def _by_length(rows: list[Rows]) -> list[Rows]:
    """Blocks of equations with equally many terms, joined."""
    widths = sorted({ids.shape[1] for _, ids in rows})
    return [
        (
            np.concatenate([c for c, ids in rows if ids.shape[1] == n]),
            np.concatenate([ids for _, ids in rows if ids.shape[1] == n]),
        )
        for n in widths
    ]


def _over_classes(rows: list[Rows], labels: Int, signs: Int) -> tuple[Pairs | None, list[Rows]]:
    """The equations rewritten over classes, each once.

    Those that have become ``x = 0`` or ``x = +-y`` are returned as pairs (None if there are none),
    the others by length.
    """
    pairs: list[Pairs] = []
    general: list[Rows] = []
    for given, ids in rows:
        classes, coefficients = labels[ids], given * signs[ids]
        coefficients[classes == 0] = 0
        for k in range(1, ids.shape[1]):  # equal classes are merged into the first
            for j in range(k):
                same = classes[:, j] == classes[:, k]
                if same.any():
                    coefficients[same, j] += coefficients[same, k]
                    coefficients[same, k] = 0
        # Terms in order of their class, those that have gone last.
        order = np.argsort(np.where(coefficients == 0, len(labels), classes), axis=1)
        classes = np.take_along_axis(classes, order, 1)
        coefficients = np.take_along_axis(coefficients, order, 1)
        terms = np.count_nonzero(coefficients, axis=1)
        for n in np.unique(terms[terms > 0]).tolist():
            c, x = _distinct(coefficients[terms == n, :n], classes[terms == n, :n])
            if n == 1:
                pairs.append((x[:, 0], np.zeros_like(x[:, 0]), np.zeros(len(x), dtype=bool)))
                continue
            equal = (abs(c[:, 0]) == abs(c[:, 1])) & (n == 2)
            if equal.any():
                pairs.append((x[equal, 0], x[equal, 1], c[equal, 0] == c[equal, 1]))
            if not equal.all():
                general.append((c[~equal], x[~equal]))
    if not pairs:
        return None, general
    a, b, opposite = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return (a, b, opposite), _by_length(general)


def _distinct(coefficients: Int, classes: Int) -> Rows:
    """Each equation once, also where one is a multiple of another."""
    divisor = np.gcd.reduce(coefficients, axis=1) * np.sign(coefficients[:, 0])
    table = np.concatenate([classes, coefficients // divisor[:, None]], axis=1)
    # One random number per equation is enough to sort by; equal equations share it.
    weights = np.random.default_rng(0).integers(1, 2**62, table.shape[1], dtype=np.uint64) | 1
    key = (table.astype(np.uint64) * weights).sum(axis=1, dtype=np.uint64)
    order = np.argsort(key, kind="stable")
    table = table[order]
    new = np.ones(len(table), dtype=bool)
    new[1:] = (table[1:] != table[:-1]).any(axis=1)
    table = table[new]
    return table[:, classes.shape[1] :], table[:, : classes.shape[1]]


def _as_dicts(rows: list[Rows]) -> list[Row]:
    return [
        dict(zip(x, c, strict=True))
        for coefficients, classes in rows
        for c, x in zip(coefficients.tolist(), classes.tolist(), strict=True)
    ]


def _pairs_as_dicts(pairs: Pairs | None) -> list[Row]:
    """``x = y`` or ``x = -y`` as equations; an opposite of itself is zero."""
    found: list[Row] = []
    for a, b, opposite in zip(*(p.tolist() for p in pairs or ()), strict=True):
        sign = 1 if opposite else -1
        found.append({a: 1, b: sign} if a != b else {a: 1 + sign})
    return found


def _columns(solved: dict[int, Row], count: int) -> sp.csr_array:
    """Matrix (count, free) of ``count`` variables of which some are solved."""
    new = {w for form in solved.values() for w in form if w >= count}
    large = {w for form in solved.values() for w, c in form.items() if abs(c) > _LARGEST}
    free = [v for v in range(count) if v not in solved and v not in large]
    free += sorted(new - large)
    column = {v: k for k, v in enumerate(free)}
    terms = [(v, k, 1) for v, k in column.items() if v < count]
    for v, form in solved.items():
        if v < count:
            terms += [(v, column[w], c) for w, c in form.items() if w in column]
    row, place, data = np.array(terms, dtype=np.int64).reshape(-1, 3).T
    return sp.csr_array((data, (row, place)), shape=(count, len(free)))
