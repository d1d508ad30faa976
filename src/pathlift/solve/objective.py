"""The objective of most criteria: F itself, or the sum of coefficients without the linear term."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pathlift.errors import ArgumentError
from pathlift.solve.coordinate import coordinate_descent
from pathlift.solve.integer import nearby_integers
from pathlift.solve.matrix import Array
from pathlift.solve.newton import newton
from pathlift.solve.operator import Operator
from pathlift.solve.problem import IntArray, Solution

SOLVERS = {"newton": newton, "coordinate": coordinate_descent}


@dataclass(frozen=True)
class Total:
    """F(s); see :mod:`pathlift.solve.problem` for the formula and
    :class:`pathlift.solve.operator.Objective` for the methods."""

    largest: bool = False
    tol: float = 1e-8

    def value(self, operator: Operator, point: Array) -> float:
        """F at ``point``, without the constant ``- sum log g_i``."""
        return operator.total(point)

    def solve(self, operator: Operator, solver: str, tol: float) -> Solution:
        """Newton's method, or the published sweeps; ``tol`` bounds ``max |dF/ds| / count``."""
        return SOLVERS[checked_solver(solver)](operator, tol)

    def round(self, operator: Operator, point: Array) -> IntArray:
        """The best integers that a search around ``point`` finds."""
        return nearby_integers(operator, point)

    def imbalance(self, value: float, slant: float, count: int, log_mean: float) -> float:
        """``log(AM/GM)`` of the coefficients, per counted entry."""
        return max(0.0, (value + slant) / count - math.log(count) - log_mean)


TOTAL = Total()


def checked_solver(solver: str) -> str:
    """The name of a solver.

    Raises:
        ArgumentError: an unknown name; the message lists the known ones.
    """
    if solver not in SOLVERS:
        raise ArgumentError(
            f"Unknown solver {solver!r}; supported: {', '.join(map(repr, SOLVERS))}. "
            "Use solver='newton' unless you want the published algorithm."
        )
    return solver
