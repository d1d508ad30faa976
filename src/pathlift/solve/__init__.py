"""The convex problem in the log2 scales, and its solvers."""

from __future__ import annotations

from pathlift.solve.coordinate import coordinate_descent
from pathlift.solve.matrix import Array
from pathlift.solve.newton import newton
from pathlift.solve.objective import SOLVERS, TOTAL
from pathlift.solve.operator import Objective, Operator, gradient, objective, operator_of
from pathlift.solve.problem import IntArray, MatrixBlock, Problem, Solution
from pathlift.solve.ranges import RANGES


def solve(
    problem: Problem | Operator, solver: str = "newton", tol: float | None = None
) -> Solution:
    """The best scales within the bounds, by the objective of the operator (F for a problem).

    ``tol`` bounds the certificate, for F ``max |projected dF/ds| / count``; None: the objective's.
    """
    operator = operator_of(problem)
    asked = operator.objective or TOTAL
    return asked.solve(operator, solver, asked.tol if tol is None else tol)


def value(problem: Problem | Operator, point: Array) -> float:
    """What is minimised, at ``point`` ``(H,)``."""
    operator = operator_of(problem)
    return (operator.objective or TOTAL).value(operator, point)


def round_scales(problem: Problem | Operator, point: Array) -> IntArray:
    """Integer scales near ``point`` within the bounds, ``(H,)`` int64."""
    operator = operator_of(problem)
    return (operator.objective or TOTAL).round(operator, point)


__all__ = [
    "RANGES",
    "SOLVERS",
    "TOTAL",
    "MatrixBlock",
    "Objective",
    "Operator",
    "Problem",
    "Solution",
    "coordinate_descent",
    "gradient",
    "newton",
    "objective",
    "round_scales",
    "solve",
    "value",
]
