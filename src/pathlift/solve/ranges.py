"""Equal ranges on both sides of every channel (cross-layer equalization, any graph).

The largest entry that grows with a scale and the largest that shrinks with it are made equal, one
independent set of scales after the other, until no channel moves: the cyclic algorithm of Nagel et
al. (ICCV 2019), a layer at a time. It is the limit q -> infinity of minimising ``sum |theta|^q``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse

from pathlift.solve.coordinate import independent_sets
from pathlift.solve.matrix import Array, BoolArray
from pathlift.solve.objective import checked_solver
from pathlift.solve.operator import Operator, held_scales, operator_of
from pathlift.solve.problem import LN2, IntArray, Problem, Solution

_MAX_SWEEPS = 2000


@dataclass(frozen=True)
class Ranges:
    """Equal ranges; see :class:`pathlift.solve.operator.Objective` for the methods.

    ``tol``: the largest ``|log2(range in / range out)|``. A twentieth of a bit is far below what
    quantisation feels (3.5 % of a range), and a few sweeps away; what follows is a slow crawl.
    """

    largest: bool = True
    tol: float = 0.05

    def value(self, operator: Operator, point: Array) -> float:
        """The mean over channels of ``|log(range in / range out)|``."""
        sides = _Sides(operator, point)
        gap = np.abs(sides.gap()[sides.movable])
        return float(gap.mean() * LN2) if gap.size else 0.0

    def solve(self, operator: Operator, solver: str, tol: float) -> Solution:
        """The cyclic algorithm, whichever solver is named; both names are accepted."""
        checked_solver(solver)
        return equalise(operator, tol)

    def round(self, operator: Operator, point: Array) -> IntArray:
        """The nearest integers within the bounds."""
        problem = operator.problem
        low, high = np.ceil(problem.lower), np.floor(problem.upper)
        nearest = np.rint(point)
        clipped = np.clip(nearest, low, high)
        return np.where(low > high, nearest, clipped).astype(np.int64)

    def imbalance(self, value: float, slant: float, count: int, log_mean: float) -> float:
        """The value itself."""
        return value


RANGES = Ranges()


def equalise(problem: Problem | Operator, tol: float) -> Solution:
    """Scales of equal ranges; the certificate is the largest ``|log2(range in / range out)|``."""
    operator = operator_of(problem)
    problem = operator.problem
    sides = _Sides(operator, np.clip(np.zeros(problem.num_scales), problem.lower, problem.upper))
    sets = [(members, sides.touched(members)) for members in independent_sets(operator)]
    sweeps, worst = 0, sides.certificate()
    while worst > tol and sweeps < _MAX_SWEEPS:
        for members, touched in sets:
            sides.move(members, touched)
        sweeps, worst = sweeps + 1, sides.certificate()
    operator.passes += sweeps
    reason = ""
    if not worst <= tol:
        reason = f"ranges differ by up to {worst:.1e} bits after {sweeps} sweeps; asked for {tol}"
    gap = sides.gap()
    return Solution(
        sides.point,
        float(np.abs(gap[sides.movable]).mean() * LN2) if sides.movable.any() else 0.0,
        worst,
        sweeps,
        operator.passes,
        worst <= tol,
        reason,
        held_scales(problem, sides.point, -gap),
    )


class _Sides:
    """Largest entries around every scale, in log2, kept up to date as scales move.

    ``moved``: per form, the bits by which it has moved its entries. ``others``: per form, the
    largest entry of its row or column without them.
    """

    def __init__(self, operator: Operator, point: Array) -> None:
        problem = operator.problem
        self.operator, self.point = operator, point
        self.movable: BoolArray = problem.lower < problem.upper
        self.logs = [m.log2() for m in operator.sources]
        # Exponent of every form (row, column, single entry) in every scale, per log2 unit.
        self.exponents = sparse.csr_array(-2.0 * operator.forms)
        by_scale = sparse.csr_array(self.exponents.T.tocsr())
        self.enter = _Extremes(by_scale, 1.0)
        self.leave = _Extremes(by_scale, -1.0)
        self.largest = np.maximum(np.asarray(abs(by_scale).max(axis=1).todense()).ravel(), 1.0)
        self.others = np.full(self.exponents.shape[0], -np.inf)
        values = np.asarray(problem.vector, dtype=np.float64)
        self.others[operator.vector_segment()] = np.log2(values[values > 0])
        self.moved = np.asarray(self.exponents @ point)
        for b in range(len(self.logs)):
            self._renew(b, True, True)

    def touched(self, members: IntArray) -> list[tuple[int, bool, bool]]:
        """The matrices with forms in the scales: which, and whether rows or columns move."""
        chosen = np.zeros(self.operator.problem.num_scales)
        chosen[members] = 1.0
        hit = abs(self.exponents) @ chosen > 0
        parts = [self.operator.segments(b) for b in range(len(self.logs))]
        found = [(b, bool(hit[r].any()), bool(hit[c].any())) for b, (r, c) in enumerate(parts)]
        return [(b, rows, cols) for b, rows, cols in found if rows or cols]

    def move(self, members: IntArray, touched: list[tuple[int, bool, bool]]) -> None:
        """Make the two sides of every member equal (exponents +1 and -1; else go a part of it)."""
        problem = self.operator.problem
        step = (self.gap() / (2.0 * self.largest))[members]
        self.point[members] = np.clip(
            self.point[members] + step, problem.lower[members], problem.upper[members]
        )
        self.moved = np.asarray(self.exponents @ self.point)
        for b, rows, cols in touched:
            self._renew(b, rows, cols)

    def _renew(self, b: int, rows_moved: bool, columns_moved: bool) -> None:
        row, col = self.operator.segments(b)
        if columns_moved:
            self.others[row] = (self.logs[b] + torch.from_numpy(self.moved[col])).amax(1).numpy()
        if rows_moved:
            by_row = torch.from_numpy(self.moved[row])[:, None]
            self.others[col] = (self.logs[b] + by_row).amax(0).numpy()

    def gap(self) -> Array:
        """log2(range out / range in) per scale; 0 where a side is missing."""
        tops = self.others + self.moved
        enter, leave = self.enter(tops), self.leave(tops)
        both = np.isfinite(enter) & np.isfinite(leave)
        gap = np.zeros_like(enter)
        gap[both] = leave[both] - enter[both]
        return gap

    def certificate(self) -> float:
        """Largest gap among the scales that can still move in its direction."""
        problem, gap = self.operator.problem, self.gap()
        stuck = np.zeros(gap.size, dtype=bool)
        stuck[held_scales(problem, self.point, -gap)] = True
        free = np.abs(np.where(stuck | ~self.movable, 0.0, gap))
        return float(free.max(initial=0.0))


class _Extremes:
    """Per scale, the largest value of the forms in which it has one sign; -inf without any."""

    def __init__(self, by_scale: sparse.csr_array, sign: float) -> None:
        coo = by_scale.tocoo()
        keep = sign * coo.data > 0
        order = np.argsort(coo.row[keep], kind="stable")
        scale = coo.row[keep][order]
        self.form = coo.col[keep][order]
        self.scale, self.first = np.unique(scale, return_index=True)
        self.size = by_scale.shape[0]

    def __call__(self, values: Array) -> Array:
        out = np.full(self.size, -np.inf)
        if self.form.size:
            out[self.scale] = np.maximum.reduceat(values[self.form], self.first)
        return out
