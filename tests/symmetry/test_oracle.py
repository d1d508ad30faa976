"""The group has every diagonal symmetry there is, and every one it has keeps all bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.capture.inputs import tensors_in
from reference.oracle import diagonal_symmetries
from symmetry import networks
from symmetry.architectures import CASES

assert networks

# Symmetries the group does not use: all three divide by max(norm, eps), which is homogeneous only
# where the norm is above eps. docs/symmetries.md lists them.
SHORTFALL = {"normalize": 1, "cosine head": 3, "spectral norm": 1}


@pytest.mark.parametrize("name", CASES)
def test_dimension(name: str) -> None:
    """Every direction of the group is a symmetry, and there are as many as the oracle counts."""
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    group = pathlift.rescaling_group(model.double(), _double(inputs))
    found = diagonal_symmetries(model, inputs)
    assert found.gap > 1e6, "the oracle's own count is not clear"
    directions = torch.cat(
        [
            group.exponents(n).reshape(p.numel(), group.num_scales)
            for n, p in model.named_parameters()
        ]
    ).double()
    assert found.violation(directions) < 1e-12
    effective = directions[found.active]
    rank = int(torch.linalg.matrix_rank(effective)) if group.num_scales else 0
    assert rank == found.dimension - SHORTFALL.get(name, 0)
    if found.active.all():
        assert group.num_scales == rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_bits(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    model = model.to(dtype)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    try:
        before = [_run(model, inputs, mode) for mode in (False, True)]
    except RuntimeError as error:
        pytest.skip(f"the model itself does not run in {dtype}: {error}")
    group = pathlift.rescaling_group(model, inputs)
    group.rescale_(model, torch.randint(-3, 4, (group.num_scales,)))
    after = [_run(model, inputs, mode) for mode in (False, True)]
    for mode in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(before[mode], after[mode], strict=True)), (
            f"mode {mode}"
        )


def _double(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def _run(model: nn.Module, inputs: tuple[Tensor, ...], training: bool) -> list[Tensor]:
    buffers = [(b, b.clone()) for b in model.buffers()]
    model.train(training)
    torch.manual_seed(1)
    try:
        with torch.no_grad():
            found = [t.clone() for t in tensors_in(model(*inputs))]
        return found + [b.clone() for b, _ in buffers]
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
