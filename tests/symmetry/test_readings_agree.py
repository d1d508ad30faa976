"""Readings agree: coefficients move as ``g(theta') = g(theta) 2^(-2 E s)``, whatever the operations.

So a report's figure after a rescaling is what a fresh capture of the rescaled model measures.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pathlift
from pathlift.capture.model import capture
from pathlift.criteria import path_kernel, weight_norm
from pathlift.symmetry.group import RescalingGroup
from symmetry import networks
from symmetry.architectures import CASES
from symmetry.test_random_graphs import CHANNELS, SIZE, RandomGraph

assert networks


def moves(model: nn.Module, inputs: tuple[Tensor, ...], seed: int) -> None:
    """Compare the coefficients of a model before and after a random element of its group."""
    group = pathlift.rescaling_group(model, inputs)
    if not group.num_scales:
        return
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randint(-3, 4, (group.num_scales,), generator=generator)
    for criterion, rate in ((path_kernel, -2.0), (weight_norm(), 2.0)):
        before = criterion(capture(model, inputs)).values
        group.rescale_(model, scales)
        try:
            after = criterion(capture(model, inputs)).values
        finally:
            group.rescale_(model, -scales)
        compared(group, scales, before, after, rate)


def compared(
    group: RescalingGroup,
    scales: Tensor,
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    rate: float,
) -> None:
    gaps = []
    for name, g in before.items():
        expected = g.double().log2() + rate * (group.exponents(name) @ scales).double()
        live = g > 0
        assert torch.equal(live, after[name] > 0), name
        gaps.append((after[name].double().log2() - expected)[live])
    gap = torch.cat([x.reshape(-1) for x in gaps])
    # Coefficients are known up to one common factor.
    assert not gap.numel() or float(gap.max() - gap.min()) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_of_every_architecture(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    moves(model.double(), inputs, 1)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10**6), steps=st.integers(2, 10))
def test_of_random_graphs(seed: int, steps: int) -> None:
    model = RandomGraph(seed, steps).double().eval()
    moves(model, (torch.randn(2, CHANNELS, SIZE, SIZE, dtype=torch.float64),), seed)


def laid_out_otherwise(model: nn.Module) -> nn.Module:
    """The model itself, every parameter's values in another order in memory."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None or parameter.dim() < 2 or not parameter.is_contiguous():
                continue
            if parameter.dim() in (4, 5):
                last = torch.channels_last if parameter.dim() == 4 else torch.channels_last_3d
                parameter.data = parameter.data.contiguous(memory_format=last)
            else:
                parameter.data = parameter.data.transpose(0, -1).contiguous().transpose(0, -1)
    return model


@pytest.mark.parametrize("name", [n for n in CASES if "conv" in n] + list(CASES)[::6])
def test_coefficients_do_not_depend_on_layouts(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    model = model.double().eval()
    inputs = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    other = laid_out_otherwise(copy.deepcopy(model))
    try:
        before = path_kernel(capture(model, inputs)).values
    except pathlift.PathliftError:
        pytest.skip("not a model in float64")
    after = path_kernel(capture(other, inputs)).values
    for key, values in before.items():
        torch.testing.assert_close(after[key], values, rtol=1e-9, atol=0)


def test_grouped_convolutions_in_channels_last() -> None:
    """Gradients of PyTorch's are wrong there where a sample is a view of stride 0."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU()),
        *(nn.Conv2d(8, 8, 1, groups=4), nn.ReLU(), nn.Conv2d(8, 3, 1)),
    ).eval()
    for dtype, accuracy in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        x = torch.zeros(2, 4, 8, 8, dtype=dtype)
        before = pathlift.path_kernel_diagonal(model.to(dtype), x)
        other = copy.deepcopy(model).to(memory_format=torch.channels_last)
        after = pathlift.path_kernel_diagonal(other, x)
        for key, values in before.items():
            torch.testing.assert_close(after[key], values, rtol=accuracy, atol=0)
        first = pathlift.condition_(copy.deepcopy(model), x, exact=True)
        second = pathlift.condition_(other, x, exact=True)
        assert torch.equal(first.log2_scales, second.log2_scales)


def test_a_weight_that_forward_turns_into_channels_last() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(4, 8, 3)
            self.weight, self.last = nn.Parameter(torch.randn(8, 3, 3, 4)), nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight.permute(0, 3, 1, 2)  # its channels lie last
            x = nn.functional.conv2d(self.first(x).relu(), weight, groups=2)
            return self.last(x.relu())

    torch.manual_seed(0)
    model, x = Turned().double(), torch.zeros(2, 4, 8, 8).double()
    plain = nn.Sequential(
        *(model.first, nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.ReLU(), model.last)
    ).double()
    plain[2].weight.data = model.weight.detach().permute(0, 3, 1, 2).contiguous()
    found = pathlift.path_kernel_diagonal(model, x)["weight"].permute(0, 3, 1, 2)
    torch.testing.assert_close(found, pathlift.path_kernel_diagonal(plain, x)["2.weight"])
