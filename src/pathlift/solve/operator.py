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
class _Pairs:
    """Matrix entries whose row and column carry the same scale, of one matrix."""

    block: int
    row: IntArray
    col: IntArray
    scale: IntArray
    row_exponent: Array
    col_exponent: Array


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
        self._pairs: tuple[_Pairs, ...] | None = None
        self._exponents: dict[float, sparse.csr_array] | None = None
        self._bound: sparse.csr_array | None = None
        # What coordinate descent and the preconditioner find out once, for them to keep here.
        self.sets: list[IntArray] | None = None
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
        n = self.forms.shape[0]
        if self.empty:
            value = p * float(np.log(problem.constant)) if problem.constant > 0 else 0.0
            zero, none = np.zeros(problem.num_scales), np.zeros(n)
            return Evaluation(
                point, value + slant, slope.copy(), zero, none, none, -np.inf, none, none, ()
            )
        moved = self.forms @ (point - self.centre)
        if self._drift(moved) > _DRIFT_BITS:
            self._normalise(point)
            moved = self.forms @ (point - self.centre)
        exponent = self._base - 2.0 * moved
        tops = np.maximum.reduceat(exponent, self._starts[:-1])
        factors = np.exp2(exponent - np.repeat(tops, self._lengths))
        weights = np.empty(n)
        sums: list[float] = []
        logs: list[float] = []
        parts = [self.segments(b) for b in range(len(self.blocks))]
        products = both_products(
            self._matrices, [(factors[col], factors[row]) for row, col in parts]
        )
        for b, ((row, col), (across, down)) in enumerate(zip(parts, products, strict=True)):
            weights[row], weights[col] = factors[row] * across, factors[col] * down
            sums.append(float(weights[row].sum()))
            logs.append(float(tops[2 * b] + tops[2 * b + 1]))
        if self.has_vector:
            part = self.vector_segment()
            factors[part] *= self._mantissa
            weights[part] = factors[part]
            sums.append(float(weights[part].sum()))
            logs.append(float(tops[-1]))
        if problem.constant > 0:
            sums.append(float(problem.constant))
            logs.append(0.0)
        self.passes += 1
        levels = np.asarray(logs)
        with np.errstate(divide="ignore"):
            magnitudes = levels + np.log2(np.asarray(sums))
        top = float(magnitudes.max())
        log2_total = top + float(np.log2(np.exp2(magnitudes - top).sum()))
        shares = np.exp2(levels - log2_total)
        with np.errstate(divide="ignore"):
            log2_weights = np.log2(weights)
        for b in range(len(self.blocks)):
            row, col = self.segments(b)
            both = slice(row.start, col.stop)
            weights[both] *= shares[b]
            log2_weights[both] += levels[b] - log2_total
        if self.has_vector:
            part = self.vector_segment()
            k = len(self.blocks)
            weights[part] *= shares[k]
            # a single entry never underflows in logarithms
            log2_weights[part] = exponent[part] + np.log2(self._mantissa) - log2_total
        mean = self.forms_t @ weights
        objective = p * LN2 * log2_total + slant
        self._values[_key(point)] = objective
        gradient = slope - 2.0 * LN2 * p * mean
        return Evaluation(
            point,
            objective,
            gradient,
            mean,
            weights,
            log2_weights,
            log2_total,
            factors,
            shares,
            self._matrices,
        )

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

    def hessian_diagonal(self, at: Evaluation) -> Array:
        """Diagonal of the Hessian, ``(H,)``, exactly."""
        if self.empty:
            return np.zeros(self.problem.num_scales)
        squares = self.forms_t.copy()
        squares.data = squares.data**2
        diagonal = squares @ at.weights
        for pairs in self.pairs_of_one_scale():
            share = self.pair_weights(at, pairs)
            cross = 2.0 * pairs.row_exponent * pairs.col_exponent * share
            diagonal += np.bincount(pairs.scale, cross, minlength=diagonal.size)
        return np.asarray(4.0 * LN2**2 * self.problem.count * (diagonal - at.mean**2))

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

    # -- entries by exponent -------------------------------------------------------------------

    def pairs_of_one_scale(self) -> tuple[_Pairs, ...]:
        """Matrix entries whose row and column forms both contain one and the same scale."""
        if self._pairs is None:
            found = []
            for b in range(len(self.blocks)):
                pairs = self._pairs_of(b)
                if pairs.row.size:
                    found.append(pairs)
            self._pairs = tuple(found)
        return self._pairs

    def _pairs_of(self, b: int) -> _Pairs:
        row, col = self.segments(b)
        rows, cols = self.forms[row].tocsc(), self.forms[col].tocsc()
        nr, nc = np.diff(rows.indptr), np.diff(cols.indptr)
        shared = np.flatnonzero((nr > 0) & (nc > 0))
        o: list[Any] = [np.zeros(0, np.int64)]
        i: list[Any] = [np.zeros(0, np.int64)]
        x: list[Any] = [np.zeros(0)]
        y: list[Any] = [np.zeros(0)]
        for h in shared:
            ro = slice(rows.indptr[h], rows.indptr[h + 1])
            co = slice(cols.indptr[h], cols.indptr[h + 1])
            o.append(np.repeat(rows.indices[ro], nc[h]))
            x.append(np.repeat(rows.data[ro], nc[h]))
            i.append(np.tile(cols.indices[co], nr[h]))
            y.append(np.tile(cols.data[co], nr[h]))
        scale = np.repeat(shared, nr[shared] * nc[shared]).astype(np.int64)
        return _Pairs(
            b,
            np.concatenate(o).astype(np.int64),
            np.concatenate(i).astype(np.int64),
            scale,
            np.concatenate(x),
            np.concatenate(y),
        )

    def pair_weights(self, at: Evaluation, pairs: _Pairs) -> Array:
        """Share of T of each entry in ``pairs``."""
        row, col = self.segments(pairs.block)
        picked = at.matrices[pairs.block].pick(pairs.row, pairs.col)
        scaled = picked * at.factors[row][pairs.row] * at.factors[col][pairs.col]
        return np.asarray(at.levels[pairs.block] * scaled)

    def shares_by_exponent(self, at: Evaluation) -> dict[float, Array]:
        """Per non-zero exponent e: ``(H,)``, the share of T of the entries with E_ih = e."""
        if self._exponents is None:
            values = np.unique(self.forms_t.data)
            self._exponents = {float(e): _indicator(self.forms_t, e) for e in values}
        h = self.problem.num_scales
        shares = {e: np.asarray(k @ at.weights) for e, k in self._exponents.items()}
        gross = {e: q.copy() for e, q in shares.items()}
        for pairs in self.pairs_of_one_scale():
            weight = self.pair_weights(at, pairs)
            total = pairs.row_exponent + pairs.col_exponent
            for sign, exponents in (
                (-1, pairs.row_exponent),
                (-1, pairs.col_exponent),
                (1, total),
            ):
                for e in np.unique(exponents):
                    pick = exponents == e
                    change = np.bincount(pairs.scale[pick], weight[pick], minlength=h)
                    shares[float(e)] = shares.get(float(e), np.zeros(h)) + sign * change
        for e, q in gross.items():
            if self.pairs_of_one_scale():  # differences of equal numbers leave rounding errors
                shares[e][shares[e] < 1e-13 * q] = 0.0
        shares.pop(0.0, None)
        return shares


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


def _indicator(forms_t: sparse.csr_array, value: float) -> sparse.csr_array:
    out = forms_t.copy()
    out.data = (out.data == value).astype(np.float64)
    out.eliminate_zeros()
    return out
