"""Products with the forms and the matrices of a problem: F, its gradient, Hessian products.

Range: powers of two are carried apart. Coefficients are read as mantissa times power of two, each
factor is divided by its largest member, and what was divided out is added back as a logarithm. When
the point moves far from where a matrix was last normalised, the matrix is normalised there again
(:mod:`pathlift.solve.matrix`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from scipy import sparse

from pathlift.solve.matrix import Array, Matrix, both_products, matrix_of, to_numpy
from pathlift.solve.problem import (
    LN2,
    IntArray,
    MatrixBlock,
    Problem,
    Solution,
    check_problem,
)

# Between two normalisations of a matrix its row and column factors may move by this many bits.
_DRIFT_BITS = 400.0


class Objective(Protocol):
    """What a criterion asks of the scales: its value, its solver and its rounding.

    ``largest``: whether entries of one scale count by their largest one, not by their sum.
    ``tol``: the tolerance of its certificate where none is given.
    """

    @property
    def largest(self) -> bool: ...

    @property
    def tol(self) -> float: ...

    def value(self, operator: Operator, point: Array) -> float:
        """What is minimised, at ``point`` ``(H,)``."""
        ...

    def solve(self, operator: Operator, solver: str, tol: float) -> Solution:
        """The best scales within the bounds, float64 ``(H,)``."""
        ...

    def round(self, operator: Operator, point: Array) -> IntArray:
        """Whole scales near ``point`` within the bounds, int64 ``(H,)``."""
        ...

    def imbalance(self, value: float, slant: float, count: int, log_mean: float) -> float:
        """The value as a report says it; 0 is perfect. ``slant``: what makes a sum balanced."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """F at one point with what a Hessian-vector product there needs.

    ``weights``: per form (row, column or single entry), its share of T; ``factors``: per form, the
    shifted power of two; ``levels``: per matrix, what turns ``r M c`` into a share of T;
    ``log2_weights``: per form, the same logarithm also where the share itself underflows;
    ``log2_total``: log2 T; ``mean``: ``(H,)`` the weighted mean exponent ``E^T w``.
    The matrices are kept with the point because a later evaluation may normalise them elsewhere.
    """

    point: Array
    objective: float
    gradient: Array
    mean: Array
    weights: Array
    log2_weights: Array
    log2_total: float
    factors: Array
    levels: Array
    matrices: tuple[Matrix, ...]


@dataclass(frozen=True)
class _Sums:
    """What an evaluation gets from the products; see :class:`Evaluation`."""

    weights: Array
    log2_weights: Array
    log2_total: float
    factors: Array
    levels: Array


@dataclass
class Operator:
    """Products with the stacked forms and the matrices of a problem. ``passes`` counts them.

    Making one reads every matrix, so the solver, the rounding and the report share one.
    ``objective``: what is asked of the scales; F itself where it is None.
    """

    problem: Problem
    objective: Objective | None = None
    passes: int = 0
    centre: Array = field(init=False)
    _values: dict[bytes, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        problem = self.problem
        check_problem(problem)
        h = problem.num_scales
        sources: list[Matrix] = []
        kept: list[MatrixBlock] = []
        for k, block in enumerate(problem.blocks):
            matrix = matrix_of(block.matrix, f"Problem.blocks[{k}].matrix")
            if matrix is not None:
                kept.append(block)
                sources.append(matrix)
        self.blocks = tuple(kept)
        self.sources = tuple(sources)
        values = to_numpy(problem.vector)
        keep = values > 0
        forms = [f for b in kept for f in (_csr(b.rows), _csr(b.cols))]
        lengths = [f.shape[0] for f in forms]
        if keep.any():
            forms.append(_csr(problem.vector_forms)[np.flatnonzero(keep)])
            lengths.append(int(keep.sum()))
        self.has_vector = bool(keep.any())
        stacked = sparse.vstack(forms, format="csr") if forms else sparse.csr_array((0, h))
        self.forms = sparse.csr_array(stacked, dtype=np.float64)
        self.forms.eliminate_zeros()
        self.forms_t = sparse.csr_array(self.forms.T.tocsr())
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._lengths = np.asarray(lengths, dtype=np.int64)
        mantissa, exponent = np.frexp(values[keep])
        self._mantissa = mantissa
        self._vector_exponent = exponent.astype(np.float64)
        self._bound: sparse.csr_array | None = None
        # What coordinate descent and the preconditioner find out once, for them to keep here.
        self.sets: list[IntArray] | None = None
        self.exponents: Any = None
        self.patterns: Any = None
        self._plain_base()

    # -- shape ---------------------------------------------------------------------------------

    @property
    def empty(self) -> bool:
        """Whether T is the constant alone."""
        return not self.has_vector and not self.blocks

    @property
    def coupled(self) -> bool:
        """Whether a row, a column or a single entry has more than one scale."""
        return int(np.diff(self.forms.indptr).max(initial=0)) > 1

    def segments(self, block: int) -> tuple[slice, slice]:
        """Where the row and the column forms of a matrix lie among the stacked forms."""
        a, b, c = (int(x) for x in self._starts[2 * block : 2 * block + 3])
        return slice(a, b), slice(b, c)

    def form_starts(self) -> IntArray:
        """First form of every segment (rows, columns of each matrix, then single entries)."""
        return self._starts

    def vector_segment(self) -> slice:
        """Where the single entries lie among the stacked forms."""
        return slice(int(self._starts[2 * len(self.blocks)]), int(self._starts[-1]))

    # -- normalisation -------------------------------------------------------------------------

    def _plain_base(self) -> None:
        """Use the matrices as they are if their range allows, else normalise them at s = 0."""
        self._carry(np.zeros(self.problem.num_scales), np.zeros(self.forms.shape[0]), self.sources)
        if not all(m.plain for m in self.sources):
            self._normalise(self.centre)

    def _normalise(self, point: Array) -> None:
        """Absorb the integer point nearest to ``point`` in the matrices."""
        centre = np.rint(point)
        shift = -2.0 * (self.forms @ centre)
        parts = [self.segments(b) for b in range(len(self.blocks))]
        matrices = tuple(
            m.normalised(shift[row], shift[col], self.problem.store)
            for m, (row, col) in zip(self.sources, parts, strict=True)
        )
        self._carry(centre, shift, matrices)

    def _carry(self, centre: Array, shift: Array, matrices: tuple[Matrix, ...]) -> None:
        """Take over matrices in which ``centre`` is absorbed; ``shift``: its powers of two."""
        base = shift
        for b, matrix in enumerate(matrices):
            row, col = self.segments(b)
            base[row], base[col] = matrix.rows, matrix.columns
        if self.has_vector:
            base[self.vector_segment()] += self._vector_exponent
        self.centre, self._base, self._matrices = centre, base, matrices

    def _drift(self, moved: Array) -> float:
        """Bits by which the factors of any matrix have left the centre."""
        worst = 0.0
        for b in range(len(self.blocks)):
            row, col = self.segments(b)
            worst = max(worst, float(np.abs(moved[row]).max() + np.abs(moved[col]).max()))
        return 2.0 * worst

    # -- products ------------------------------------------------------------------------------

    def total(self, point: Array) -> float:
        """F at ``point``, by its products if it was evaluated before."""
        found = self._values.get(_key(point))
        return self.evaluate(point).objective if found is None else found

    def evaluate(self, point: Array) -> Evaluation:
        """F, its gradient and the weights of all forms at ``point``: one pair of products."""
        problem, p = self.problem, self.problem.count
        slope = 2.0 * LN2 * problem.linear
        slant = float(slope @ point)
        if self.empty:
            value = p * float(np.log(problem.constant)) if problem.constant > 0 else 0.0
            zero, none = np.zeros(problem.num_scales), np.zeros(self.forms.shape[0])
            return Evaluation(
                point, value + slant, slope.copy(), zero, none, none, -np.inf, none, none, ()
            )
        moved = self.forms @ (point - self.centre)
        if self._drift(moved) > _DRIFT_BITS:
            self._normalise(point)
            moved = self.forms @ (point - self.centre)
        sums = self._sums(self._base - 2.0 * moved)
        mean = self.forms_t @ sums.weights
        objective = p * LN2 * sums.log2_total + slant
        self._values[_key(point)] = objective
        gradient = slope - 2.0 * LN2 * p * mean
        return Evaluation(
            point,
            objective,
            gradient,
            mean,
            sums.weights,
            sums.log2_weights,
            sums.log2_total,
            sums.factors,
            sums.levels,
            self._matrices,
        )

    def _sums(self, exponent: Array) -> _Sums:
        """T and its shares, where every form has the factor ``2^exponent``."""
        k = len(self.blocks)
        tops = np.maximum.reduceat(exponent, self._starts[:-1])
        factors = np.exp2(exponent - np.repeat(tops, self._lengths))
        if self.has_vector:
            factors[self.vector_segment()] *= self._mantissa
        weights = factors.copy()
        parts = [self.segments(b) for b in range(k)]
        products = both_products(
            self._matrices, [(factors[col], factors[row]) for row, col in parts]
        )
        for (row, col), (across, down) in zip(parts, products, strict=True):
            weights[row] *= across
            weights[col] *= down
        self.passes += 1
        # Of every matrix its rows have all of its share, and so have the single entries of theirs.
        spans = [slice(row.start, col.stop) for row, col in parts]
        wholes = [row for row, _ in parts]
        levels = [float(tops[2 * b] + tops[2 * b + 1]) for b in range(k)]
        if self.has_vector:
            spans.append(self.vector_segment())
            wholes.append(self.vector_segment())
            levels.append(float(tops[-1]))
        sums = [float(weights[whole].sum()) for whole in wholes]
        if self.problem.constant > 0:
            sums.append(float(self.problem.constant))
            levels.append(0.0)
        with np.errstate(divide="ignore"):
            magnitudes = np.asarray(levels) + np.log2(np.asarray(sums))
            log2_weights = np.log2(weights)
        top = float(magnitudes.max())
        log2_total = top + float(np.log2(np.exp2(magnitudes - top).sum()))
        shares = np.exp2(np.asarray(levels) - log2_total)
        for span, level, share in zip(spans, levels, shares, strict=False):
            weights[span] *= share
            log2_weights[span] += level - log2_total
        if self.has_vector:  # a single entry never underflows in logarithms
            part = self.vector_segment()
            log2_weights[part] = exponent[part] + np.log2(self._mantissa) - log2_total
        return _Sums(weights, log2_weights, log2_total, factors, shares)

    def hessian_product(self, at: Evaluation, direction: Array) -> Array:
        """``4 ln2^2 p (E^T diag(w) E - (E^T w)(E^T w)^T) direction``: one pair of products."""
        if self.empty:
            return np.zeros_like(direction)
        moved = self.forms @ direction
        out = at.weights * moved
        parts = [self.segments(b) for b in range(len(self.blocks))]
        aimed = at.factors * moved
        products = both_products(at.matrices, [(aimed[col], aimed[row]) for row, col in parts])
        for b, ((row, col), (across, down)) in enumerate(zip(parts, products, strict=True)):
            out[row] += at.levels[b] * at.factors[row] * across
            out[col] += at.levels[b] * at.factors[col] * down
        self.passes += 1
        product = self.forms_t @ out - at.mean * float(at.mean @ direction)
        return np.asarray(4.0 * LN2**2 * self.problem.count * product)

    # -- sums over matrices, for the rank-one model ---------------------------------------------

    def row_sum_bound(self) -> sparse.csr_array:
        """``(H, forms)``: ``|K_fh| sum_h' |K_fh'|``; its product with weights bounds K^T w K."""
        if self._bound is None:
            size = abs(self.forms)
            total = size.sum(axis=1)
            self._bound = sparse.csr_array((size.multiply(total[:, None])).T.tocsr())
        return self._bound

    def counts(self) -> Array:
        """Per form, the number of positive entries in its row or column (1 for single entries)."""
        counts = np.ones(self.forms.shape[0])
        for b, matrix in enumerate(self.sources):
            row, col = self.segments(b)
            r, c = matrix.shape
            counts[row], counts[col] = c, r
            if matrix.has_zeros:
                positive = matrix.positive()
                counts[row], counts[col] = positive.sum(1), positive.sum(0)
        return counts


def operator_of(problem: Problem | Operator) -> Operator:
    """The products of a problem; those that were made already, if they are given."""
    return problem if isinstance(problem, Operator) else Operator(problem)


def objective(problem: Problem | Operator, point: Array) -> float:
    """F at ``point``, without the constant ``-sum log g_i``."""
    return operator_of(problem).total(point)


def gradient(problem: Problem | Operator, point: Array) -> Array:
    """``dF/ds``, ``(H,)``."""
    return operator_of(problem).evaluate(point).gradient


def projected_gradient(problem: Problem, at: Evaluation) -> Array:
    """Gradient with the components removed that push against a bound that is reached."""
    g = at.gradient.copy()
    g[(at.point <= problem.lower) & (g > 0)] = 0.0
    g[(at.point >= problem.upper) & (g < 0)] = 0.0
    return g


def certificate(problem: Problem, at: Evaluation) -> float:
    """``max |projected dF/ds| / p``."""
    g = projected_gradient(problem, at)
    return float(np.abs(g).max(initial=0.0)) / max(problem.count, 1)


def solution(operator: Operator, at: Evaluation, iterations: int, tol: float) -> Solution:
    """Wrap a point with its certificate."""
    norm = certificate(operator.problem, at)
    reason = ""
    if not norm <= tol:
        reason = f"max |dF/ds| / p is {norm:.1e} after {iterations} iterations; asked for {tol:.1e}"
    held = held_scales(operator.problem, at.point, at.gradient)
    return Solution(
        at.point, at.objective, norm, iterations, operator.passes, norm <= tol, reason, held
    )


def held_scales(problem: Problem, point: Array, slope: Array) -> IntArray:
    """Movable scales at a bound that a descent along ``-slope`` would cross."""
    low = (point <= problem.lower) & (slope > 0)
    high = (point >= problem.upper) & (slope < 0)
    return np.flatnonzero((low | high) & (problem.lower < problem.upper)).astype(np.int64)


def _key(point: Array) -> bytes:
    return hashlib.blake2b((point + 0.0).tobytes(), digest_size=16).digest()


def _csr(forms: sparse.csr_array) -> sparse.csr_array:
    return sparse.csr_array(forms, dtype=np.float64)
