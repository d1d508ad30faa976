"""Integer scales next to the continuous optimum: powers of two rescale without rounding.

Two neighbourhoods in turns, until neither lowers F. *Layers*: the scales of a layer that were
rounded one way, or those of two layers that share entries, by one together. Where a net's initial
scale is off by half a bit per layer, most of a layer rounds the same way, and no single scale can
turn back alone. *Scales*: single ones by one.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from pathlift.solve.coordinate import independent_sets
from pathlift.solve.exponents import shares_by_exponent
from pathlift.solve.matrix import Array, BoolArray
from pathlift.solve.operator import Evaluation, Operator, operator_of
from pathlift.solve.problem import LN2, IntArray, Problem

_MAX_SWEEPS = 20
_MAX_TURNS = 4
# Moves of layers in a row, and how many numbers one look at all of them may take.
_MAX_MOVES = 40
_MAX_TABLE = 4_000_000


def nearby_integers(problem: Problem | Operator, point: Array) -> IntArray:
    """Integer scales within the bounds, ``(H,)`` int64, with F not above that of plain rounding."""
    operator = operator_of(problem)
    problem = operator.problem
    low, high = np.ceil(problem.lower), np.floor(problem.upper)
    fixed = low > high  # no integer between the bounds: the nearest one to the point
    starts = [np.where(fixed, p, np.clip(p, low, high)) for p in (np.rint(point), 0.0 * point)]
    if operator.empty or problem.count == 0:
        return starts[0].astype(np.int64)
    nearest, stay = (operator.evaluate(start) for start in starts)
    at = _searched(operator, nearest, point, low, high, fixed)
    if stay.objective < at.objective:
        at = _searched(operator, stay, point, low, high, fixed)
    return np.rint(at.point).astype(np.int64)


def _searched(
    operator: Operator, at: Evaluation, exact: Array, low: Array, high: Array, fixed: BoolArray
) -> Evaluation:
    """Both neighbourhoods in turns."""
    for turn in range(_MAX_TURNS):
        trial = _move_layers(operator, at, exact, low, high)
        if trial is None and turn > 0:
            break
        at = _move_scales(operator, at if trial is None else trial, low, high, fixed)
    return at


# -- single scales -----------------------------------------------------------------------------


def _move_scales(
    operator: Operator, at: Evaluation, low: Array, high: Array, fixed: BoolArray
) -> Evaluation:
    """Move single scales by one while that lowers F.

    The scales of an independent set are tried together: with ``D_h`` the change of T (as a share
    of T) when h alone moves by ``d_h``, moving a subset changes F by exactly
    ``p log(1 + sum D_h) + 2 ln2 sum l_h d_h``, so the best leading part of the sorted candidates
    is taken.
    """
    for _ in range(_MAX_SWEEPS):
        before = at.objective
        moved = False
        for members in independent_sets(operator):
            trial = _improve(operator, at, members[~fixed[members]], low, high)
            if trial is not None:
                at, moved = trial, True
        if not moved or not at.objective < before:
            break
    return at


def _improve(
    operator: Operator, at: Evaluation, members: IntArray, low: Array, high: Array
) -> Evaluation | None:
    """Move the best subset of an independent set by one each; None if F does not fall."""
    problem = operator.problem
    shares = shares_by_exponent(operator, at)
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


# -- layers ------------------------------------------------------------------------------------


def _move_layers(
    operator: Operator, at: Evaluation, exact: Array, low: Array, high: Array
) -> Evaluation | None:
    """Move groups, and pairs of them, by one while F falls; None if it does not.

    A group: the scales of a layer that stand above ``exact``, or those that do not. Moved together
    they change all entries of one kind by one factor, so a few shares of T say what F becomes: no
    product with a matrix but the last, which confirms it. (The share of a part of a matrix is
    taken as its rows' times its columns'.)
    """
    problem = operator.problem
    movable = problem.lower < problem.upper
    if not movable.any():
        return None
    above = (at.point > exact)[movable]
    names, group = np.unique(2 * problem.layers[movable] + above, return_inverse=True)
    place = (np.flatnonzero(movable), group.reshape(-1))
    member = sparse.csr_array((np.ones(group.size), place), shape=(movable.size, names.size))
    exponents, shares = _kinds(operator, at, member)
    moves = _moves(exponents, names // 2)
    if moves.size * exponents.shape[0] > _MAX_TABLE * exponents.shape[1]:
        return None
    room = _room(at.point, low, high, place)
    slope = 2.0 * LN2 * (member.T @ problem.linear) @ moves.T
    factors = np.asarray(np.exp2(-2.0 * (exponents @ moves.T)))  # (kinds, moves)
    offset = np.zeros(member.shape[1])
    for _ in range(_MAX_MOVES):
        allowed = ((offset + moves >= -room[0]) & (offset + moves <= room[1])).all(axis=1)
        total = shares @ factors
        change = problem.count * np.log(total / shares.sum()) + slope
        change[~allowed] = np.inf
        best = int(np.argmin(change))
        if not change[best] < -1e-9 * problem.count:
            break
        offset, shares = offset + moves[best], shares * factors[:, best]
    if not offset.any():
        return None
    trial = operator.evaluate(at.point + member @ offset)
    return trial if trial.objective < at.objective else None


def _kinds(operator: Operator, at: Evaluation, member: sparse.csr_array) -> tuple[Array, Array]:
    """Exponents ``(kinds, groups)`` of entries under moves of groups, and their shares of T."""
    forms = sparse.csr_array(operator.forms @ member)
    key = forms @ np.random.default_rng(0).standard_normal(member.shape[1])
    _, first, kind = np.unique(np.round(key, 9), return_index=True, return_inverse=True)
    kind = kind.reshape(-1)
    rows: list[Array] = []
    shares: list[Array] = []
    table = forms[first].toarray()
    for b in range(len(operator.blocks)):
        row, col = operator.segments(b)
        of_rows, left = _tally(kind[row], at.weights[row])
        of_columns, right = _tally(kind[col], at.weights[col])
        joint = table[of_rows][:, None, :] + table[of_columns][None, :, :]
        rows.append(joint.reshape(-1, table.shape[1]))
        shares.append((np.outer(left, right) / max(float(right.sum()), 1e-300)).reshape(-1))
    part = operator.vector_segment()
    single, total = _tally(kind[part], at.weights[part])
    rest = max(0.0, 1.0 - sum(float(s.sum()) for s in shares) - float(total.sum()))
    rows += [table[single], np.zeros((1, table.shape[1]))]
    return np.concatenate(rows), np.concatenate([*shares, total, [rest]])


def _tally(kind: IntArray, weights: Array) -> tuple[IntArray, Array]:
    found, index = np.unique(kind, return_inverse=True)
    sums = np.bincount(index.reshape(-1), weights, minlength=found.size)
    return found, np.asarray(sums, dtype=np.float64)


def _moves(exponents: Array, layer: IntArray) -> Array:
    """``(moves, groups)``: every group by one up or down, and pairs of one layer or of two that
    share entries."""
    met = exponents != 0
    meets = (met.T.astype(np.float64) @ met > 0) | (layer[:, None] == layer)
    together = np.triu(meets, 1)
    first, second = np.nonzero(together)
    single = np.eye(exponents.shape[1])
    same = single[first] + single[second]
    opposite = single[first] - single[second]
    return np.concatenate([single, -single, same, -same, opposite, -opposite])


def _room(
    point: Array, low: Array, high: Array, place: tuple[IntArray, IntArray]
) -> tuple[Array, Array]:
    """How far each group may move down and up."""
    scales, layer = place
    down, up = np.full(int(layer.max()) + 1, np.inf), np.full(int(layer.max()) + 1, np.inf)
    np.minimum.at(down, layer, (point - low)[scales])
    np.minimum.at(up, layer, (high - point)[scales])
    return np.maximum(down, 0.0), np.maximum(up, 0.0)
