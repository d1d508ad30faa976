"""Equal ranges on both sides of every channel (cross-layer equalization, any graph).

The largest entry that grows with a scale and the largest that shrinks with it are made equal, one
independent set of scales after the other, until no channel moves: the cyclic algorithm of Nagel et
al. (ICCV 2019), a layer at a time. It is the limit q -> infinity of minimising ``sum |theta|^q``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pathlift.solve.coordinate import independent_sets
from pathlift.solve.matrix import Array
from pathlift.solve.problem import LN2, Operator, Problem, Solution, objective, operator_of

_MAX_SWEEPS = 2000


def value(problem: Problem | Operator, point: Array) -> float:
    """F at ``point``; for ranges the mean over channels of ``|log(range in / range out)|``."""
    operator = operator_of(problem)
    if operator.problem.reduction == "max":
        ranges = _Ranges(operator)
        gap = np.abs(ranges.gap(point)[ranges.movable])
        return float(gap.mean() * LN2) if gap.size else 0.0
    return objective(operator, point)


def equalise(problem: Problem | Operator, tol: float) -> Solution:
    """Scales of equal ranges; the certificate is the largest ``|log2(range in / range out)|``."""
    operator = operator_of(problem)
    problem = operator.problem
    ranges = _Ranges(operator)
    point = np.clip(np.zeros(problem.num_scales), problem.lower, problem.upper)
    sweeps, worst = 0, ranges.certificate(point)
    while worst > tol and sweeps < _MAX_SWEEPS:
        for members in independent_sets(operator):
            step = ranges.step(point)[members]
            point[members] = np.clip(
                point[members] + step, problem.lower[members], problem.upper[members]
            )
        sweeps, worst = sweeps + 1, ranges.certificate(point)
    mean = value(operator, point)
    return Solution(point, mean, worst, sweeps, operator.pairs, worst <= tol)


@dataclass
class _Ranges:
    """Largest entries around every scale, in log2."""

    operator: Operator

    def __post_init__(self) -> None:
        operator, problem = self.operator, self.operator.problem
        self.logs = [m.log2() for m in operator.sources]
        # Exponent of every form (row, column, single entry) in every scale, per log2 unit.
        self.exponents = (-2.0 * operator.forms).tocoo()
        values = np.asarray(problem.vector, dtype=np.float64)
        self.single = np.log2(values[values > 0])
        self.movable = problem.lower < problem.upper

    def tops(self, point: Array) -> Array:
        """Per form, the log2 of its largest entry at ``point``."""
        operator = self.operator
        moved = -2.0 * (operator.forms @ point)
        tops = np.full(len(moved), -np.inf)
        for b, log in enumerate(self.logs):
            row, col = operator.segments(b)
            here = log + torch.from_numpy(moved[row])[:, None] + torch.from_numpy(moved[col])
            tops[row], tops[col] = here.amax(1).numpy(), here.amax(0).numpy()
        part = operator.vector_segment()
        tops[part] = self.single + moved[part]
        return tops

    def _sides(self, point: Array) -> tuple[Array, Array]:
        at, e = self.tops(point), self.exponents
        sides = []
        for sign in (1.0, -1.0):
            side = np.full(self.operator.problem.num_scales, -np.inf)
            chosen = sign * e.data > 0
            np.maximum.at(side, e.col[chosen], at[e.row[chosen]])
            sides.append(side)
        return sides[0], sides[1]

    def gap(self, point: Array) -> Array:
        """log2(range out / range in) per scale; 0 where a side is missing."""
        enter, leave = self._sides(point)
        both = np.isfinite(enter) & np.isfinite(leave)
        gap = np.zeros_like(enter)
        gap[both] = leave[both] - enter[both]
        return gap

    def step(self, point: Array) -> Array:
        """The move that equalises one scale alone (exponents +1 and -1), else a part of it."""
        e = self.exponents
        largest = np.ones(self.operator.problem.num_scales)
        np.maximum.at(largest, e.col, np.abs(e.data))
        return np.asarray(self.gap(point) / (2.0 * largest))

    def certificate(self, point: Array) -> float:
        """Largest gap among the scales that can still move in its direction."""
        problem, gap = self.operator.problem, self.gap(point)
        stuck = ((gap > 0) & (point >= problem.upper)) | ((gap < 0) & (point <= problem.lower))
        free = np.abs(np.where(stuck | ~self.movable, 0.0, gap))
        return float(free.max(initial=0.0))
