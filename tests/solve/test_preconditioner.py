"""The preconditioner against the dense inverse of the model that it stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from pathlift.solve.operator import Operator
from pathlift.solve.patterns import patterns
from pathlift.solve.preconditioner import preconditioner
from pathlift.solve.problem import MatrixBlock, Problem


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
    apply = preconditioner(operator, at.weights, at.mean, free, 3.0)
    r = rng.standard_normal(12)
    expected = np.zeros(12)
    model = dense(operator, at.weights, at.mean)[np.ix_(free, free)]
    expected[free] = np.linalg.solve(3.0 * model, r[free])
    np.testing.assert_allclose(apply(r), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    # Other weights fill the same patterns.
    other = operator.evaluate(rng.standard_normal(12))
    again = preconditioner(operator, other.weights, other.mean, free, 3.0)
    model = dense(operator, other.weights, other.mean)[np.ix_(free, free)]
    expected[free] = np.linalg.solve(3.0 * model, r[free])
    np.testing.assert_allclose(again(r), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
