"""Preconditioned truncated Newton for the rescaling problem.

F is convex and smooth, and its Hessian is ``4 ln2^2 p`` times the covariance of the exponent rows
under the weights ``w_i = g'_i / T``. Each step solves the Newton equations by conjugate gradients.
The preconditioner is the same covariance with every matrix of weights replaced by the product of
its row and column sums (:mod:`pathlift.solve.preconditioner`): it is inverted exactly, and it sees
how whole layers move against each other. What it leaves to conjugate gradients is the difference
between a matrix of weights and its rank-one model, which is small for a dense layer.

The start is the minimiser of the whole problem with rank-one matrices
(:mod:`pathlift.solve.model`), which removes most of a wrong scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from pathlift.solve.coordinate import sweep
from pathlift.solve.matrix import Array, BoolArray, power
from pathlift.solve.model import DAMPING, first_point
from pathlift.solve.operator import Evaluation, Operator, certificate, operator_of, solution
from pathlift.solve.preconditioner import Covariance, Precondition
from pathlift.solve.problem import LN2, Problem, Solution
from pathlift.solve.within import Quadratic, within

# A step changes no form by more than this many bits.
_MAX_FORM_STEP = 40.0
_MAX_CG = 60
# How often scales that a step takes over their bounds are put there.
_ROUNDS = 8
# The error of the scales, in bits per tol, at which a point counts as arrived.
_SETTLED = 30.0
# A step that leaves this part of the slope is worth a look further along its direction.
_STEEP = 0.5
# After this many steps the problem is approached through its square roots.
_PATIENCE = 25


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
    at, used = _descend(operator, first_point(operator, at), tol, min(_PATIENCE, max_iterations))
    norm = certificate(problem, at)
    if norm > tol and (used >= _PATIENCE or norm > 1e-6):
        at = _through_roots(operator, at)
        at, more = _descend(operator, at, tol, max_iterations - used)
        used += more
    return solution(operator, at, used, tol)


def _descend(
    operator: Operator, at: Evaluation, tol: float, iterations: int
) -> tuple[Evaluation, int]:
    """Newton steps (a coordinate sweep where one fails) to ``tol``: the best point, steps taken.

    A scale with a small share of the entries has a small slope also far from its optimum. So the
    steps go on until what the last one left, of second order in it, is below ``_SETTLED`` tol.
    """
    problem = operator.problem
    best = at
    left = np.inf
    for iteration in range(iterations):
        norm = certificate(problem, at)
        if norm <= tol and left <= _SETTLED * tol:
            return at, iteration
        accuracy = max(min(0.1, norm**0.5), min(0.3 * tol / norm, 0.1)) if norm > tol else 1e-3
        trial = _newton_step(operator, at, accuracy)
        if trial is None and norm <= tol:
            return at, iteration
        if trial is None:
            trial = sweep(operator, at)
            if trial.objective >= at.objective and not _better(problem, trial, at):
                return best, iteration
        moved = float(np.abs(operator.forms @ (trial.point - at.point)).max(initial=0.0))
        left = moved * max(accuracy, moved)
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
        operator.passes += lower.passes
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


@dataclass(frozen=True)
class _Hessian:
    """F's own at a point, solved with by conjugate gradients."""

    operator: Operator
    at: Evaluation
    accuracy: float

    def solve(self, residual: Array, free: BoolArray) -> Array:
        """See :class:`pathlift.solve.within.Quadratic`."""
        apply = _covariance(self.operator, self.at, 0.0).inverse(free)
        return _conjugate_gradients(self.operator, self.at, residual, free, apply, self.accuracy)

    def times(self, direction: Array) -> Array:
        """See :class:`pathlift.solve.within.Quadratic`."""
        return self.operator.hessian_product(self.at, direction)


def _covariance(operator: Operator, at: Evaluation, damping: float) -> Covariance:
    """The rank-one model at a point; every entry gets ``damping`` of its weight at the optimum."""
    counts = operator.counts()
    weights = at.weights + damping * counts / max(float(counts.sum()), 1.0)
    return Covariance(operator, weights, at.mean, 4 * LN2**2 * operator.problem.count)


def _models(operator: Operator, at: Evaluation, accuracy: float) -> Iterator[Quadratic]:
    """F's own, then ever more damped ones, for where the one before steps too far."""
    yield _Hessian(operator, at, accuracy)
    for damping in DAMPING:
        yield _covariance(operator, at, damping)


def _newton_step(operator: Operator, at: Evaluation, accuracy: float) -> Evaluation | None:
    """A truncated Newton step on the free scales with a line search; None without progress."""
    problem = operator.problem
    free, snap = _free(problem, at)
    for model in _models(operator, at, accuracy):
        step = model.solve(np.where(free, -at.gradient, 0.0), free)
        size = float(np.abs(operator.forms @ step).max(initial=0.0))
        if size <= _MAX_FORM_STEP:
            room = problem.lower - at.point, problem.upper - at.point
            step = within(step + snap, at.gradient, free, room, model, _ROUNDS)
            return _line_search(operator, at, step)
    return _line_search(operator, at, step * (_MAX_FORM_STEP / size)) if size < np.inf else None


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
    two values of F is all rounding error. The step is shortened by the secant of the slopes, and
    made longer again where the slope has hardly changed: F rises like an exponential function
    behind its minimum, and a secant that starts there falls short of it by far.
    """
    problem = operator.problem
    rounding = 1e-12 * (abs(at.objective) + problem.count)
    step, too_far = 1.0, 1.0
    found = None
    for _ in range(30):
        point = np.clip(at.point + step * direction, problem.lower, problem.upper)
        chord = point - at.point
        slope = float(at.gradient @ chord)
        if not slope < 0:
            return found
        trial = operator.evaluate(point)
        end = float(trial.gradient @ chord)
        falls = trial.objective <= at.objective + 1e-4 * slope and end <= -0.9 * slope
        flat = trial.objective <= at.objective + rounding and end <= -0.8 * slope
        if falls or flat:
            found = trial
            if end > _STEEP * slope or too_far < 2.0 * step:
                return found
            step = (step * too_far) ** 0.5
        elif found is not None:
            return found
        else:
            secant = slope / (slope - end) if np.isfinite(end) else 0.1
            too_far = step
            step *= min(max(secant, 0.05), 0.7)
    return found
