"""Baselines in training: Path-SGD and the per-step schedule of equal norms."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.experiments.architectures import mlp
from pathlift.training import PathSGD, Schedule


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    return x, torch.sin(x.sum(1, keepdim=True))


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    x, y = data()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_path_sgd_divides_by_the_diagonal() -> None:
    torch.manual_seed(0)
    model = mlp((4, 6, 5, 1)).double()
    x, y = data()
    optimizer = PathSGD(model, x, lr=0.1)
    g = pathlift.path_kernel_diagonal(model, x)
    (model(x) - y).square().mean().backward()
    expected = {n: p.detach() - 0.1 * p.grad / g[n] for n, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=0)


def test_path_sgd_does_not_see_the_scaling() -> None:
    torch.manual_seed(0)
    model = mlp((4, 6, 5, 1)).double()
    x, _ = data()
    twin = copy.deepcopy(model)
    group = pathlift.rescaling_group(twin, x)
    group.rescale_(twin, torch.arange(group.num_scales) % 7 - 3)
    first = descend(model, PathSGD(model, x, lr=1e-2), 30)
    second = descend(twin, PathSGD(twin, x, lr=1e-2), 30)
    assert first == pytest.approx(second, rel=1e-9)
    assert first[-1] < first[0]
    torch.testing.assert_close(model(x), twin(x), rtol=1e-9, atol=1e-12)
    # Plain gradient descent does see it.
    plain = copy.deepcopy(model), copy.deepcopy(twin)
    runs = [descend(m, torch.optim.SGD(m.parameters(), lr=1e-2), 5) for m in plain]
    assert abs(runs[0][-1] - runs[1][-1]) > 1e-6


def test_path_sgd_less_often_and_wrong_arguments() -> None:
    torch.manual_seed(0)
    model = mlp((4, 6, 1)).double()
    x, _ = data()
    losses = descend(model, PathSGD(model, x, lr=1e-2, every=10, eps=1e-6), 20)
    assert losses[-1] < losses[0]
    with pytest.raises(pathlift.ArgumentError, match="lr must be positive"):
        PathSGD(model, x, lr=0.0)


def test_equal_norms_after_every_step() -> None:
    torch.manual_seed(0)
    model = mlp((4, 6, 5, 1)).double()
    x, y = data()
    schedule = Schedule(every=1, unit="step", criterion="weight-norm", exact=False, verify=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for _ in range(5):
        before = model(x).detach()
        schedule.step(model, x, optimizer)
        torch.testing.assert_close(model(x).detach(), before, rtol=1e-9, atol=1e-12)
        layers = [m for m in model if isinstance(m, nn.Linear)]
        for a, b in itertools.pairwise(layers):
            entering = a.weight.square().sum(1) + a.bias.square()
            torch.testing.assert_close(entering, b.weight.square().sum(0), rtol=1e-5, atol=0)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def test_a_conditioner_equals_repeated_calls_and_notices_another_model() -> None:
    torch.manual_seed(0)
    model = mlp((4, 6, 5, 1)).double()
    x, _ = data()
    twin = copy.deepcopy(model)
    conditioner = pathlift.Conditioner(model, x)
    for _ in range(2):
        one, two = conditioner.condition_(), pathlift.condition_(twin, x)
        assert torch.equal(one.log2_scales, two.log2_scales)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a, b)
            with torch.no_grad():
                a += 0.1 * torch.ones_like(a)
                b += 0.1 * torch.ones_like(b)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.raises(pathlift.ArgumentError, match="'0.weight' is not the one that was captured"):
        conditioner.condition_()
