"""Preconditioned truncated Newton for the rescaling problem.

F is convex and smooth, and its Hessian is ``4 ln2^2 p`` times the covariance of the exponent rows
under the weights ``w_i = g'_i / T``. Each step solves the Newton equations by conjugate gradients.
The preconditioner is the same covariance with every matrix of weights replaced by the product of
its row and column sums: diagonal plus rank two per matrix, so it is inverted exactly, and it sees
how whole layers move against each other. What it leaves to conjugate gradients is the difference
between a matrix of weights and its rank-one model, which is small for a dense layer.

The start: the same structure with counts in place of weights is the least-squares problem "make
all log g' equal", whose solution is taken as the first point if it lowers F.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import linalg, sparse

from pathlift.solve.coordinate import sweep
from pathlift.solve.problem import (
    LN2,
    Array,
    Evaluation,
    Operator,
    Problem,
    Solution,
    certificate,
    solution,
)

# A step changes no form by more than this many bits.
_MAX_FORM_STEP = 40.0
_MAX_CG = 60
_RIDGE = 1e-7

Precondition = Callable[[Array], Array]


def newton(problem: Problem, tol: float = 1e-8, max_iterations: int = 100) -> Solution:
    """Minimise F over the bounds until ``max |projected dF/ds| / p <= tol``."""
    operator = Operator(problem)
    start = np.clip(np.zeros(problem.num_scales), problem.lower, problem.upper)
    at = operator.evaluate(start)
    if problem.count == 0:
        return _linear_only(operator, at, tol)
    if operator.empty or certificate(problem, at) <= tol:
        return solution(operator, at, 0, tol)
    at = _first_point(operator, at)
    best = at
    for iteration in range(max_iterations):
        if certificate(problem, at) <= tol:
            return solution(operator, at, iteration, tol)
        trial = _newton_step(operator, at, tol)
        if trial is None:
            trial = sweep(operator, at)
            if trial.objective >= at.objective and not _better(problem, trial, at):
                return solution(operator, best, iteration, tol)
        at = trial
        if at.objective < best.objective or _better(problem, at, best):
            best = at
    return solution(operator, best, max_iterations, tol)


def _better(problem: Problem, new: Evaluation, old: Evaluation) -> bool:
    """At equal F up to rounding: whether the certificate is smaller."""
    near = new.objective <= old.objective + 1e-11 * (abs(old.objective) + problem.count)
    return near and certificate(problem, new) < certificate(problem, old)


def _linear_only(operator: Operator, at: Evaluation, tol: float) -> Solution:
    """No counted entry: F is linear, its minimiser the bound against the slope, if finite."""
    problem = operator.problem
    bound = np.where(problem.linear > 0, problem.lower, problem.upper)
    point = np.where((problem.linear != 0) & np.isfinite(bound), bound, at.point)
    return solution(operator, operator.evaluate(point), 0, tol)


# -- one step ----------------------------------------------------------------------------------


def _newton_step(operator: Operator, at: Evaluation, tol: float) -> Evaluation | None:
    """A truncated Newton step on the free scales with a line search; None without progress."""
    problem = operator.problem
    free = _free(problem, at)
    g = np.where(free, at.gradient, 0.0)
    norm = certificate(problem, at)
    accuracy = max(min(0.1, norm**0.5), min(0.3 * tol / norm, 0.1))
    apply = preconditioner(
        operator, at.weights, at.mean, free, 4 * LN2**2 * problem.count
    )
    direction = _conjugate_gradients(operator, at, -g, free, apply, accuracy)
    size = float(np.abs(operator.forms @ direction).max(initial=0.0))
    if not np.isfinite(size):
        return None
    if size > _MAX_FORM_STEP:
        direction *= _MAX_FORM_STEP / size
    return _line_search(operator, at, direction)


def _free(
    problem: Problem, at: Evaluation
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Scales not held by a bound: inside, or at a bound with the gradient pointing inwards."""
    near = 1e-9 * (1.0 + np.abs(at.point))
    low = (at.point <= problem.lower + near) & (at.gradient >= 0)
    high = (at.point >= problem.upper - near) & (at.gradient <= 0)
    fixed = problem.lower >= problem.upper
    return np.asarray(~(low | high | fixed))


def _conjugate_gradients(
    operator: Operator,
    at: Evaluation,
    residual: Array,
    free: np.ndarray[tuple[int], np.dtype[np.bool_]],
    apply: Precondition,
    accuracy: float,
) -> Array:
    """Solve ``H d = residual`` on the free scales to relative ``accuracy``.

    Stops at a direction without curvature, so singular Hessians are harmless.
    """
    x = np.zeros_like(residual)
    r = residual.copy()
    z = apply(r)
    rz = float(r @ z)
    if not rz > 0:
        return r / max(float(np.abs(r).max(initial=0.0)), 1e-300)
    stop = accuracy**2 * rz
    d = z
    for k in range(_MAX_CG):
        hd = np.where(free, operator.hessian_product(at, d), 0.0)
        curvature = float(d @ hd)
        if not curvature > 1e-14 * rz:
            return d if k == 0 else x
        step = rz / curvature
        x = x + step * d
        r = r - step * hd
        z = apply(r)
        new = float(r @ z)
        if not new > stop:
            break
        d = z + (new / rz) * d
        rz = new
    return x


def _line_search(
    operator: Operator, at: Evaluation, direction: Array
) -> Evaluation | None:
    """Armijo along the projected path, with the slope at the far end as a guard for rounding.

    On the chord from ``at`` to the trial F is convex, so a slope at the trial that is still
    negative (or at most 0.8 of the first one in size) proves a decrease when the difference of
    two values of F is all rounding error. The step is shortened by the secant of the slopes.
    """
    problem = operator.problem
    rounding = 1e-12 * (abs(at.objective) + problem.count)
    step = 1.0
    for _ in range(30):
        point = np.clip(at.point + step * direction, problem.lower, problem.upper)
        chord = point - at.point
        slope = float(at.gradient @ chord)
        if not slope < 0:
            return None
        trial = operator.evaluate(point)
        end = float(trial.gradient @ chord)
        if trial.objective <= at.objective + 1e-4 * slope and end <= -0.9 * slope:
            return trial
        if trial.objective <= at.objective + rounding and end <= -0.8 * slope:
            return trial
        secant = slope / (slope - end) if np.isfinite(end) else 0.1
        step *= min(max(secant, 0.05), 0.7)
    return None


# -- the rank-one model ------------------------------------------------------------------------


def preconditioner(
    operator: Operator,
    weights: Array,
    mean: Array,
    free: np.ndarray[tuple[int], np.dtype[np.bool_]],
    scale: float,
) -> Precondition:
    """Inverse of ``scale`` times the covariance of exponents under the rank-one model.

    ``weights``: per form. For a matrix with row weights a (sum S) and column weights c the model
    weight of entry (o, i) is ``a_o c_i / S``, so its part of ``E^T diag(w) E`` is
    ``rows^T diag(a) rows + cols^T diag(c) cols + (A C^T + C A^T) / S`` with ``A = rows^T a``,
    ``C = cols^T c``. The first two terms are diagonal when every form has one scale, and are
    replaced by a diagonal above them otherwise. The rest, and ``- mean mean^T``, is of low rank:
    the inverse is the Woodbury formula. Held scales get zero.
    """
    bound = operator.row_sum_bound() @ weights
    top = float(bound.max(initial=0.0))
    diagonal = bound * (1.0 + _RIDGE) + 1e-14 * top
    inverse = np.where(
        free & (diagonal > 0), 1.0 / np.where(diagonal > 0, diagonal, 1.0), 0.0
    )
    blocks = len(operator.blocks)
    if blocks == 0:
        low = sparse.csr_array(mean[None, :])
    else:
        low = sparse.vstack([operator.block_sums(weights), mean[None, :]], format="csr")
    core = np.zeros((2 * blocks + 1, 2 * blocks + 1))
    pair = 2 * np.arange(blocks)
    core[pair, pair + 1] = core[pair + 1, pair] = 1.0
    core[-1, -1] = -1.0
    spread = low.multiply(inverse[None, :]).tocsr()
    core += (spread @ low.T).toarray()
    factor = linalg.lu_factor(core, check_finite=False)
    low_t = sparse.csr_array(spread.T.tocsr())

    def apply(r: Array) -> Array:
        small = linalg.lu_solve(factor, spread @ r, check_finite=False)
        return np.asarray((inverse * r - low_t @ small) / scale)

    return apply


def _first_point(operator: Operator, at: Evaluation) -> Evaluation:
    """The least-squares point if it lowers F, else a sweep of the coordinate solver."""
    problem = operator.problem
    everything = problem.lower < problem.upper
    for _ in range(3):
        step = _least_squares_step(operator, at, everything)
        point = np.clip(at.point + step, problem.lower, problem.upper)
        if not np.all(np.isfinite(point)):
            break
        trial = operator.evaluate(point)
        if not trial.objective < at.objective:
            break
        moved = float(
            np.abs(operator.forms @ (trial.point - at.point)).max(initial=0.0)
        )
        at = trial
        if moved < 8.0:
            break
    return at


def _least_squares_step(
    operator: Operator, at: Evaluation, free: np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> Array:
    """Step towards equal ``log2 g'``: least squares over entries, from row and column sums.

    The logarithm of entry (o, i) is modelled as ``log2 row mean + log2 column mean - log2 mean``,
    its count as ``n_o n_i / n``, so nothing but sums of the weights is needed.
    """
    counts = operator.counts()
    log = np.log2(np.maximum(at.weights, 1e-300) / np.maximum(counts, 1.0))
    pull = counts * log
    total, amount = 0.0, 0.0
    for b in range(len(operator.blocks)):
        row, col = operator.segments(b)
        n = float(counts[row].sum())
        level = float(np.log2(max(float(at.weights[row].sum()), 1e-300) / n))
        row_mean = float(pull[row].sum()) / n
        col_mean = float(pull[col].sum()) / n
        pull[row] += counts[row] * (col_mean - level)
        pull[col] += counts[col] * (row_mean - level)
        total += n * (row_mean + col_mean - level)
        amount += n
    if operator.has_vector:
        part = operator.vector_segment()
        total += float(pull[part].sum())
        amount += float(counts[part].sum())
    pull -= counts * (total / amount)
    share = counts / amount
    mean = operator.forms_t @ share
    right = operator.forms_t @ (pull / amount)
    return 0.5 * preconditioner(operator, share, mean, free, 1.0)(
        np.where(free, right, 0.0)
    )
