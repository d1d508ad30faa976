"""Entries by the exponent that one scale has in them: what a move of that scale alone changes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from pathlift.solve.matrix import Array
from pathlift.solve.operator import Evaluation, Operator
from pathlift.solve.problem import IntArray


@dataclass(frozen=True)
class Pairs:
    """Matrix entries whose row and column carry the same scale, of one matrix."""

    block: int
    row: IntArray
    col: IntArray
    scale: IntArray
    row_exponent: Array
    col_exponent: Array

    def weights(self, operator: Operator, at: Evaluation) -> Array:
        """Share of T of each entry."""
        row, col = operator.segments(self.block)
        picked = at.matrices[self.block].pick(self.row, self.col)
        scaled = picked * at.factors[row][self.row] * at.factors[col][self.col]
        return np.asarray(at.levels[self.block] * scaled)


@dataclass(frozen=True)
class Exponents:
    """What is found out once per operator.

    ``indicators``: exponent -> ``(H, forms)``, 1 where a form has a scale with it. ``pairs``: the
    entries whose row and column forms both have one and the same scale.
    """

    indicators: dict[float, sparse.csr_array]
    pairs: tuple[Pairs, ...]


def exponents(operator: Operator) -> Exponents:
    """Those of an operator, made at the first call."""
    if operator.exponents is None:
        values = np.unique(operator.forms_t.data)
        indicators = {float(e): _indicator(operator.forms_t, e) for e in values}
        pairs = [_pairs_of(operator, b) for b in range(len(operator.blocks))]
        operator.exponents = Exponents(indicators, tuple(p for p in pairs if p.row.size))
    found: Exponents = operator.exponents
    return found


def shares_by_exponent(operator: Operator, at: Evaluation) -> dict[float, Array]:
    """Per non-zero exponent e: ``(H,)``, the share of T of the entries with E_ih = e."""
    known = exponents(operator)
    h = operator.problem.num_scales
    shares = {e: np.asarray(k @ at.weights) for e, k in known.indicators.items()}
    gross = {e: q.copy() for e, q in shares.items()}
    for pairs in known.pairs:
        weight = pairs.weights(operator, at)
        total = pairs.row_exponent + pairs.col_exponent
        for sign, powers in ((-1, pairs.row_exponent), (-1, pairs.col_exponent), (1, total)):
            for e in np.unique(powers):
                pick = powers == e
                change = np.bincount(pairs.scale[pick], weight[pick], minlength=h)
                shares[float(e)] = shares.get(float(e), np.zeros(h)) + sign * change
    if known.pairs:  # differences of equal numbers leave rounding errors
        for e, q in gross.items():
            shares[e][shares[e] < 1e-13 * q] = 0.0
    shares.pop(0.0, None)
    return shares


def _pairs_of(operator: Operator, b: int) -> Pairs:
    row, col = operator.segments(b)
    rows, cols = operator.forms[row].tocsc(), operator.forms[col].tocsc()
    nr, nc = np.diff(rows.indptr), np.diff(cols.indptr)
    shared = np.flatnonzero((nr > 0) & (nc > 0))
    o, i = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    x, y = [np.zeros(0)], [np.zeros(0)]
    for h in shared:
        ro = slice(rows.indptr[h], rows.indptr[h + 1])
        co = slice(cols.indptr[h], cols.indptr[h + 1])
        o.append(np.repeat(rows.indices[ro], nc[h]))
        x.append(np.repeat(rows.data[ro], nc[h]))
        i.append(np.tile(cols.indices[co], nr[h]))
        y.append(np.tile(cols.data[co], nr[h]))
    scale = np.repeat(shared, nr[shared] * nc[shared]).astype(np.int64)
    place, other = np.concatenate(o).astype(np.int64), np.concatenate(i).astype(np.int64)
    return Pairs(b, place, other, scale, np.concatenate(x), np.concatenate(y))


def _indicator(forms_t: sparse.csr_array, value: float) -> sparse.csr_array:
    out = forms_t.copy()
    out.data = (out.data == value).astype(np.float64)
    out.eliminate_zeros()
    return out
