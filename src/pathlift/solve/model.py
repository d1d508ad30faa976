"""The start of the Newton solver: the problem with every matrix of rank one, solved first.

Its evaluation is a few vector operations (no product with a matrix), and it holds what a bad
initial scale does to whole layers, so that few of Newton's own steps are left.

Far from the optimum F is nearly piecewise linear: the largest coefficient alone has a say, and
Newton's method crawls along its edges. So the model is solved for ``g'^power`` with power going to
1 (``F_power = (p / power) log sum g'^power + 2 ln2 linear.s``): for a small power it is the
least-squares problem "make all log g' equal", and each power starts where the one below ended.

What the constants trade (none of them changes the solution, only the way to it):

=============== ======= ========================================= ================================
constant        value   larger                                    smaller
=============== ======= ========================================= ================================
_CLOSE_BITS     20      fewer powers; each harder for Newton      more powers, each a step or two
_CLOSE_SLOPE    1e-4    hands over early: more passes             polishes a model that is not the
                                                                  problem
_STAGES         24      deeper networks reach power 1             stops where bits are thousands
                                                                  apart; Newton's steps go on
_STEPS          8       each power solved better                  a crawl is left sooner
_RISE           1.5     fewer powers where entries stay unequal   safer rise
_MOVES          3       the model is renewed more often           matrices far from rank one are
                                                                  left to Newton
_FAR            48      longer steps, where the model may be      more damping, and a factored
                        wrong                                     matrix for every try
_NEXT           4       a power is left sooner; the next is       a step more of most powers
                        harder
_ROUGH          4       (below power 1) fewer dampings to try     steps nearer to Newton's
DAMPING         1e-5 …  shorter steps, always possible            a channel whose entries all lost
                1e-1                                              their weight has a slope and no
                                                                  curvature: a step of no use
=============== ======= ========================================= ================================
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pathlift.solve.matrix import Array
from pathlift.solve.operator import Evaluation, Operator, certificate
from pathlift.solve.preconditioner import Covariance
from pathlift.solve.problem import LN2
from pathlift.solve.within import within

_CLOSE_BITS = 20.0
_CLOSE_SLOPE = 1e-4
_STAGES = 24
_STEPS = 8
_RISE = 1.5
_MOVES = 3
_FAR = 48.0
_NEXT = 4.0
_ROUGH = 4
# Parts of its weight at the optimum that every entry is given at least, where a step is too long.
DAMPING = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def first_point(operator: Operator, at: Evaluation) -> Evaluation:
    """Move to the minimiser of the rank-one model, at most a few times, while F falls."""
    for _ in range(_MOVES):
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
    """The minimiser of F with every matrix replaced by its rank-one model."""
    problem = operator.problem
    model = _model(operator, at)
    live = model.counts > 0
    if not live.any():
        return at.point
    spread = float(np.ptp(model.logs[live]))
    power = min(1.0, _CLOSE_BITS / max(spread, 1.0))
    d = np.zeros(problem.num_scales)
    level = 0
    for _ in range(_STAGES):
        last = power == 1.0
        for _ in range(_STEPS):
            d, size, level = _model_step(model, d, power, level if last else max(level, _ROUGH))
            if size * power < _FAR / 4:
                level = max(level - 1, 0)
            if size * power < (1.0 if last else _NEXT):
                break
        if last:
            break
        # how unequal the entries must stay decides how fast the power may rise
        moved = operator.forms @ d
        spread = float(np.ptp((model.logs - 2.0 * moved)[live]))
        power = min(1.0, max(_RISE * power, _CLOSE_BITS / max(spread, 1.0)))
    return np.clip(at.point + d, problem.lower, problem.upper)


def _model_step(model: _Model, d: Array, power: float, level: int) -> tuple[Array, float, int]:
    """A damped Newton step of the model: the new displacement, the bits it moved a form by, and
    the damping it took (tried from ``level`` on)."""
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
    dampings = (0.0, *DAMPING)
    for level, damping in list(enumerate(dampings))[level:]:  # noqa: B007, B020
        used = weights + damping * model.counts / max(float(model.counts.sum()), 1.0)
        hessian = Covariance(operator, used, mean, scale)
        step = hessian.solve(-g, free)
        size = float(2.0 * np.abs(operator.forms @ step).max(initial=0.0))
        if size * power <= _FAR:
            room = problem.lower - here, problem.upper - here
            step = within(step, gradient, free, room, hessian, 1)
            break
    if not np.isfinite(size) or size == 0.0:
        return d, 0.0, level
    step *= min(1.0, _FAR / (power * size))
    for _ in range(12):
        new = np.clip(here + step, problem.lower, problem.upper) - model.origin
        if value(new)[0] <= f + 1e-4 * float(g @ (new - d)) + 1e-13 * (abs(f) + p):
            return new, float(2.0 * np.abs(operator.forms @ (new - d)).max(initial=0.0)), level
        step *= 0.4
    return d, 0.0, level
