"""Coordinate descent over sets of scales that share no entry: the published algorithm.

One scale h (published step). Let P be the sum of the ``g'`` with exponent +1 (entering), N the sum
of those with exponent -1 (leaving), D the rest, ``l`` the entry of ``linear``, and move ``s_h`` by
delta with ``x = 4^delta``. Then ``F = p log(D + P / x + N x) + l log x`` and ``dF / d log x = 0``
is

    N (p + l) x^2 + l D x + P (l - p) = 0,

which has one positive root. With N = B, P = C and l = A it is the equation of the publication.

Many scales at once. If no entry contains two scales of a set,
``T = D + sum_h (P_h / x_h + N_h x_h)``. Stationarity of every h reads, with the common T,

    N_h x_h - P_h / x_h = - (l_h / p) T.                                                       (1)

Squaring, ``(N x + P / x)^2 = (N x - P / x)^2 + 4 P N``, so T solves the scalar equation

    T = D + sum_h sqrt((l_h / p)^2 T^2 + 4 P_h N_h).                                           (2)

The right side is convex in T with slope below ``sum |l_h| / p <= 1``, because the entries counted
in different l_h are different entries; so right minus left is convex and decreasing, it has one
root, and Newton's iteration converges to it monotonically after its first step. Then (1) gives
each x_h. As F is convex, this stationary point is the joint minimum over the set; for a set of
one scale (1) and (2) are the published quadratic, so the fixed points are the same.

Bounds and other exponents. ``log T <= T / tau + log tau - 1`` with equality at ``tau = T``, so
minimising F over the set is minimising ``p (T(s) / tau + log tau) + 2 ln2 l.s`` jointly over s and
tau, a convex problem in ``(s, log tau)`` that is separable in s for fixed tau. Each scale is then a
one-dimensional convex problem (clipped to its bounds, or solved by a safeguarded Newton iteration
when some exponent is not +1 or -1), and ``T(s(tau)) / tau`` decreases in tau, so tau is found by
bracketing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import sparse

from pathlift.solve.exponents import shares_by_exponent
from pathlift.solve.matrix import Array, BoolArray
from pathlift.solve.operator import Evaluation, Operator, certificate, operator_of, solution
from pathlift.solve.problem import LN2, IntArray, Problem, Solution

# No scale moves further than this in one step (log2 units); sweeps continue from there.
_MAX_MOVE = 150.0
# Sweeps as published, before extrapolation; and over how many sweeps it looks back.
_PLAIN_SWEEPS = 50
_MEMORY = 8


def coordinate_descent(
    problem: Problem | Operator, tol: float = 1e-8, max_sweeps: int = 1000
) -> Solution:
    """Minimise F by sweeps of exact joint minimisations over independent sets of scales.

    Whole layers against each other move slowly in such sweeps: a convolutional net of seven layers
    needs thousands. After ``_PLAIN_SWEEPS`` of them each is followed by an extrapolation over the
    last ones (Anderson's), which is taken where it lowers F further; the fixed points are the same.
    """
    operator = operator_of(problem)
    problem = operator.problem
    start = np.clip(np.zeros(problem.num_scales), problem.lower, problem.upper)
    at = operator.evaluate(start)
    if problem.count == 0:
        bound = np.where(problem.linear > 0, problem.lower, problem.upper)
        point = np.where((problem.linear != 0) & np.isfinite(bound), bound, start)
        return solution(operator, operator.evaluate(point), 0, tol)
    sets = independent_sets(operator)
    ends: list[Array] = []
    changes: list[Array] = []
    for iteration in range(max_sweeps):
        if certificate(problem, at) <= tol or not sets:
            return solution(operator, at, iteration, tol)
        before = at.point
        at = sweep(operator, at)
        if iteration < _PLAIN_SWEEPS:
            continue
        ends, changes = [*ends, at.point][-_MEMORY:], [*changes, at.point - before][-_MEMORY:]
        if len(ends) > 1:
            further = _extrapolated(ends, changes)
            trial = operator.evaluate(np.clip(further, problem.lower, problem.upper))
            if trial.objective < at.objective:
                at = trial
    return solution(operator, at, max_sweeps, tol)


def _extrapolated(ends: list[Array], changes: list[Array]) -> Array:
    """Where sweeps would end if their changes were linear: Anderson's combination of the last."""
    steps = np.diff(np.asarray(ends), axis=0).T
    bends = np.diff(np.asarray(changes), axis=0).T
    weights = np.linalg.lstsq(bends, changes[-1], rcond=1e-10)[0]
    return np.asarray(ends[-1] - steps @ weights)


def sweep(operator: Operator, at: Evaluation) -> Evaluation:
    """One exact minimisation over each independent set in turn."""
    for members in independent_sets(operator):
        at = minimise_set(operator, at, members)
    return at


# -- independent sets --------------------------------------------------------------------------


def independent_sets(operator: Operator) -> list[IntArray]:
    """Colour the scales so that no two of one colour occur in one entry.

    Layers are coloured as wholes (every row layer of a matrix meets every column layer); the
    scales of a layer in which two of them share an entry are coloured one by one. Kept scales
    (equal bounds) are left out.
    """
    if operator.sets is None:
        operator.sets = _colour(operator)
    return operator.sets


def _colour(operator: Operator) -> list[IntArray]:
    problem = operator.problem
    h = problem.num_scales
    movable = problem.lower < problem.upper
    _, layer = np.unique(problem.layers, return_inverse=True)
    layer = layer.astype(np.int64)
    broken = np.zeros(int(layer.max(initial=-1)) + 1, dtype=bool)
    _mark_broken(operator, layer, broken)
    node = np.where(broken[layer], np.arange(h) + broken.size, layer)
    _, node = np.unique(node, return_inverse=True)
    node = node.astype(np.int64)
    neighbours = _coupling(operator, node, np.ones(h, dtype=bool)).tocsr()
    colour = np.full(neighbours.shape[0], -1)
    for k in np.argsort(-np.diff(neighbours.indptr), kind="stable"):
        near = neighbours.indices[neighbours.indptr[k] : neighbours.indptr[k + 1]]
        used = set(colour[near[near != k]].tolist())
        colour[k] = next(c for c in range(len(used) + 1) if c not in used)
    chosen = colour[node]
    sets = [np.flatnonzero((chosen == c) & movable) for c in range(int(colour.max(initial=-1)) + 1)]
    return [s.astype(np.int64) for s in sets if s.size]


def _mark_broken(
    operator: Operator,
    layer: IntArray,
    broken: BoolArray,
) -> None:
    """Mark the layers with two scales in one entry."""
    suspect = _coupling_within(operator, layer, broken.size)
    if not suspect.any():
        return
    inside = suspect[layer]
    pattern = _coupling(operator, np.arange(layer.size), inside).tocoo()
    same = (layer[pattern.row] == layer[pattern.col]) & (pattern.row != pattern.col)
    broken[layer[pattern.row[same]]] = True


def _coupling_within(operator: Operator, layer: IntArray, layers: int) -> BoolArray:
    """Layers with two scales in one form, or on both sides of one matrix."""
    member = _membership(layer, layers)
    pattern = _pattern(operator.forms)
    several = np.asarray(((pattern @ member) > 1).sum(axis=0)).ravel() > 0
    for b in range(len(operator.blocks)):
        row, col = operator.segments(b)
        on_rows = np.bincount(layer[pattern[row].indices], minlength=layers) > 0
        on_cols = np.bincount(layer[pattern[col].indices], minlength=layers) > 0
        several |= on_rows & on_cols
    return np.asarray(several)


def _coupling(operator: Operator, node: IntArray, keep: BoolArray) -> sparse.csr_array:
    """Which nodes (groups of scales) occur together in an entry with a positive coefficient."""
    size = int(node.max(initial=-1)) + 1
    member = _membership(node, size)
    member = sparse.csr_array(sparse.diags_array(keep.astype(np.float64)) @ member)
    touched = _pattern(_pattern(operator.forms) @ member)
    total = sparse.csr_array(touched.T @ touched)
    for b, source in enumerate(operator.sources):
        row, col = operator.segments(b)
        left, right = touched[row], touched[col]
        nodes_left, nodes_right = np.unique(left.indices), np.unique(right.indices)
        if nodes_left.size == 0 or nodes_right.size == 0:
            continue
        joint = np.ones((nodes_left.size, nodes_right.size), dtype=bool)
        if source.has_zeros:
            positive = source.positive().astype(np.float32)
            reach = left[:, nodes_left].T @ positive  # (nodes, C)
            joint = np.asarray((right[:, nodes_right].T @ reach.T).T) > 0
        a, c = np.nonzero(joint)
        pairs = (np.ones(a.size), (nodes_left[a], nodes_right[c]))
        part = sparse.csr_array(pairs, shape=(size, size))
        total = sparse.csr_array(total + part + part.T)
    return total


def _membership(node: IntArray, size: int) -> sparse.csr_array:
    ones = np.ones(node.size)
    return sparse.csr_array((ones, (np.arange(node.size), node)), shape=(node.size, size))


def _pattern(matrix: sparse.csr_array) -> sparse.csr_array:
    out = sparse.csr_array(abs(matrix))
    out.eliminate_zeros()
    out.data = np.ones_like(out.data)
    return out


# -- one set -----------------------------------------------------------------------------------


def minimise_set(operator: Operator, at: Evaluation, members: IntArray) -> Evaluation:
    """Minimise F over the scales in ``members`` (independent) jointly; never raises F."""
    problem = operator.problem
    shares = shares_by_exponent(operator, at)
    exponents = np.asarray(sorted(shares))
    table = np.asarray([shares[e][members] for e in exponents.tolist()])
    table = table.reshape(exponents.size, members.size)
    slope = problem.linear[members] / problem.count
    low = np.maximum(problem.lower[members] - at.point[members], -_MAX_MOVE)
    high = np.minimum(problem.upper[members] - at.point[members], _MAX_MOVE)
    move = best_moves(exponents, table, slope, low, high)
    point = at.point.copy()
    point[members] = np.clip(point[members] + move, problem.lower[members], problem.upper[members])
    trial = operator.evaluate(point)
    slack = 1e-12 * (abs(at.objective) + problem.count)
    return trial if trial.objective <= at.objective + slack else at


def best_moves(exponents: Array, shares: Array, slope: Array, low: Array, high: Array) -> Array:
    """Joint minimiser of ``log(D + sum_eh q_eh 4^{-e d_h}) + 2 ln2 slope.d``, low <= d <= high.

    ``exponents``: ``(n,)``, non-zero. ``shares``: ``(n, m)``, shares of T with ``sum <= 1``, so
    ``D = 1 - sum``. ``slope``, ``low``, ``high`` and the result: ``(m,)``, log2 units.
    """
    rest = max(0.0, 1.0 - float(shares.sum()))
    if np.all(np.abs(exponents) == 1.0):
        zero = np.zeros(slope.size)
        enter = shares[exponents == 1.0].sum(axis=0) if exponents.size else zero
        leave = shares[exponents == -1.0].sum(axis=0) if exponents.size else zero
        return _quadratic_moves(enter, leave, rest, slope, low, high)
    total = _root_by_bracket(
        lambda t: (
            rest + _sum_at(exponents, shares, _convex_moves(exponents, shares, slope, t, low, high))
        )
    )
    return _convex_moves(exponents, shares, slope, total, low, high)


def _quadratic_moves(
    enter: Array, leave: Array, rest: float, slope: Array, low: Array, high: Array
) -> Array:
    """Exponents +1 and -1: equation (2) by Newton, then (1); by bracketing if a bound is met."""
    product = 4.0 * enter * leave
    total = 1.0
    for _ in range(100):
        roots = np.sqrt((slope * total) ** 2 + product)
        value = rest + float(roots.sum()) - total
        ratio = slope**2 * total / np.where(roots > 0, roots, 1.0)
        descent = float(ratio.sum()) - 1.0
        if descent > -1e-13:
            break
        new = total - value / descent
        if not new > 0:
            new = 0.5 * total
        if abs(new - total) <= 1e-15 * total:
            total = new
            break
        total = new
    move = _quadratic_root(enter, leave, slope, total)
    if np.all((move >= low) & (move <= high)):
        return move

    def sum_at(t: float) -> float:
        d = np.clip(_quadratic_root(enter, leave, slope, t), low, high)
        return rest + float((enter * np.exp2(-2 * d) + leave * np.exp2(2 * d)).sum())

    return np.clip(_quadratic_root(enter, leave, slope, _root_by_bracket(sum_at)), low, high)


def _quadratic_root(enter: Array, leave: Array, slope: Array, total: float) -> Array:
    """``log4 x`` with ``leave x^2 + slope total x - enter = 0``, x > 0; may be infinite, never NaN.

    A scale without entries and without slope stays.
    """
    b = slope * total
    root = np.sqrt(b**2 + 4.0 * enter * leave)
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.where(b >= 0, 2.0 * enter / (b + root), (root - b) / (2.0 * leave))
        move = 0.5 * np.log2(x)
    return np.where(np.isnan(move), 0.0, move)


def _convex_moves(
    exponents: Array, shares: Array, slope: Array, total: float, low: Array, high: Array
) -> Array:
    """Per scale, ``argmin_d  sum_e q_e 4^{-e d} / total + 2 ln2 slope d``: safeguarded Newton.

    The derivative over 2 ln2, ``slope - sum_e e q_e 4^{-e d} / total``, increases in d.
    """
    left = np.maximum(low, -2 * _MAX_MOVE)
    right = np.minimum(high, 2 * _MAX_MOVE)
    e = exponents[:, None]
    with np.errstate(divide="ignore"):
        logs = np.log2(shares) - np.log2(total)

    def slopes(d: Array) -> tuple[Array, Array]:
        terms = np.exp2(np.minimum(logs - 2.0 * e * d, 900.0))
        return slope - (e * terms).sum(axis=0), 2.0 * LN2 * (e**2 * terms).sum(axis=0)

    at_left, at_right = slopes(left)[0] >= 0, slopes(right)[0] <= 0
    d = np.where(at_left, left, np.where(at_right, right, np.clip(0.0, left, right)))
    settled = at_left | at_right
    for _ in range(100):
        value, curve = slopes(d)
        left = np.where(value < 0, d, left)
        right = np.where(value > 0, d, right)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            new = d - value / curve
        new = np.where((new > left) & (new < right), new, 0.5 * (left + right))
        new = np.where(settled | (value == 0), d, new)
        if np.all(np.abs(new - d) <= 1e-15 * (1.0 + np.abs(d))):
            return new
        d = new
    return d


def _sum_at(exponents: Array, shares: Array, move: Array) -> float:
    return float((shares * np.exp2(np.minimum(-2.0 * exponents[:, None] * move, 900.0))).sum())


def _root_by_bracket(total_at: Callable[[float], float]) -> float:
    """The t > 0 with ``total_at(t) = t``, given that ``total_at(t) / t`` decreases; 1 is near."""

    def excess(log2_t: float) -> float:
        return float(np.log2(max(total_at(float(np.exp2(log2_t))), 1e-307))) - log2_t

    low, high, width = 0.0, 0.0, 0.5
    while excess(low) < 0 and low > -1000.0:
        low, high, width = max(low - width, -1000.0), low, 2.0 * width
    width = 0.5
    while excess(high) > 0 and high < 1000.0:
        low, high, width = high, min(high + width, 1000.0), 2.0 * width
    if not excess(low) * excess(high) < 0:
        return float(np.exp2(low if abs(excess(low)) < abs(excess(high)) else high))
    return float(np.exp2(_falling_root(excess, low, high)))


def _falling_root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function of which both ends are known to differ in sign is 0.

    Regula falsi; the value at an end that stays is halved (the Illinois rule, Dowell and Jarratt,
    BIT 1971), so that both ends close in.
    """
    at_low, at_high = function(low), function(high)
    stayed = 0
    while high - low > 1e-14 * max(1.0, abs(low), abs(high)):
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        if not low < middle < high:
            middle = 0.5 * (low + high)
            if not low < middle < high:
                break
        value = function(middle)
        if value == 0:
            return middle
        if value > 0:
            low, at_low = middle, value
            at_high = at_high / 2 if stayed > 0 else at_high
            stayed = 1
        else:
            high, at_high = middle, value
            at_low = at_low / 2 if stayed < 0 else at_low
            stayed = -1
    return low if abs(at_low) < abs(at_high) else high
