"""The preconditioner against the dense inverse of the model that it stands for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.optimize import minimize

from pathlift.solve.operator import Operator
from pathlift.solve.patterns import patterns
from pathlift.solve.preconditioner import Covariance
from pathlift.solve.problem import MatrixBlock, Problem
from pathlift.solve.within import within


def problem(coupled: bool, seed: int) -> Problem:
    """Two matrices and single entries; coupled: rows and entries of two scales, a hub among them."""
    rng = np.random.default_rng(seed)
    h = 12
    eye = sparse.csr_array(sparse.eye_array(h))
    hub = sparse.csr_array(sparse.vstack([eye[11:12]] * 4)) * float(coupled)
    blocks = (
        MatrixBlock(
            torch.from_numpy(rng.uniform(0.1, 2, (4, 3))),
            sparse.csr_array(eye[:4] + hub),
            -eye[4:7],
        ),
        MatrixBlock(
            torch.from_numpy(rng.uniform(0.1, 2, (4, 4))),
            eye[7:11],
            sparse.csr_array(-eye[:4] - hub),
        ),
    )
    chain = [eye[4:6] - 2.0 * eye[5:7]] if coupled else []
    forms = sparse.csr_array(sparse.vstack([eye, -eye, *chain]))
    free = np.full(h, np.inf)
    counts = forms.shape[0] + 28
    linear, zeros = np.zeros(h), np.zeros(h, dtype=np.int64)
    return Problem(
        h, blocks, rng.uniform(0.1, 2, forms.shape[0]), forms, 0.0, linear, counts, -free, free, zeros
    )  # fmt: skip


def dense(operator: Operator, weights: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """``E^T diag(w) E - mean mean^T`` with every matrix of weights the product of its sums."""
    forms = operator.forms.toarray()
    total = (forms.T * weights) @ forms - np.outer(mean, mean)
    for b in range(len(operator.blocks)):
        row, col = operator.segments(b)
        a, c = forms[row].T @ weights[row], forms[col].T @ weights[col]
        total += (np.outer(a, c) + np.outer(c, a)) / weights[row].sum()
    return total


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_inverse_of_the_rank_one_model(coupled: bool, held: bool, seed: int) -> None:
    operator = Operator(problem(coupled, seed))
    rng = np.random.default_rng(seed)
    at = operator.evaluate(rng.standard_normal(12))
    free = np.ones(12, dtype=bool)
    if held:
        free[[1, 5, 11]] = False
    assert (patterns(operator).inner is not None) == coupled
    apply = Covariance(operator, at.weights, at.mean, 3.0).inverse(free)
    r = rng.standard_normal(12)
    expected = np.zeros(12)
    model = dense(operator, at.weights, at.mean)[np.ix_(free, free)]
    expected[free] = np.linalg.solve(3.0 * model, r[free])
    np.testing.assert_allclose(apply(r), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    d = rng.standard_normal(12)
    whole = 3.0 * dense(operator, at.weights, at.mean) @ d
    found = Covariance(operator, at.weights, at.mean, 3.0).times(d)
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-12 * np.abs(whole).max())
    # Other weights fill the same patterns.
    other = operator.evaluate(rng.standard_normal(12))
    again = Covariance(operator, other.weights, other.mean, 3.0).inverse(free)
    model = dense(operator, other.weights, other.mean)[np.ix_(free, free)]
    expected[free] = np.linalg.solve(3.0 * model, r[free])
    np.testing.assert_allclose(again(r), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def parts(number: int) -> Problem:
    """So many times the matrices above, each with a hub of its own."""
    one = problem(True, 0)
    h = one.num_scales

    def place(forms: sparse.csr_array, k: int) -> sparse.csr_array:
        row = sparse.coo_array(([1], ([0], [k])), shape=(1, number))
        return sparse.csr_array(sparse.kron(row, forms))

    blocks = tuple(
        replace(b, rows=place(b.rows, k), cols=place(b.cols, k))
        for k in range(number)
        for b in one.blocks
    )
    free = np.full(number * h, np.inf)
    return replace(
        one,
        num_scales=number * h,
        blocks=blocks,
        vector=np.tile(one.vector, number),
        vector_forms=sparse.csr_array(
            sparse.vstack([place(one.vector_forms, k) for k in range(number)])
        ),
        linear=np.zeros(number * h),
        count=number * one.count,
        lower=-free,
        upper=free,
        layers=np.zeros(number * h, dtype=np.int64),
    )


@pytest.mark.parametrize("held", [0, 23])
def test_parts_that_do_not_meet_are_solved_for_together(held: int) -> None:
    """Above a few rows a vector for each of them was most of a solve (cait: 49 vectors, now 3)."""
    operator = Operator(parts(5))
    h = operator.problem.num_scales
    meetings = patterns(operator).meetings
    assert meetings is not None and meetings.vectors < 2 * 5
    rng = np.random.default_rng(0)
    at = operator.evaluate(rng.standard_normal(h))
    free = np.ones(h, dtype=bool)
    free[:held] = False
    r = rng.standard_normal(h)
    model = dense(operator, at.weights, at.mean)[np.ix_(free, free)]
    expected = np.zeros(h)
    expected[free] = np.linalg.solve(model, r[free])
    found = Covariance(operator, at.weights, at.mean, 1.0).solve(r, free)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


class Chain:
    """Neighbours tied a thousand times as strongly as each is to its place."""

    def __init__(self, size: int) -> None:
        steps = np.diff(np.eye(size), axis=0)
        self.matrix = 1e3 * steps.T @ steps + np.eye(size)

    def solve(self, residual: np.ndarray, free: np.ndarray) -> np.ndarray:
        out = np.zeros_like(residual)
        out[free] = np.linalg.solve(self.matrix[np.ix_(free, free)], residual[free])
        return out

    def times(self, direction: np.ndarray) -> np.ndarray:
        return self.matrix @ direction


@pytest.mark.parametrize("seed", range(5))
def test_a_step_that_meets_bounds_goes_far_down_within_them(seed: int) -> None:
    """Cut off instead, it goes up: what is tied to a held scale moved on without it."""
    size, rng = 40, np.random.default_rng(seed)
    chain, gradient = Chain(size), -rng.uniform(0.5, 2, size)
    low, high = np.full(size, -5.0), np.full(size, 5.0)
    tight = rng.choice(size, 3, replace=False)
    high[tight] = rng.uniform(0.05, 0.3, 3)
    free = np.ones(size, dtype=bool)

    def value(step: np.ndarray) -> float:
        return float(gradient @ step + step @ chain.times(step) / 2)

    newton = chain.solve(-gradient, free)
    found = within(newton, gradient, free, (low, high), chain, 8)
    assert (low <= found).all() and (found <= high).all()
    best = minimize(
        value, 0 * low, jac=lambda d: gradient + chain.times(d), method="L-BFGS-B",
        bounds=list(zip(low, high, strict=True)), options={"maxiter": 5000, "ftol": 1e-15},
    ).fun  # fmt: skip
    assert value(found) <= 0.8 * best
    assert value(np.clip(newton, low, high)) > 0
