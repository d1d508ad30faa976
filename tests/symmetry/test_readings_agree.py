"""Readings agree: coefficients move as ``g(theta') = g(theta) 2^(-2 E s)``, whatever the operations.

So a report's figure after a rescaling is what a fresh capture of the rescaled model measures.
"""

from __future__ import annotations

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
