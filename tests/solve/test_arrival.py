"""The solver arrives, at one point per orbit, or says why not and where."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import nn

import pathlift
from pathlift.capture.model import capture
from pathlift.criteria import CRITERIA, as_criterion
from pathlift.criteria.protocol import Coefficients
from pathlift.errors import ArgumentError
from pathlift.solve import RANGES, MatrixBlock, Operator, newton, round_scales, solve, value
from pathlift.solve.assemble import assemble, assemble_from
from pathlift.symmetry.group import infer_group

_spec = importlib.util.spec_from_file_location("solve_dense", Path(__file__).parent / "dense.py")
dense = importlib.util.module_from_spec(_spec)
sys.modules["solve_dense"] = dense
_spec.loader.exec_module(dense)


def mlp(*widths: int) -> nn.Sequential:
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5),
    )  # fmt: skip


NETWORKS = {
    "bottleneck": (lambda: mlp(10, 40, 3, 20, 6), (2, 10)),
    "wide": (lambda: mlp(64, 200, 4, 200, 10), (2, 64)),  # shares of a scale from 1e-5 on
    "deep": (lambda: mlp(8, *[12] * 12, 4), (2, 8)),
    "convolutions": (cnn, (2, 3, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_members_of_an_orbit_end_at_the_same_weights(name: str, seed: int) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(seed)
    x, a = torch.randn(shape), make()
    b = copy.deepcopy(a)
    group = pathlift.rescaling_group(b, x)
    group.rescale_(b, torch.randint(-6, 7, (group.num_scales,)))
    for model in (a, b):
        report = pathlift.condition_(model, x, exact=False, verify=False)
        assert report.converged
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=0)
    again = pathlift.condition_(a, x, exact=False, verify=False)
    assert again.imbalance_before - again.imbalance_after < 1e-9


def hubs(blocks: int, size: int, seed: int = 0):
    """Matrices whose rows carry a scale of their own and one of all of them, as products make."""
    rng = np.random.default_rng(seed)
    each = 2 * size + 1
    h = blocks * each
    found, forms = [], []
    for b in range(blocks):
        at = b * each + np.arange(size)
        own = dense.selection(at, np.ones(size), h)
        hub = dense.selection(np.full(size, b * each + 2 * size), np.ones(size), h)
        inner = dense.selection(at + size, -np.ones(size), h)
        g = np.exp2(rng.uniform(-25, 25, (size, 1)) + rng.uniform(-25, 25, (1, size)))
        g *= rng.standard_normal((size, size)) ** 2 + 1e-3
        rows = sparse.csr_array(own + hub)
        found.append(MatrixBlock(torch.from_numpy(g), rows, inner))
        forms += [own, -own, hub[:1], -hub[:1], inner, -inner]
    forms = sparse.csr_array(sparse.vstack(forms))
    g = np.exp2(rng.uniform(-20, 20, forms.shape[0]))
    return dense.counted(found, g, forms, h)


@pytest.mark.parametrize("blocks", [3, 30])
def test_products_cost_no_more_with_many_matrices(blocks: int) -> None:
    """Above fifteen matrices the scales of one form were taken apart: 5,500 passes, no end."""
    found = newton(hubs(blocks, 12))
    assert found.converged and found.reason == ""
    assert found.passes <= 60


def test_sweeps_arrive_where_layers_move_slowly() -> None:
    problem = dense.mlp([3, *[16] * 9, 2], spread=0.3, scale=lambda k: 4.0**k)
    found = solve(problem, "coordinate", 1e-9)
    assert found.converged and found.iterations < 400
    assert found.objective == pytest.approx(newton(problem, 1e-9).objective, rel=1e-9)


def test_what_stops_short_says_why() -> None:
    found = newton(dense.mlp([6, 9, 4, 3], spread=3.0), tol=1e-9, max_iterations=1)
    assert not found.converged
    assert "asked for 1.0e-09" in found.reason and "after 1 iterations" in found.reason


def test_scales_at_their_bounds_are_listed_and_named() -> None:
    torch.manual_seed(0)
    model, x = mlp(6, 8, 8, 3), torch.randn(2, 6)
    program = capture(model, x)
    group = infer_group(program)
    room = np.full(group.num_scales, 50.0)
    tight = np.where(np.arange(group.num_scales) < 8, 0.01, 50.0)
    for upper, expected in ((room, {}), (tight, {"0.weight": 8})):
        assembled, _ = assemble_from(
            group, CRITERIA["path-kernel"], program, lower=-upper, upper=upper
        )
        found = solve(assembled.operator)
        assert found.converged
        assert assembled.where(found.at_bounds) == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["0.weight", "2.bias", "4.bias"])
def test_coefficients_that_are_no_numbers_are_refused_by_name(bad: float, name: str) -> None:
    model, x = mlp(3, 4, 4, 2), torch.randn(2, 3)
    program = capture(model, x)
    group = infer_group(program)
    values = CRITERIA["weight-norm"](program).values
    values[name].view(-1)[0] = bad
    free = np.full(group.num_scales, 9.0)
    with pytest.raises(ArgumentError, match=f"parameter '{name}' are NaN or infinite"):
        assemble(group, Coefficients(values), {}, lower=-free, upper=free)


def test_sums_that_leave_single_precision_are_taken_in_double() -> None:
    model, x = mlp(3, 4, 4, 2), torch.randn(2, 3)
    program = capture(model, x)
    group = infer_group(program)
    large = {n: torch.full_like(p, 3e38) for n, p in model.named_parameters()}
    free = np.full(group.num_scales, 9.0)
    found = assemble(group, Coefficients(large), {}, lower=-free, upper=free)
    assert np.isfinite(value(found.operator, np.zeros(group.num_scales)))


def test_ranges_have_a_tolerance_of_their_own() -> None:
    torch.manual_seed(0)
    model, x = mlp(6, 30, 20, 30, 3), torch.randn(2, 6)
    program = capture(model, x)
    group = infer_group(program)
    free = np.full(group.num_scales, 50.0)
    chosen = as_criterion("range")
    assembled, _ = assemble_from(group, chosen, program, lower=-free, upper=free)
    assert assembled.operator.objective is RANGES
    quick, exact = solve(assembled.operator), solve(assembled.operator, tol=1e-6)
    assert quick.converged and 1e-6 < quick.gradient_norm <= 0.05
    assert exact.converged and exact.iterations > quick.iterations
    assert quick.objective == pytest.approx(value(assembled.operator, quick.log2_scales))
    # The definition, channel by channel.
    scaled = [m.weight.detach().double() for m in model if isinstance(m, nn.Linear)]
    s = np.split(np.exp2(exact.log2_scales), np.cumsum([30, 20]))
    for k, factors in enumerate(s):
        scaled[k] = scaled[k] * torch.from_numpy(factors)[:, None]
        scaled[k + 1] = scaled[k + 1] / torch.from_numpy(factors)
    for k in range(3):
        enter, leave = scaled[k].abs().amax(1), scaled[k + 1].abs().amax(0)
        torch.testing.assert_close(enter, leave, rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", [1, 2])
def test_layers_that_are_half_a_bit_off_are_rounded_as_wholes(seed: int) -> None:
    """All of a layer rounds the same way, and no single scale can turn back alone: moved one by
    one, powers of two keep 0.29 of the fall in imbalance."""
    torch.manual_seed(seed)
    model, x = mlp(784, 500, 500, 500, 10), torch.randn(1, 784)
    program = capture(model, x)
    group = infer_group(program)
    free = np.full(group.num_scales, 50.0)
    assembled, _ = assemble_from(group, CRITERIA["path-kernel"], program, lower=-free, upper=free)
    best = solve(assembled.operator).log2_scales
    rounded = round_scales(assembled.operator, best)
    start, exact, whole = (
        assembled.imbalance(s) for s in (0.0 * best, best, rounded.astype(float))
    )
    assert (start - whole) / (start - exact) > 0.65


def test_rounding_is_never_worse_than_staying() -> None:
    for bits in (-1.6, -2.6, 1.6):
        problem = dense.mlp(
            [40] * 4 + [2], 0, 0.02, False, lambda k, b=bits: 4.0**b if k == 3 else 1.0
        )
        operator = Operator(problem)
        rounded = round_scales(operator, newton(operator).log2_scales)
        assert operator.total(rounded.astype(float)) <= operator.total(np.zeros(problem.num_scales))


def test_a_bound_stops_a_layer() -> None:
    problem = dense.mlp([20] * 4, spread=0.1, scale=lambda k: 64.0**k)
    h = problem.num_scales
    bounded = replace(problem, lower=np.full(h, -1.0), upper=np.full(h, 1.0))
    found = round_scales(bounded, newton(bounded).log2_scales)
    assert np.abs(found).max() <= 1
