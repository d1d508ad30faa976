"""Which rounding a call takes, why, and what follows when the default fails."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.training import Schedule

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 2))


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


class Rounds(nn.Module):
    """Notices a change of its hidden values in the last bits, but no powers of two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.relu(self.first(x)))
        return y + (y.detach() * 2.0**30).sin()


def test_before_training_scales_are_continuous() -> None:
    report = pathlift.condition_(net(), X)
    assert report.rounding == "none, continuous scales (the default before training)"
    assert report.log2_scales.dtype == torch.float64
    assert 0 < report.max_output_change < 1e-5
    assert report.rounding in str(report) and report.to_dict()["rounding"] == report.rounding


@pytest.mark.parametrize("criterion", ["path-kernel", "weight-norm", "range"])
def test_with_state_they_are_powers_of_two(criterion: str) -> None:
    model = net()
    fresh = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    report = pathlift.condition_(copy.deepcopy(model), X, criterion=criterion, optimizer=fresh)
    assert report.rounding.startswith("none")
    optimizer = stepped(model)
    report = pathlift.condition_(model, X, criterion=criterion, optimizer=optimizer)
    assert report.rounding == "powers of two (the optimizer holds state: training has begun)"
    assert report.log2_scales.dtype == torch.int64 and report.max_output_change == 0
    report = pathlift.condition_(
        model, X, criterion=criterion, optimizer=optimizer, exact=False, tol=1e-3
    )
    assert report.rounding == "none, continuous scales (exact=False)"


def test_narrow_weights_get_powers_of_two() -> None:
    model = net()
    report = pathlift.condition_(model.bfloat16(), X.bfloat16())
    assert "the weights are bfloat16" in report.rounding and report.max_output_change == 0
    assert pathlift.condition_(net().double(), X.double()).rounding.startswith("none")


def test_a_schedule_rounds_after_its_first_call() -> None:
    model, schedule = net(), Schedule()
    reports = [schedule.step(model, X[:1], None) for _ in range(2)]
    assert [r.rounding.split(" (")[0] for r in reports if r is not None] == [
        "none, continuous scales",
        "powers of two",
    ]
    asked = Schedule(exact=False)
    reports = [asked.step(model, X[:1], None) for _ in range(2)]
    assert all(r is not None and r.rounding.endswith("(exact=False)") for r in reports)


def test_continuous_scales_that_change_outputs_give_way() -> None:
    torch.manual_seed(0)
    model = Rounds()
    before, twin = model(X), copy.deepcopy(model)
    report = pathlift.condition_(model, X)
    assert report.rounding.startswith("powers of two (continuous scales changed outputs by ")
    assert report.max_output_change == 0 and torch.equal(model(X), before)
    exact = pathlift.condition_(twin, X, exact=True)
    assert torch.equal(exact.log2_scales, report.log2_scales)
    # Who asked for them is told, and keeps the model.
    again = Rounds()
    state = copy.deepcopy(again.state_dict())
    with pytest.raises(pathlift.VerificationError, match="rounding explains far less"):
        pathlift.condition_(again, X, exact=False)
    assert all(torch.equal(state[n], t) for n, t in again.state_dict().items())
