"""The convex problem in matrix-vector form.

With log2 scales ``s`` of shape ``(H,)``, entry ``i`` is ``g'_i = g_i 2^{-2 (E s)_i}`` and

    T(s) = constant + sum_i g'_i
    F(s) = count * log T(s) + 2 ln2 * linear . s

Entries come as matrices ``M[o, i] r_o c_i`` with ``r_o = 2^{-2 (rows s)_o}`` and
``c_i = 2^{-2 (cols s)_i}``, and as a vector of entries kept one by one. All row, column and vector
forms are stacked in one sparse matrix ``K``: one evaluation of F and its gradient is ``K s``, one
``M c`` and one ``M^T r`` per matrix, and one ``K^T w``; a Hessian-vector product is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from pathlift.errors import ArgumentError
from pathlift.solve.matrix import Array, Store, check_values, to_numpy
from pathlift.tensors.product import Product

IntArray = NDArray[np.int64]

LN2 = float(np.log(2.0))


@dataclass(frozen=True)
class MatrixBlock:
    """Entries ``matrix[o, i] * 2^{-2 ((rows s)_o + (cols s)_i)}``.

    ``matrix``: ``(R, C)``, non-negative, float32 or float64 (products are float64 in any case), or
    the product of two thin ones.
    ``rows``: ``(R, H)`` and ``cols``: ``(C, H)``, integer exponents, sign included (usually one +1
    per row, one -1 per column).
    """

    matrix: torch.Tensor | Product
    rows: sparse.csr_array
    cols: sparse.csr_array


def as_is(matrix: torch.Tensor) -> torch.Tensor:
    """Keep a matrix where it is."""
    return matrix


@dataclass(frozen=True)
class Problem:
    """Minimise ``F(s)`` over ``lower <= s <= upper``; see the module's formula.

    ``vector``: ``(n,)`` coefficients of single entries with exponent rows ``vector_forms``
    ``(n, H)``. ``linear``: ``(H,)``, the sum of the exponent rows of the counted entries.
    ``lower``, ``upper``: ``(H,)`` in log2 units, may be infinite; a dead channel has both 0.
    ``store``: where a matrix of the solver's own is put (in memory, as it is, by default).
    ``layers``: ``(H,)``; equal numbers hint that scales share no entry (checked before use).
    """

    num_scales: int
    blocks: tuple[MatrixBlock, ...]
    vector: torch.Tensor | Array
    vector_forms: sparse.csr_array
    constant: float
    linear: Array
    count: int
    lower: Array
    upper: Array
    layers: IntArray
    store: Store = as_is


@dataclass(frozen=True)
class Solution:
    """A point and its certificate.

    ``gradient_norm`` is ``max |projected dF/ds| / count``: zero exactly at a minimiser of the
    convex ``F`` within its bounds. ``passes`` counts pairs (one product with every matrix and one
    with every transpose). ``reason``: why it has not converged, empty if it has. ``at_bounds``:
    indices of the scales that would go on if their bound let them.
    """

    log2_scales: Array
    objective: float
    gradient_norm: float
    iterations: int
    passes: int
    converged: bool
    reason: str = ""
    at_bounds: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


def check_problem(problem: Problem) -> None:
    """Refuse shapes that do not fit, crossing bounds and coefficients that are not numbers."""
    h = problem.num_scales
    for name in ("linear", "lower", "upper", "layers"):
        shape = np.shape(getattr(problem, name))
        if shape != (h,):
            raise ArgumentError(
                f"Problem.{name} has shape {shape}; expected ({h},), one value per scale. "
                f"Pass an array of length num_scales."
            )
    if np.any(problem.lower > problem.upper):
        raise ArgumentError(
            "Problem.lower exceeds Problem.upper for some scale; the bounds must not cross. "
            "Use equal bounds to fix a scale."
        )
    if not (np.isfinite(problem.constant) and problem.constant >= 0):
        raise ArgumentError(
            f"Problem.constant is {problem.constant}; expected a finite number >= 0. "
            "Check the criterion for infinite or negative coefficients."
        )
    n = to_numpy(problem.vector)
    if problem.vector_forms.shape != (n.size, h):
        raise ArgumentError(
            f"Problem.vector_forms has shape {problem.vector_forms.shape}; expected "
            f"({n.size}, {h}): one exponent row per entry of Problem.vector."
        )
    check_values("Problem.vector", float(n.min(initial=0.0)), float(n.max(initial=0.0)))
    for k, block in enumerate(problem.blocks):
        r, c = block.matrix.shape
        if block.rows.shape != (r, h) or block.cols.shape != (c, h):
            raise ArgumentError(
                f"Problem.blocks[{k}] has a ({r}, {c}) matrix with rows {block.rows.shape} and "
                f"cols {block.cols.shape}; expected ({r}, {h}) and ({c}, {h})."
            )
