"""The whole call: function kept, optimum reached, state untouched."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

import pathlift


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.conv(x))
        return self.head(x.amax((2, 3)))


CASES = [
    (lambda: mlp(5, 7, 4, 6, 3), torch.randn(3, 5)),
    (Residual, torch.randn(3, 2, 6, 6)),
]


def dense_objective(model: nn.Module, x: Tensor):
    """F of METHOD section 3 from the public diagonal and exponent rows; natural-log units."""
    group = pathlift.rescaling_group(model, x)
    diagonal = pathlift.path_kernel_diagonal(model, x)
    g = torch.cat([diagonal[n].reshape(-1) for n in group.parameters]).numpy()
    rows = torch.cat([group.exponents(n).reshape(-1, group.num_scales) for n in group.parameters])
    keep = g > 0
    g, rows = g[keep], rows.numpy()[keep].astype(float)

    def value(s):
        logs = np.log(g) - 2 * np.log(2) * rows @ s
        top = logs.max()
        weights = np.exp(logs - top)
        gradient = -2 * np.log(2) * (len(g) * rows.T @ weights / weights.sum() - rows.sum(0))
        return len(g) * (top + np.log(weights.sum())) - logs.sum(), gradient

    return value, group, len(g)


@pytest.mark.parametrize("solver", ["newton", "coordinate"])
@pytest.mark.parametrize("make, x", CASES)
def test_the_optimum_of_the_definition_is_reached(make, x: Tensor, solver: str) -> None:
    torch.manual_seed(0)
    model = make().double()
    x = x.double()
    model(x)  # the definition takes running statistics, so the norms must have some
    value, group, count = dense_objective(model, x)
    reference = scipy.optimize.minimize(
        value,
        np.zeros(group.num_scales),
        jac=True,
        method="BFGS",
        options={"gtol": 1e-9, "maxiter": 5000},
    )
    report = pathlift.condition_(model, x, exact=False, solver=solver, tol=1e-10)
    assert report.num_parameters == count
    found = value(report.log2_scales.numpy())[0]
    assert found <= reference.fun + 1e-8 * abs(reference.fun)
    start = value(np.zeros(group.num_scales))[0]
    assert report.imbalance_before == pytest.approx(start / count - np.log(count), rel=1e-8)
    assert report.imbalance_after == pytest.approx(found / count - np.log(count), rel=1e-8)
    after = pathlift.imbalance(pathlift.path_kernel_diagonal(model, x))
    assert report.imbalance_after == pytest.approx(after, rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make, x", CASES)
def test_bits_state_and_report(make, x: Tensor, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = make().to(dtype), x.to(dtype)
    next(iter(model.parameters())).requires_grad_(False)
    twin = copy.deepcopy(model)
    random_state = torch.get_rng_state()
    report = pathlift.condition_(model, x, exact=True)
    assert torch.equal(random_state, torch.get_rng_state()) and torch.is_grad_enabled()
    assert model.training and not next(iter(model.parameters())).requires_grad
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    for mode in (False, True):
        with torch.no_grad():
            assert torch.equal(model.train(mode)(x), twin.train(mode)(x))
    assert report.max_output_change == 0.0
    assert 0 <= report.imbalance_after <= report.imbalance_before
    assert report.gradient_norm <= 1e-8
    assert set(report.seconds) == {"capture", "symmetry", "criterion", "solve", "apply", "verify"}
    assert report.to_dict()["num_scales"] == report.num_scales == len(report.log2_scales)
    assert "identical, bit for bit" in str(report)


def test_momentum_is_carried_like_a_gradient() -> None:
    torch.manual_seed(0)
    model, x = mlp(4, 9, 3, 2).double(), torch.randn(8, 4).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).square().mean().backward()
    optimizer.step()
    before = {p: optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()}
    group = pathlift.rescaling_group(model, x)
    report = pathlift.condition_(model, x, optimizer=optimizer)
    for name, p in model.named_parameters():
        exponent = group.exponents(name).double() @ report.log2_scales.double()
        expected = before[p] * 2.0**-exponent
        assert torch.equal(optimizer.state[p]["momentum_buffer"], expected)


def test_dead_pruned_and_frozen_parts() -> None:
    torch.manual_seed(0)
    model, x = mlp(4, 6, 5, 2), torch.randn(2, 4)
    with torch.no_grad():
        model[2].weight[:, 1] = 0  # nothing leaves channel 1
        model[2].weight[2, 3] = 0  # one pruned weight
    report = pathlift.condition_(model, x, exact=True)
    assert report.dead_channels == 1
    assert float(model[2].weight.detach()[2, 3]) == 0.0
    assert report.max_output_change == 0.0
    for p in model.parameters():
        p.requires_grad_(False)
    report = pathlift.condition_(model, x)
    assert report.num_parameters == 0 and not report.log2_scales.any()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("bias", [True, False])
def test_depth_and_initial_scale(scale: float, bias: bool) -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(100) for m in (nn.Linear(8, 8, bias=bias), nn.ReLU())]
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    report = pathlift.condition_(model, torch.randn(2, 8).double(), verify=False)
    assert np.isfinite([report.imbalance_before, report.imbalance_after]).all()
    assert report.imbalance_after <= report.imbalance_before
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_wrappers_are_looked_through() -> None:
    model = mlp(3, 4, 2)
    report = pathlift.condition_(nn.DataParallel(model), torch.randn(2, 3))
    assert report.num_scales == 4
    assert pathlift.rescaling_group(torch.compile(model), torch.randn(2, 3)).num_scales == 4


class InfinitePadding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 1)
        self.second = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(torch.relu(self.first(x)), [1, 1, 1, 1], value=float("-inf"))
        return self.second(nn.functional.max_pool2d(x, 2))


def test_infinite_padding_in_front_of_a_max_pool() -> None:
    model, x = InfinitePadding(), torch.randn(2, 2, 4, 4)
    before = model(x)
    assert pathlift.rescaling_group(model, x).num_scales == 3
    report = pathlift.condition_(model, x, exact=True)
    assert np.isfinite(report.imbalance_after)
    assert torch.equal(before, model(x))


def test_a_tolerance_that_is_not_reached_is_said() -> None:
    report = pathlift.condition_(mlp(6, 9, 4, 3), torch.randn(2, 6))
    assert report.converged and "above the tolerance" not in str(report)
    report = pathlift.condition_(mlp(6, 9, 4, 3), torch.randn(2, 6), tol=1e-300)
    assert not report.converged and "passes, above the tolerance" in str(report)
    assert report.to_dict()["converged"] is False
    assert report.imbalance_after <= report.imbalance_before


@pytest.mark.parametrize("constant", [False, True])
def test_statistics_of_a_first_batch_are_those_of_the_record(constant: bool) -> None:
    def network() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.BatchNorm1d(8),
            nn.ReLU(), nn.Linear(8, 3),
        )  # fmt: skip

    x = torch.full((6, 5), 0.3) if constant else 3 * torch.randn(6, 5)
    # One takes them from the capture's own run, the other runs the record on the example. A norm
    # divides what does not vary by the root of its eps: more than rounding explains elsewhere.
    first = pathlift.condition_(network(), x, exact=False, verify=not constant)
    again = pathlift.Conditioner(network(), x).condition_(exact=False, verify=not constant)
    assert first.imbalance_before == pytest.approx(again.imbalance_before, rel=1e-5)
    assert torch.allclose(first.log2_scales, again.log2_scales, atol=1e-4)
    assert first.imbalance_after < 0.9 * first.imbalance_before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make,x", CASES)
def test_a_second_call_changes_nothing(make, x: Tensor, dtype: torch.dtype) -> None:
    """What rounding the weights has moved the optimum by is not applied."""
    for seed in range(8):
        torch.manual_seed(seed)
        model, inputs = make().to(dtype), x.to(dtype)
        with torch.no_grad():
            for k, parameter in enumerate(model.parameters()):
                parameter.mul_(3.0 ** (k % 5 - 2))
        first = pathlift.condition_(model, inputs)
        state = copy.deepcopy(model.state_dict())
        again = pathlift.condition_(model, inputs)
        assert first.log2_scales.any() and not again.log2_scales.any(), seed
        assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
