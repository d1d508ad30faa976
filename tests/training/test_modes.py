"""Conditioning in the middle of training as people train: AMP, accumulation, compile, layouts."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pathlift

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
Y = torch.randint(0, 4, (8,), generator=torch.Generator().manual_seed(4))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 4, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip


def loss(model: Callable[[Tensor], Tensor], x: Tensor = X, y: Tensor = Y) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def trajectory(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_under_autocast_keep_their_bits(dtype: torch.dtype) -> None:
    model = network()
    with torch.autocast("cpu", dtype):
        before = model(X)
    report = pathlift.condition_(model, X[:2], exact=True)
    assert report.log2_scales.count_nonzero() > 0
    with torch.autocast("cpu", dtype):
        assert torch.equal(model(X), before)


def test_inside_autocast_the_scales_are_the_same() -> None:
    one, two = network(), network()
    a = pathlift.condition_(one, X[:2])
    with torch.autocast("cpu", torch.bfloat16):
        b = pathlift.condition_(two, X[:2])
    assert torch.equal(a.log2_scales, b.log2_scales)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_grad_scaler() -> None:
    """The scaler's factor belongs to the loss; conditioning between steps leaves it alone."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            value = loss(model)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()

    step()
    state = scaler.state_dict()
    buffers = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    values = [p.detach().clone() for p in model.parameters()]
    report = pathlift.condition_(model, X[:2], optimizer=optimizer)
    assert report.log2_scales.count_nonzero() > 0
    assert scaler.state_dict() == state
    for p, value, buffer in zip(model.parameters(), values, buffers, strict=True):
        factor = (p / value).nan_to_num(1.0)
        moved = optimizer.state[p]["momentum_buffer"]
        assert torch.equal(moved * factor, buffer)
    step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_gradient_accumulation() -> None:
    """Conditioned where no gradient is pending, accumulating two halves is one whole batch."""
    whole, halves = network(), network()
    runs = [(m, torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)) for m in (whole, halves)]
    for model, optimizer in runs:
        trajectory(model, optimizer, 1)
        pathlift.condition_(model, X[:2], optimizer=optimizer)
        optimizer.zero_grad()
    loss(whole).backward()
    for part in (slice(0, 4), slice(4, 8)):
        (loss(halves, X[part], Y[part]) / 2).backward()
    for p, q in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_training(backend: str) -> None:
    """The wrapper is looked through; the compiled function sees the new values."""
    model, plain = network(), network()
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    trajectory(compiled, optimizer)
    trajectory(plain, plain_optimizer)
    before = compiled(X)
    report = pathlift.condition_(compiled, X[:2], optimizer=optimizer)
    other = pathlift.condition_(plain, X[:2], optimizer=plain_optimizer)
    assert report.log2_scales.count_nonzero() > 0
    assert torch.equal(report.log2_scales, other.log2_scales)
    assert torch.equal(compiled(X), before)
    after = trajectory(compiled, optimizer)
    torch.testing.assert_close(after, trajectory(plain, plain_optimizer), rtol=1e-4, atol=1e-5)


def test_channels_last() -> None:
    model = network().to(memory_format=torch.channels_last)
    x = X.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trajectory(model, optimizer, 2)
    strides = [p.stride() for p in model.parameters()]
    state = [optimizer.state[p]["exp_avg"].stride() for p in model.parameters()]
    before = model(x)
    report = pathlift.condition_(model, x[:2], optimizer=optimizer)
    assert report.log2_scales.count_nonzero() > 0
    assert torch.equal(model(x), before)
    assert [p.stride() for p in model.parameters()] == strides
    assert [optimizer.state[p]["exp_avg"].stride() for p in model.parameters()] == state
    contiguous = network()
    contiguous.load_state_dict(copy.deepcopy(model.state_dict()))
    again = pathlift.condition_(contiguous, X[:2], exact=True)
    assert not again.log2_scales.any()


def test_deterministic_algorithms() -> None:
    """Twice the same, and the switch is as before."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        reports = [pathlift.condition_(network(), X[:2]) for _ in range(2)]
        assert torch.equal(reports[0].log2_scales, reports[1].log2_scales)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(was)
