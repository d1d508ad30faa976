"""The solvers against the definition of F, written out entry by entry."""

from __future__ import annotations

import importlib.util
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import minimize

from pathlift.errors import ArgumentError
from pathlift.solve import (
    MatrixBlock,
    Problem,
    coordinate_descent,
    gradient,
    newton,
    objective,
    round_scales,
    solve,
)
from pathlift.solve.coordinate import best_moves, independent_sets
from pathlift.solve.exponents import shares_by_exponent
from pathlift.solve.operator import Operator

_spec = importlib.util.spec_from_file_location("solve_dense", Path(__file__).parent / "dense.py")
dense = importlib.util.module_from_spec(_spec)
sys.modules["solve_dense"] = dense
_spec.loader.exec_module(dense)

seeds = st.integers(0, 10**6)
flags = st.booleans()
few = settings(max_examples=60, deadline=None)


@few
@given(seeds, flags, flags)
def test_objective_gradient_and_hessian_are_those_of_the_definition(seed, general, extreme):
    problem = dense.random_problem(seed, general=general, extreme=extreme)
    definition = dense.enumerate_entries(problem)
    rng = np.random.default_rng(seed)
    for reach in (1.0, 300.0):
        s = rng.uniform(-reach, reach, problem.num_scales)
        value = definition.objective(s)
        assert objective(problem, s) == pytest.approx(value, rel=1e-11, abs=1e-9)
        scale = max(problem.count, 1)
        np.testing.assert_allclose(
            gradient(problem, s), definition.gradient(s), atol=1e-9 * scale, rtol=1e-9
        )
        operator = Operator(problem)
        at = operator.evaluate(s)
        hessian = definition.hessian(s)
        d = rng.standard_normal(problem.num_scales)
        np.testing.assert_allclose(
            operator.hessian_product(at, d), hessian @ d, atol=1e-8 * scale, rtol=1e-8
        )


@few
@given(seeds, flags)
def test_shares_by_exponent(seed, general):
    problem = dense.random_problem(seed, general=general)
    definition = dense.enumerate_entries(problem)
    s = np.random.default_rng(seed).standard_normal(problem.num_scales)
    operator = Operator(problem)
    shares = shares_by_exponent(operator, operator.evaluate(s))
    w = definition.weights(s)
    for e in range(-4, 5):
        if e:
            expected = (definition.exponents == e).T @ w
            np.testing.assert_allclose(shares.get(float(e), 0.0 * s), expected, atol=1e-12)


@few
@given(seeds, flags)
def test_independent_sets_share_no_entry_and_cover_all(seed, general):
    problem = dense.random_problem(seed, general=general)
    sets = independent_sets(Operator(problem))
    assert sorted(np.concatenate(sets)) == list(range(problem.num_scales))
    used = dense.enumerate_entries(problem).exponents != 0
    for members in sets:
        assert (used[:, members].sum(axis=1) <= 1).all()


def reference_minimum(problem):
    definition = dense.enumerate_entries(problem)
    low = np.clip(problem.lower, -1e3, None)
    high = np.clip(problem.upper, None, 1e3)
    best = None
    start = np.clip(np.zeros(problem.num_scales), low, high)
    for _ in range(4):
        found = minimize(
            definition.objective, start, jac=definition.gradient, method="L-BFGS-B",
            bounds=list(zip(low, high, strict=True)),
            options={"maxiter": 5000, "maxfun": 10**5, "ftol": 1e-16, "gtol": 1e-10},
        )  # fmt: skip
        best, start = found.fun, found.x
    return best


@few
@given(seeds, flags, flags, st.sampled_from(["newton", "coordinate"]))
def test_minimum_is_that_of_a_dense_optimiser(seed, general, bounded, solver):
    problem = dense.random_problem(seed, general=general, bounded=bounded)
    found = solve(problem, solver=solver, tol=1e-9)
    assert found.converged and found.gradient_norm <= 1e-9
    assert (problem.lower <= found.log2_scales).all()
    assert (found.log2_scales <= problem.upper).all()
    definition = dense.enumerate_entries(problem)
    assert definition.objective(found.log2_scales) == pytest.approx(found.objective, abs=1e-8)
    reference = reference_minimum(problem)
    assert found.objective <= reference + 1e-8 * max(1.0, abs(reference))


@few
@given(seeds, flags)
def test_extreme_coefficients_stay_finite_and_converge(seed, general):
    problem = dense.random_problem(seed, general=general, extreme=True)
    start = objective(problem, np.zeros(problem.num_scales))
    found = newton(problem, tol=1e-8)
    assert np.isfinite(found.log2_scales).all() and np.isfinite(found.gradient_norm)
    assert found.objective <= start + 1e-9 * abs(start)
    # forms of several scales with exponents up to 4 over 1200 bits may stop short, never wrong
    assert found.converged or general


def test_newton_and_coordinate_agree_on_an_mlp():
    problem = dense.mlp([20, 30, 10, 25, 5], spread=2.0)
    a, b = newton(problem, 1e-11), coordinate_descent(problem, 1e-11)
    assert a.converged and b.converged
    np.testing.assert_allclose(a.log2_scales, b.log2_scales, atol=1e-6)
    assert a.objective == pytest.approx(b.objective, rel=1e-12)


def test_bounds_are_active_and_certified():
    problem = dense.mlp([8, 12, 6, 9, 3], spread=3.0, bound=0.5)
    a, b = newton(problem, 1e-10), coordinate_descent(problem, 1e-10)
    assert a.converged and b.converged
    assert (np.abs(a.log2_scales) == 0.5).any()
    assert a.objective == pytest.approx(b.objective, rel=1e-11)


def test_one_channel_takes_the_published_root():
    enter, leave, rest, a, p = 0.3, 0.05, 0.65, 3, 9
    move = best_moves(
        np.array([1.0, -1.0]), np.array([[enter], [leave]]), np.array([a / p]),
        np.array([-np.inf]), np.array([np.inf]),
    )  # fmt: skip
    roots = np.roots([leave * (p + a), a * rest, enter * (a - p)])
    assert 4.0 ** move[0] == pytest.approx(roots[roots > 0][0], rel=1e-12)


@few
@given(seeds, flags)
def test_the_joint_move_is_the_minimum_over_the_set(seed, bounded):
    rng = np.random.default_rng(seed)
    m = int(rng.integers(1, 5))
    shares = rng.dirichlet(np.ones(2 * m + 1))[: 2 * m].reshape(2, m)
    slope = rng.uniform(-0.9, 0.9, m) / m
    low = np.full(m, -0.3 if bounded else -50.0)
    exponents = np.array([-1.0, 1.0])
    move = best_moves(exponents, shares, slope, low, -low)
    rest = 1 - shares.sum()

    def f(d):
        total = rest + (shares * 4.0 ** (-exponents[:, None] * d)).sum()
        return np.log(total) + 2 * np.log(2) * slope @ d

    for _ in range(50):
        other = np.clip(move + rng.normal(0, 10.0 ** rng.uniform(-4, 0), m), low, -low)
        assert f(move) <= f(other) + 1e-12


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pattern", ["alternating", "ramp", "random"])
def test_a_hundred_layers_of_wrong_scales(pattern, bias):
    draw = np.random.default_rng(0).choice([-12.0, 12.0], 100)
    scale = {
        "alternating": lambda k: 1e12 if k % 2 else 1e-12,
        "ramp": lambda k: 10.0 ** (-290 + 5.8 * k),
        "random": lambda k: 10.0 ** draw[k],
    }[pattern]
    problem = dense.mlp([8] * 101, bias=bias, scale=scale)
    found = newton(problem, tol=1e-8)
    assert np.isfinite(found.log2_scales).all()
    assert found.converged
    assert found.passes <= 150


def test_dead_channels_stay_at_zero():
    problem = dense.mlp([5, 6, 6, 4])
    low, high = problem.lower.copy(), problem.upper.copy()
    low[3] = high[3] = 0.0
    first = problem.blocks[0].matrix.clone()
    first[3] = 0.0
    blocks = (replace(problem.blocks[0], matrix=first), *problem.blocks[1:])
    problem = replace(problem, blocks=blocks, lower=low, upper=high)
    for solver in ("newton", "coordinate"):
        found = solve(problem, solver=solver, tol=1e-9)
        assert found.converged and found.log2_scales[3] == 0.0


@few
@given(seeds, flags, flags)
def test_integer_scales_are_never_worse_than_rounding(seed, general, bounded):
    problem = dense.random_problem(seed, general=general, bounded=bounded)
    s = newton(problem).log2_scales
    found = round_scales(problem, s)
    assert found.dtype == np.int64
    assert (problem.lower <= found).all() and (found <= problem.upper).all()
    definition = dense.enumerate_entries(problem)
    plain = definition.objective(np.clip(np.rint(s), problem.lower, problem.upper))
    value = definition.objective(found.astype(float))
    assert value <= plain + 1e-9 * abs(plain)
    for h in range(problem.num_scales):  # no single step improves further
        for step in (-1, 1):
            other = found.astype(float)
            other[h] += step
            if problem.lower[h] <= other[h] <= problem.upper[h]:
                assert definition.objective(other) >= value - 1e-7 * max(1.0, abs(value))


def empty_problem(h=0, *, constant=0.0, count=0):
    none = sparse.csr_array((0, h))
    low, high = np.full(h, -np.inf), np.full(h, np.inf)
    zero = np.zeros(h)
    layers = np.zeros(h, dtype=np.int64)
    return Problem(h, (), np.zeros(0), none, constant, zero, count, low, high, layers)


@pytest.mark.parametrize("solver", ["newton", "coordinate"])
def test_nothing_to_do(solver):
    for problem in (
        empty_problem(),
        empty_problem(3),
        empty_problem(3, constant=2.0, count=4),
        empty_problem(0, constant=2.0, count=4),
    ):
        found = solve(problem, solver=solver)
        assert found.converged and not found.log2_scales.any()
        assert found.log2_scales.shape == (problem.num_scales,)
        assert round_scales(problem, found.log2_scales).shape == (problem.num_scales,)


@pytest.mark.parametrize("solver", ["newton", "coordinate"])
def test_a_direction_without_effect(solver):
    """Two scales that only occur as their difference: the minimiser is not unique."""
    forms = sparse.csr_array(np.array([[1.0, -1.0], [-1.0, 1.0]]))
    problem = dense.counted([], [1e-9, 1e9], forms, 2)
    found = solve(problem, solver=solver, tol=1e-10)
    assert found.converged
    gap = found.log2_scales[0] - found.log2_scales[1]
    assert gap == pytest.approx(-9 * np.log2(10) / 2, abs=1e-6)


def test_weight_norm_objective_without_linear_term():
    """p = 1 and no linear term: the logarithm of a sum of squares, as for equi-normalisation."""
    problem = dense.mlp([6, 9, 4, 3], spread=3.0)
    problem = replace(problem, linear=np.zeros(problem.num_scales), count=1)
    found = newton(problem, tol=1e-9)
    assert found.converged
    assert found.objective <= reference_minimum(problem) + 1e-8


@few
@given(seeds, flags, flags)
def test_large_float32_matrices_are_widened_in_pieces(seed, general, extreme):
    problem = dense.random_problem(seed, general=general, extreme=extreme)
    values = [torch.nan_to_num(dense.formed(b.matrix).float(), posinf=1e38) for b in problem.blocks]
    pairs = list(zip(problem.blocks, values, strict=True))
    single = replace(problem, blocks=tuple(replace(b, matrix=m) for b, m in pairs))
    double = replace(problem, blocks=tuple(replace(b, matrix=m.double()) for b, m in pairs))
    rng = np.random.default_rng(seed)
    reference = Operator(double)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathlift.tensors.pieces.HOST", 5)
        pieces = Operator(single)
    for reach in (1.0, 300.0):
        s = rng.uniform(-reach, reach, problem.num_scales)
        d = rng.standard_normal(problem.num_scales)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pathlift.tensors.pieces.HOST", 5)
            at = pieces.evaluate(s)
            product = pieces.hessian_product(at, d)
        expected = reference.evaluate(s)
        scale = max(problem.count, 1)
        assert at.objective == pytest.approx(expected.objective, rel=1e-11, abs=1e-9)
        np.testing.assert_allclose(at.gradient, expected.gradient, rtol=1e-9, atol=1e-9 * scale)
        np.testing.assert_allclose(
            product, reference.hessian_product(expected, d), rtol=1e-8, atol=1e-8 * scale
        )


def test_float32_matrices():
    problem = dense.mlp([6, 9, 4, 3])
    single = [replace(b, matrix=b.matrix.float()) for b in problem.blocks]
    double = [replace(b, matrix=b.matrix.double()) for b in single]
    a = newton(replace(problem, blocks=tuple(single)), 1e-10)
    b = newton(replace(problem, blocks=tuple(double)), 1e-10)
    np.testing.assert_array_equal(a.log2_scales, b.log2_scales)


def test_arguments_are_checked():
    problem = dense.mlp([3, 4, 2])
    with pytest.raises(ArgumentError, match="'sgd'.*'newton', 'coordinate'"):
        solve(problem, solver="sgd")
    bad = MatrixBlock(torch.tensor([[-1.0]]), sparse.csr_array((1, 4)), sparse.csr_array((1, 4)))
    with pytest.raises(ArgumentError, match="finite and >= 0"):
        newton(replace(problem, blocks=(bad,)))
    with pytest.raises(ArgumentError, match="linear has shape"):
        newton(replace(problem, linear=np.zeros(7)))


def test_an_mlp_takes_few_products():
    problem = dense.mlp([784, 500, 500, 500, 10])
    start = time.perf_counter()
    found = newton(problem, tol=1e-10)
    seconds = time.perf_counter() - start
    assert found.converged and found.gradient_norm <= 1e-10
    assert found.iterations <= 8 and found.passes <= 30
    assert seconds < 2.0  # 20 ms on two idle cores


def chains(number, length, bits, seed):
    """Chains of scales such as depthwise convolutions make: single entries between neighbours."""
    rng = np.random.default_rng(seed)
    h = number * length
    n = np.arange(h)
    eye = sparse.csr_array(sparse.identity(h))
    inner = n[n % length < length - 1]
    ends = [eye[n[n % length == 0]], -eye[n[n % length == length - 1]]]
    forms = sparse.csr_array(
        sparse.vstack([eye, -eye, *[eye[inner + 1] - eye[inner], *ends] * 9], dtype=np.float64)
    )
    g = np.exp2(rng.uniform(-bits, bits, forms.shape[0]))
    linear = np.asarray(forms.sum(axis=0)).ravel()
    free = np.full(h, np.inf)
    return Problem(h, (), g, forms, 0.0, linear, len(g), -free, free, np.zeros(h, dtype=np.int64))


@pytest.mark.parametrize("bits", [2, 10, 25])
def test_chains_of_single_entries_take_few_products(bits):
    found = newton(chains(40, 20, bits, seed=bits))
    assert found.converged and found.passes <= 12
    small = chains(3, 4, min(bits, 10), seed=bits)
    assert newton(small, 1e-10).objective == pytest.approx(reference_minimum(small), rel=1e-8)
