"""Under an adaptive optimiser the scales of learned gains stay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import pathlift


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


NORMS = {"by hand": RMSNorm, "fused": nn.LayerNorm, "batch": nn.BatchNorm1d}


def network(norm: str) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 16), NORMS[norm](16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3)
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_gains_stay_with_adam_and_move_with_sgd(norm: str, name: str) -> None:
    torch.manual_seed(0)
    model, x = network(norm), torch.randn(8, 4)
    gain, hidden = model[1].weight.clone(), model[2].weight.clone()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    report = pathlift.condition_(model, x, optimizer=optimizer)
    assert torch.equal(model[1].weight, gain) == (name == "AdamW")
    assert not torch.equal(model[2].weight, hidden)  # the hidden channels behind are free
    assert any("16 of 48 scales stay" in w for w in report.warnings) == (name == "AdamW")
    assert report.imbalance_after < report.imbalance_before
    again = pathlift.condition_(model, x, optimizer=optimizer)
    assert again.imbalance_before == pytest.approx(report.imbalance_after, abs=1e-6)
    assert again.imbalance_before - again.imbalance_after < 1e-6


def test_without_gains_the_optimiser_makes_no_difference() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    adam = torch.optim.Adam(model.parameters())
    twin = copy.deepcopy(model)
    with_adam = pathlift.condition_(model, torch.randn(2, 4), optimizer=adam)
    without = pathlift.condition_(twin, torch.randn(2, 4))
    torch.testing.assert_close(with_adam.log2_scales, without.log2_scales)
