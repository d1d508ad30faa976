"""Preconditioned truncated Newton for the rescaling problem.

F is convex and smooth, and its Hessian is ``4 ln2^2 p`` times the covariance of the exponent rows
under the weights ``w_i = g'_i / T``. Each step solves the Newton equations by conjugate gradients.
The preconditioner is the same covariance with every matrix of weights replaced by the product of
its row and column sums: diagonal plus rank two per matrix, so it is inverted exactly, and it sees
how whole layers move against each other. What it leaves to conjugate gradients is the difference
between a matrix of weights and its rank-one model, which is small for a dense layer.

The start: the whole problem with every matrix replaced by its rank-one model costs no product with
a matrix, so it is solved first (see ``_model_minimiser``), which removes most of a wrong scale.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from scipy.sparse import linalg as _sparse_linalg

from pathlift.solve.coordinate import sweep
from pathlift.solve.matrix import Array, BoolArray, power
from pathlift.solve.problem import (
    LN2,
    Evaluation,
    Operator,
    Problem,
    Solution,
    certificate,
    operator_of,
    solution,
)

# A step changes no form by more than this many bits.
_MAX_FORM_STEP = 40.0
_MAX_CG = 60
# After this many steps the problem is approached through its square roots.
_PATIENCE = 25
_RIDGE = 1e-7
# Entries this near to each other (in bits) count as nearly equal.
_CLOSE_BITS = 12.0
# From this certificate on Newton's own steps are short.
_CLOSE_SLOPE = 1e-4
_MODEL_STAGES = 24
_MODEL_STEPS = 8
_DENSE_CORE = 32
# Entries per scale up to which scales that share a form are taken together: few are filled in.
_SPARSE = 8
# Where a step would be too long, every entry is given at least this part of its weight at the
# optimum: a channel whose entries all lost their weight has a slope and no curvature.
_DAMPING = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)

Precondition = Callable[[Array], Array]


def newton(problem: Problem | Operator, tol: float = 1e-8, max_iterations: int = 100) -> Solution:
    """Minimise F over the bounds until ``max |projected dF/ds| / p <= tol``."""
    operator = operator_of(problem)
    problem = operator.problem
    start = np.clip(np.zeros(problem.num_scales), problem.lower, problem.upper)
    at = operator.evaluate(start)
    if problem.count == 0:
        return _linear_only(operator, at, tol)
    if operator.empty or certificate(problem, at) <= tol:
        return solution(operator, at, 0, tol)
    at, used = _descend(operator, _first_point(operator, at), tol, min(_PATIENCE, max_iterations))
    norm = certificate(problem, at)
    if norm > tol and (used >= _PATIENCE or norm > 1e-6):
        at = _through_roots(operator, at)
        at, more = _descend(operator, at, tol, max_iterations - used)
        used += more
    return solution(operator, at, used, tol)


def _descend(
    operator: Operator, at: Evaluation, tol: float, iterations: int
) -> tuple[Evaluation, int]:
    """Newton steps (a coordinate sweep where one fails) to ``tol``: the best point, steps taken."""
    problem = operator.problem
    best = at
    for iteration in range(iterations):
        if certificate(problem, at) <= tol:
            return at, iteration
        trial = _newton_step(operator, at, tol)
        if trial is None:
            trial = sweep(operator, at)
            if trial.objective >= at.objective and not _better(problem, trial, at):
                return best, iteration
        at = trial
        if at.objective < best.objective or _better(problem, at, best):
            best = at
    return best, iterations


def _through_roots(operator: Operator, at: Evaluation) -> Evaluation:
    """A better point from the problem of the square roots, solved first.

    With ``u = power * s``, ``(p / power) log sum g'^power + 2 ln2 linear.s`` is ``1 / power`` times
    F in u with coefficients ``g^power``: the same kind of problem with logarithms ``power`` times
    as far apart. Each problem starts from twice the solution of the one below; the lowest, with
    everything nearly equal, is easy.
    """
    problem = operator.problem
    spread = float(np.ptp(at.log2_weights[np.isfinite(at.log2_weights)]))
    halvings = int(np.ceil(np.log2(max(spread, 2.0))))
    point = np.zeros(problem.num_scales)
    for k in range(halvings, 0, -1):
        lower = Operator(_power(problem, 0.5**k))
        bounded = np.clip(2.0 * point, lower.problem.lower, lower.problem.upper)
        point = _descend(lower, lower.evaluate(bounded), 1e-4, _PATIENCE)[0].point
        operator.pairs += lower.pairs
    trial = operator.evaluate(np.clip(2.0 * point, problem.lower, problem.upper))
    return trial if trial.objective < at.objective else at


def _power(problem: Problem, exponent: float) -> Problem:
    """The problem with coefficients ``g^exponent`` and scales ``exponent`` times as large."""
    blocks = tuple(replace(b, matrix=power(b.matrix, exponent)) for b in problem.blocks)
    return replace(
        problem,
        blocks=blocks,
        vector=torch.as_tensor(problem.vector).double() ** exponent,
        constant=problem.constant**exponent,
        lower=problem.lower * exponent,
        upper=problem.upper * exponent,
    )


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
    free, snap = _free(problem, at)
    g = np.where(free, at.gradient, 0.0)
    norm = certificate(problem, at)
    accuracy = max(min(0.1, norm**0.5), min(0.3 * tol / norm, 0.1))
    scale = 4 * LN2**2 * problem.count
    apply = preconditioner(operator, at.weights, at.mean, free, scale)
    direction = _conjugate_gradients(operator, at, -g, free, apply, accuracy)
    size = float(np.abs(operator.forms @ direction).max(initial=0.0))
    if not size <= _MAX_FORM_STEP:
        counts = operator.counts()
        for damping in _DAMPING:
            damped = at.weights + damping * counts / max(float(counts.sum()), 1.0)
            direction = -preconditioner(operator, damped, at.mean, free, scale)(g)
            size = float(np.abs(operator.forms @ direction).max(initial=0.0))
            if size <= _MAX_FORM_STEP:
                break
    if not np.isfinite(size):
        return None
    if size > _MAX_FORM_STEP:
        direction *= _MAX_FORM_STEP / size
    return _line_search(operator, at, direction + snap)


def _free(problem: Problem, at: Evaluation) -> tuple[BoolArray, Array]:
    """Scales not held by a bound, and the step that puts the held ones on their bound.

    Held: at a bound, or a rounding error away from it, with the slope pointing outwards.
    """
    near = 1e-9 * (1.0 + np.abs(at.point))
    low = (at.point <= problem.lower + near) & (at.gradient >= 0)
    high = (at.point >= problem.upper - near) & (at.gradient <= 0)
    step = np.where(low, problem.lower - at.point, np.where(high, problem.upper - at.point, 0.0))
    return np.asarray(~(low | high | (problem.lower >= problem.upper))), step


def _conjugate_gradients(
    operator: Operator,
    at: Evaluation,
    residual: Array,
    free: BoolArray,
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


def _line_search(operator: Operator, at: Evaluation, direction: Array) -> Evaluation | None:
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
    free: BoolArray,
    scale: float,
) -> Precondition:
    """Inverse of ``scale`` times the covariance of exponents under the rank-one model.

    ``weights``: per form. For a matrix with row weights a (sum S) and column weights c the model
    weight of entry (o, i) is ``a_o c_i / S``, so its part of ``E^T diag(w) E`` is
    ``rows^T diag(a) rows + cols^T diag(c) cols + (A C^T + C A^T) / S`` with ``A = rows^T a``,
    ``C = cols^T c``. The first two terms, and single entries, are diagonal when every form has one
    scale. Where forms have several, as single entries of chains of depthwise convolutions do, they
    are a sparse matrix that is factored, or else are replaced by a diagonal above them. The rest,
    and ``- mean mean^T``, is of low rank: the inverse is the Woodbury formula. Held scales get
    zero.
    """
    blocks = len(operator.blocks)
    small = 2 * blocks + 1 <= _DENSE_CORE
    inverse = _local_inverse(operator, weights, free, small)
    pair = 2 * np.arange(blocks)
    row = np.concatenate([pair, pair + 1, [2 * blocks]])
    col = np.concatenate([pair + 1, pair, [2 * blocks]])
    swap = np.ones(2 * blocks + 1)
    swap[-1] = -1.0
    sums = operator.block_sums(weights)
    if small:
        dense = np.concatenate([sums.toarray(), mean[None, :]])
        spread = inverse(dense.T).T
        core = spread @ dense.T
        core[row, col] += swap
        core_inverse = np.linalg.pinv(core)
        return lambda r: np.asarray(
            (inverse(r) - (core_inverse @ (spread @ r)) @ spread) / scale, dtype=np.float64
        )
    low = sparse.csr_array(sparse.vstack([sums, mean[None, :]], format="csr"))
    thin = sparse.csr_array(low.multiply(inverse(np.ones(free.size))[None, :]))
    thin_t = sparse.csr_array(thin.T.tocsr())
    solve = _core_solver(sparse.csc_array((swap, (row, col)), shape=(row.size,) * 2) + thin @ low.T)

    def apply(r: Array) -> Array:
        return np.asarray((inverse(r) - thin_t @ solve(thin @ r)) / scale)

    return apply


def _local_inverse(
    operator: Operator, weights: Array, free: BoolArray, coupled: bool
) -> Precondition:
    """Inverse of ``forms^T diag(weights) forms`` on the free scales, or of a diagonal above it.

    ``coupled``: several scales of one form may be taken together. The result maps ``(H,)`` or
    ``(H, n)``.
    """
    if coupled and operator.coupled:
        local = sparse.csr_array(operator.forms_t @ sparse.diags_array(weights) @ operator.forms)
        diagonal = local.diagonal()
        top = float(diagonal.max(initial=0.0))
        kept = np.flatnonzero(free & (diagonal > 0))
        if kept.size > 0 and local.nnz <= _SPARSE * kept.size:
            ridge = sparse.diags_array(_RIDGE * diagonal + 1e-14 * top)
            square = sparse.csc_array(sparse.csr_array(local + ridge)[kept][:, kept])
            with suppress(RuntimeError):  # singular in spite of the ridge
                factors = _sparse_linalg.splu(
                    square,
                    permc_spec="MMD_AT_PLUS_A",
                    diag_pivot_thresh=0.0,
                    options={"SymmetricMode": True},
                )

                def factored(r: Array) -> Array:
                    out = np.zeros_like(r)
                    out[kept] = factors.solve(np.ascontiguousarray(r[kept]))
                    return out

                return factored
    bound = operator.row_sum_bound() @ weights
    top = float(bound.max(initial=0.0))
    above = bound * (1.0 + _RIDGE) + 1e-14 * top
    inverse = np.where(free & (above > 0), 1.0 / np.where(above > 0, above, 1.0), 0.0)
    return lambda r: inverse * r if r.ndim == 1 else inverse[:, None] * r


def _core_solver(core: sparse.csc_array) -> Precondition:
    """Solve with the core of many matrices: sparse, since only neighbours share a scale."""
    try:
        return _sparse_linalg.splu(core.tocsc()).solve
    except RuntimeError:  # exactly singular
        inverse = np.linalg.pinv(core.toarray())
        return lambda r: np.asarray(inverse @ r)


def _first_point(operator: Operator, at: Evaluation) -> Evaluation:
    """Move to the minimiser of the rank-one model, at most a few times, while F falls."""
    for _ in range(3):
        point = _model_minimiser(operator, at)
        if not np.all(np.isfinite(point)):
            break
        trial = operator.evaluate(point)
        if not trial.objective < at.objective:
            break
        moved = float(np.abs(operator.forms @ (trial.point - at.point)).max(initial=0.0))
        at = trial
        # Without matrices the model is the problem itself, so one time is enough.
        if moved < _CLOSE_BITS or certificate(operator.problem, at) < _CLOSE_SLOPE:
            break
    return at


@dataclass(frozen=True)
class _Model:
    """Entry (o, i) of matrix b: count ``n_o n_i / n_b``, log2 value ``x_o + y_i - level_b``.

    ``logs`` and ``counts``: per form, x, y and the single entries; ``levels`` and ``amounts``: per
    matrix; ``constant``: log2 of the constant. All values are shares of T at ``origin``.
    """

    operator: Operator
    origin: Array
    logs: Array
    counts: Array
    levels: Array
    amounts: Array
    constant: float

    def weights(self, moved: Array, power: float) -> tuple[float, Array]:
        """``log2 sum n g'^power`` and the share of each form; ``moved``: forms times the step."""
        op = self.operator
        exponent = power * (self.logs - 2.0 * moved) + np.log2(np.maximum(self.counts, 1e-300))
        exponent[self.counts == 0] = -np.inf
        starts = op.form_starts()
        lengths = np.diff(starts)
        tops = np.maximum.reduceat(exponent, starts[:-1])
        tops = np.where(np.isfinite(tops), tops, 0.0)
        shares = np.exp2(exponent - np.repeat(tops, lengths))
        with np.errstate(divide="ignore"):
            sums = np.log2(np.add.reduceat(shares, starts[:-1])) + tops
        b = len(op.blocks)
        totals = sums[0 : 2 * b : 2] + sums[1 : 2 * b : 2] - power * self.levels
        totals -= np.log2(np.maximum(self.amounts, 1.0))
        pieces = np.concatenate([totals, sums[2 * b :], [power * self.constant]])
        top = float(pieces.max())
        log2_total = top + float(np.log2(np.exp2(pieces - top).sum()))
        part = np.concatenate([np.repeat(totals, 2), sums[2 * b :]])
        with np.errstate(invalid="ignore"):
            scale = np.exp2(np.where(np.isfinite(part), part - log2_total - (sums - tops), -np.inf))
        return log2_total, shares * np.repeat(scale, lengths)


def _model(operator: Operator, at: Evaluation) -> _Model:
    counts = np.where(np.isfinite(at.log2_weights), operator.counts(), 0.0)
    live = counts > 0
    logs = np.where(live, at.log2_weights, 0.0) - np.log2(np.maximum(counts, 1.0))
    levels, amounts = np.zeros(len(operator.blocks)), np.zeros(len(operator.blocks))
    for b in range(len(operator.blocks)):
        row, _ = operator.segments(b)
        amounts[b] = n = float(counts[row].sum())
        if n > 0:
            top = float(at.log2_weights[row].max())
            mass = float(np.exp2(at.log2_weights[row] - top).sum())
            levels[b] = top + float(np.log2(mass / n))
    constant = operator.problem.constant
    share = float(np.log2(constant)) - at.log2_total if constant > 0 else -np.inf
    return _Model(operator, at.point, logs, counts, levels, amounts, share)


def _model_minimiser(operator: Operator, at: Evaluation) -> Array:
    """Minimise F with every matrix replaced by its rank-one model: no product with a matrix.

    Far from the optimum F is nearly piecewise linear and Newton's method is slow, so the model is
    solved for ``g'^power`` with power going to 1: ``F_power = (p / power) log sum g'^power + 2 ln2
    linear.s``. For a small power it is the least-squares problem "make all log g' equal".
    """
    problem = operator.problem
    model = _model(operator, at)
    live = model.counts > 0
    if not live.any():
        return at.point
    spread = float(np.ptp(model.logs[live]))
    power = min(1.0, _CLOSE_BITS / max(spread, 1.0))
    d = np.zeros(problem.num_scales)
    for _ in range(_MODEL_STAGES):
        for _ in range(_MODEL_STEPS):
            new, size = _model_step(model, d, power)
            d = new
            if size * power < (1.0 if power == 1.0 else 2.0):
                break
        if power == 1.0:
            break
        # how unequal the entries must stay decides how fast the power may rise
        moved = operator.forms @ d
        spread = float(np.ptp((model.logs - 2.0 * moved)[live]))
        power = min(1.0, max(1.5 * power, _CLOSE_BITS / max(spread, 1.0)))
    return np.clip(at.point + d, problem.lower, problem.upper)


def _model_step(model: _Model, d: Array, power: float) -> tuple[Array, float]:
    """A damped Newton step of the model: the new displacement and the bits it moved a form by."""
    operator, problem = model.operator, model.operator.problem
    p = problem.count

    def value(at: Array) -> tuple[float, Array]:
        log2_total, weights = model.weights(operator.forms @ at, power)
        f = p * LN2 / power * log2_total + 2 * LN2 * float(problem.linear @ at)
        return f, weights

    f, weights = value(d)
    mean = operator.forms_t @ weights
    gradient = 2 * LN2 * (problem.linear - p * mean)
    here = model.origin + d
    low = (here <= problem.lower) & (gradient >= 0)
    high = (here >= problem.upper) & (gradient <= 0)
    free = ~(low | high | (problem.lower >= problem.upper))
    g = np.where(free, gradient, 0.0)
    scale = 4 * LN2**2 * p * power
    for damping in (0.0, *_DAMPING):
        used = weights + damping * model.counts / max(float(model.counts.sum()), 1.0)
        step = -preconditioner(operator, used, mean, free, scale)(g)
        size = float(2.0 * np.abs(operator.forms @ step).max(initial=0.0))
        if size * power <= 4.0 * _CLOSE_BITS:
            break
    if not np.isfinite(size) or size == 0.0:
        return d, 0.0
    step *= min(1.0, 4.0 * _CLOSE_BITS / (power * size))
    for _ in range(12):
        new = np.clip(here + step, problem.lower, problem.upper) - model.origin
        if value(new)[0] <= f + 1e-4 * float(g @ (new - d)) + 1e-13 * (abs(f) + p):
            return new, float(2.0 * np.abs(operator.forms @ (new - d)).max(initial=0.0))
        step *= 0.4
    return d, 0.0
