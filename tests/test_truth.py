"""What a report says of afterwards is what a fresh capture of the rescaled model measures.

tests/zoo/test_survey.py asks the same of models of three libraries.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pathlift


class Backwards(nn.Module):
    """Biases at zero on a branch far below the other: a norm between layers that shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8)
        with torch.no_grad():
            for layer in (self.a, self.b, self.c):
                nn.init.zeros_(layer.bias)
            self.norm.weight.fill_(2.0**-12)
            self.c.weight.mul_(2.0**-4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(self.norm(self.a(x)))))


class WeightNormed(nn.Module):
    """Weight-normed layers between plain ones."""

    def __init__(self) -> None:
        super().__init__()
        normed = nn.utils.parametrizations.weight_norm
        self.net = nn.Sequential(
            nn.Linear(4, 16), nn.ReLU(), normed(nn.Linear(16, 5)), nn.ReLU(), nn.Linear(5, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Gated(nn.Module):
    """Gate upon gate: taken for their inputs, paths would have degree 2^20."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]) for _ in range(20)
        )
        self.out = nn.Linear(6, 2)
        with torch.no_grad():
            for parameter in self.blocks.parameters():
                parameter.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        for layer, gate in self.blocks:
            x = torch.relu(layer(x)) * torch.sigmoid(gate(x))
        return self.out(x)


def fresh_batch_norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 4, 3),
        nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5),
    )  # fmt: skip


MODELS = {
    "zero biases": (Backwards, (2, 4)),
    "weight norm": (WeightNormed, (2, 4)),
    "large gates": (lambda: Gated(3.0), (2, 6)),
    "small gates": (lambda: Gated(1.0), (2, 6)),
    "fresh batch norms": (fresh_batch_norms, (2, 3, 8, 8)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    return make(), torch.randn(shape)


def test_moved_statistics_are_still_those_of_a_fresh_norm() -> None:
    """Up to eps: what the criterion took for the batch's deviation it takes again."""
    model, x = made("fresh batch norms")
    report = pathlift.condition_(model, x, batch_norm="invariant", verify=False)
    assert report.imbalance_before - report.imbalance_after > 0.01
    again = pathlift.condition_(model, x, batch_norm="invariant", verify=False)
    assert abs(again.imbalance_before - report.imbalance_after) < 1e-4


@pytest.mark.parametrize("exact", [True, False], ids=["integers", "continuous"])
@pytest.mark.parametrize("name", MODELS)
def test_reported_is_measured_and_a_second_call_gains_nothing(name: str, exact: bool) -> None:
    model, x = made(name)
    report = pathlift.condition_(model, x, exact=exact, verify=False)
    assert report.converged and (exact or report.log2_scales.any())
    assert report.imbalance_after <= report.imbalance_before
    again = pathlift.condition_(model, x, exact=False, verify=False)
    assert abs(again.imbalance_before - report.imbalance_after) < 1e-6
    if not exact:
        assert again.imbalance_before - again.imbalance_after < 1e-6


class DropsAConstant(nn.Module):
    """Dropout over what no input and no parameter decides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
        self.register_buffer("table", torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x)) * nn.functional.dropout(self.table, 0.5, self.training)
        return self.second(h)


def test_no_draw_decides_what_is_reported() -> None:
    torch.manual_seed(0)
    model, x = DropsAConstant(), torch.randn(2, 4)
    first = pathlift.condition_(model, x, verify=False)
    again = pathlift.condition_(model, x, verify=False)
    assert abs(first.imbalance_after - again.imbalance_before) < 1e-6


class Products(nn.Module):
    """A product of twelve layers: its scale is the sum of theirs, and a bound that holds whatever
    each of them does is a twelfth of the room."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.ModuleList(nn.Linear(4, 6) for _ in range(12))
        self.out = nn.Linear(6, 3)
        with torch.no_grad():
            self.out.weight.mul_(2.0**80)

    def forward(self, x: Tensor) -> Tensor:
        product = self.factors[0](x)
        for layer in self.factors[1:]:
            product = product * layer(x)
        return self.out(product)


def test_what_room_there_is_is_used_in_one_call() -> None:
    torch.manual_seed(0)
    model, x = Products(), torch.randn(2, 4)
    report = pathlift.condition_(model, x)
    assert not any("bounds" in w for w in report.warnings)
    assert float(report.log2_scales.abs().max()) > 5
    again = pathlift.condition_(model, x)
    assert again.imbalance_before - again.imbalance_after < 1e-6


@pytest.mark.parametrize("bits", [20, 110])
def test_a_second_call_gains_only_what_the_first_said_it_would(bits: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.mul_(2.0**-bits)
        model[4].weight.mul_(2.0**bits)
    first = pathlift.condition_(model, torch.randn(2, 4), verify=False)
    second = pathlift.condition_(model, torch.randn(2, 4), verify=False)
    gains = second.imbalance_before - second.imbalance_after > 1e-6
    assert gains == any("bounds" in w for w in first.warnings) == (bits == 110)
    assert second.imbalance_before == pytest.approx(first.imbalance_after, abs=1e-6)
