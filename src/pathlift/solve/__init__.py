"""The convex problem in the log2 scales, and its solvers."""

from __future__ import annotations

from pathlift.errors import ArgumentError
from pathlift.solve.coordinate import coordinate_descent
from pathlift.solve.integer import round_scales
from pathlift.solve.newton import newton
from pathlift.solve.problem import (
    MatrixBlock,
    Operator,
    Problem,
    Solution,
    gradient,
    objective,
    operator_of,
)
from pathlift.solve.ranges import equalise, value

SOLVERS = ("newton", "coordinate")


def solve(problem: Problem | Operator, solver: str = "newton", tol: float = 1e-8) -> Solution:
    """Minimise F within the bounds; ``tol`` bounds ``max |projected dF/ds| / count``."""
    problem = operator_of(problem)
    if solver in SOLVERS and problem.problem.reduction == "max":
        return equalise(problem, tol)
    if solver == "newton":
        return newton(problem, tol)
    if solver == "coordinate":
        return coordinate_descent(problem, tol)
    raise ArgumentError(
        f"Unknown solver {solver!r}; supported: {', '.join(map(repr, SOLVERS))}. "
        "Use solver='newton' unless you want the published algorithm."
    )


__all__ = [
    "SOLVERS",
    "MatrixBlock",
    "Operator",
    "Problem",
    "Solution",
    "coordinate_descent",
    "equalise",
    "gradient",
    "newton",
    "objective",
    "round_scales",
    "solve",
    "value",
]
