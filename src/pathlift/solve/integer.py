"""Integer scales next to the continuous optimum: powers of two rescale without rounding."""

from __future__ import annotations

import numpy as np

from pathlift.solve.coordinate import independent_sets
from pathlift.solve.matrix import Array
from pathlift.solve.operator import Evaluation, Operator, operator_of
from pathlift.solve.problem import LN2, IntArray, Problem

_MAX_SWEEPS = 20


def nearby_integers(problem: Problem | Operator, point: Array) -> IntArray:
    """Integer scales within the bounds, ``(H,)`` int64, with F not above that of plain rounding.

    Starts at the nearest integers and moves single scales by one while that lowers F. The scales
    of an independent set are tried together: with ``D_h`` the change of T (as a share of T) when h
    alone moves by ``d_h``, moving a subset changes F by exactly
    ``p log(1 + sum D_h) + 2 ln2 sum l_h d_h``, so the best leading part of the sorted candidates
    is taken.
    """
    operator = operator_of(problem)
    problem = operator.problem
    low, high = np.ceil(problem.lower), np.floor(problem.upper)
    fixed = low > high  # no integer between the bounds: the nearest one to the point
    rounded = np.rint(point)
    start = np.where(fixed, rounded, np.clip(rounded, low, high))
    at = operator.evaluate(start)
    if operator.empty or problem.count == 0:
        return start.astype(np.int64)
    for _ in range(_MAX_SWEEPS):
        before = at.objective
        moved = False
        for members in independent_sets(operator):
            trial = _improve(operator, at, members[~fixed[members]], low, high)
            if trial is not None:
                at, moved = trial, True
        if not moved or not at.objective < before:
            break
    return np.rint(at.point).astype(np.int64)


def _improve(
    operator: Operator, at: Evaluation, members: IntArray, low: Array, high: Array
) -> Evaluation | None:
    """Move the best subset of an independent set by one each; None if F does not fall."""
    problem = operator.problem
    shares = operator.shares_by_exponent(at)
    slope = 2.0 * LN2 * problem.linear[members]
    total = np.zeros((2, members.size))
    for k, step in enumerate((-1.0, 1.0)):
        for e, q in shares.items():
            total[k] += q[members] * np.expm1(-2.0 * LN2 * e * step)
    change = problem.count * total + slope * np.array([[-1.0], [1.0]])
    change[0][at.point[members] - 1 < low[members]] = np.inf
    change[1][at.point[members] + 1 > high[members]] = np.inf
    side = np.argmin(_exact(problem.count, total, change), axis=0)
    pick = np.arange(members.size)
    gain = _exact(problem.count, total, change)[side, pick]
    order = np.argsort(gain, kind="stable")
    order = order[gain[order] < -1e-13 * problem.count]
    if order.size == 0:
        return None
    step = 2.0 * side - 1.0
    ratio = np.cumsum(total[side, pick][order])
    slant = np.cumsum((slope * step)[order])
    joint = problem.count * np.log1p(np.maximum(ratio, -1.0 + 1e-15)) + slant
    last = int(np.argmin(joint)) + 1
    point = at.point.copy()
    point[members[order[:last]]] += step[order[:last]]
    trial = operator.evaluate(point)
    return trial if trial.objective < at.objective else None


def _exact(count: int, total: Array, change: Array) -> Array:
    """Change of F when one scale moves alone; infinite where the move is not allowed."""
    linear = change - count * total
    return np.asarray(count * np.log1p(np.maximum(total, -1.0 + 1e-15)) + linear)
