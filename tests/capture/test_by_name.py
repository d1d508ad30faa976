"""Models that reach a parameter by another way than its name, where values take its place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.capture.by_name import check_by_name
from pathlift.capture.inputs import as_inputs
from pathlift.curvature import curvature
from pathlift.errors import ArgumentError


class Listed(nn.Module):
    def __init__(self, by_name: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.norm = nn.BatchNorm1d(6)
        self.kept = [self.last.weight]
        self.by_name = by_name

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        weight = self.last.weight if self.by_name else self.kept[0]
        return nn.functional.linear(y, weight, self.last.bias)


X, Y = torch.randn(8, 4), torch.randn(8, 2)
USES: dict[str, Callable[[nn.Module], object]] = {
    "Fisher": lambda m: pathlift.condition_(
        m, X, criterion=pathlift.criteria.fisher(m, [(X, Y)], nn.functional.mse_loss)
    ),
    "curvature": lambda m: curvature(m, [(X, Y)], nn.functional.mse_loss),
    "tangent kernel": lambda m: pathlift.lifting.ntk.ntk_spectrum(m, X),
}


@pytest.mark.parametrize("use", USES)
def test_refused_in_words(use: str) -> None:
    torch.manual_seed(0)
    USES[use](Listed(by_name=True).eval())
    model = Listed().eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=r"'last.weight' is reached by another way"):
        USES[use](model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
def test_the_check_leaves_no_trace(training: bool) -> None:
    model = Listed(by_name=True).train(training)
    model.first.weight.requires_grad_(False)
    calls: list[Tensor] = []
    model.last.weight.register_hook(calls.append)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        check_by_name(model, as_inputs(X))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and not calls
    assert not model.first.weight.requires_grad and model.last.weight.grad is None
    model(X).sum().backward()
    assert len(calls) == 1


def test_the_check_runs_on_a_copy_of_the_batch() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x.mul_(2.0))

    x = X.clone()
    check_by_name(InPlace(), as_inputs(x))
    assert torch.equal(x, X)
