"""The optional family: weights in front of a batch norm scale with its running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.experiments.architectures import randomise_norms_, resnet18
from reference.oracle import diagonal_symmetries


class Norm(nn.Module):
    """Batch norm by its formula without eps, its statistics parameters, for the oracle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.ones(channels)),
        )
        self.running_mean = nn.Parameter(torch.ones(channels))
        self.running_var = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        mean, var, w, b = (t[:, None, None] for t in (mean, var, self.weight, self.bias))
        return (x - mean) / var.sqrt() * w + b


def network(norm: type[nn.Module]) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.na = nn.Conv2d(2, 3, 1), norm(3)
            self.b, self.nb = nn.Conv2d(3, 3, 2, groups=3, bias=False), norm(3)
            self.c, self.d = nn.Conv2d(3, 3, 2), nn.Conv2d(3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.na(self.a(x)))
            h = torch.relu(self.nb(self.b(h)) + self.c(h))
            return self.d(h)

    return Net()


def test_the_dimension_is_the_oracles() -> None:
    x = torch.randn(2, 2, 4, 4)
    group = pathlift.rescaling_group(network(nn.BatchNorm2d), x, batch_norm="invariant")
    found = diagonal_symmetries(network(Norm), (x,))
    assert group.num_scales == found.dimension == 3 + 3 + 3 + 3
    assert pathlift.rescaling_group(network(nn.BatchNorm2d), x).num_scales == 3 + 3


@pytest.mark.parametrize("training", [False, True])
def test_the_function_is_kept_up_to_eps(training: bool) -> None:
    torch.manual_seed(0)
    model = resnet18(width=4).double()
    randomise_norms_(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-18
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    twin = copy.deepcopy(model)
    group = pathlift.rescaling_group(model, x, batch_norm="invariant")
    group.rescale_(model, torch.arange(group.num_scales) % 7 - 3)
    model.train(training), twin.train(training)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-10, atol=1e-12)
    # The updated statistics move along, so that the next step is the same network again.
    model.eval(), twin.eval()
    torch.testing.assert_close(model(x), twin(x), rtol=1e-10, atol=1e-12)


def test_condition_reports_the_change_and_gains_more() -> None:
    torch.manual_seed(0)
    model = resnet18(width=4)
    randomise_norms_(model)
    x = torch.randn(2, 3, 16, 16)
    pinned = pathlift.condition_(copy.deepcopy(model), x, exact=True)
    free = pathlift.condition_(model, x, exact=True, batch_norm="invariant")
    assert pinned.max_output_change == 0.0
    assert free.max_output_change is not None and 0 < free.max_output_change < 0.1
    assert free.num_scales > pinned.num_scales and free.dead_channels == 0
    assert free.imbalance_after < pinned.imbalance_after


def test_a_wrong_name_is_refused() -> None:
    with pytest.raises(pathlift.PathliftError, match="must be 'pinned' or 'invariant'; found 'no'"):
        pathlift.rescaling_group(nn.Linear(2, 2), torch.randn(1, 2), batch_norm="no")
