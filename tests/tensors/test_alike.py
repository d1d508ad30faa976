"""Comparisons of many tensors at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pathlift.tensors.alike import alike, fetched, gaps
from pretend import Accelerator, Pretend

NAN, INF = float("nan"), float("inf")
CASES: dict[str, tuple[Tensor, Tensor, bool, float]] = {
    "equal": (torch.tensor([1.0, -2.0]), torch.tensor([1.0, -2.0]), True, 0.0),
    "signed zeros": (torch.tensor([0.0]), torch.tensor([-0.0]), True, 0.0),
    "different": (torch.tensor([1.0, -2.0]), torch.tensor([1.5, -2.0]), False, 0.5),
    "NaN alike": (torch.tensor([NAN, 1.0]), torch.tensor([NAN, 1.0]), True, 0.0),
    "NaN beside a change": (torch.tensor([NAN, 1.0]), torch.tensor([NAN, 1.25]), False, 0.25),
    "NaN for a number": (torch.tensor([NAN, 1.0]), torch.tensor([1.0, 1.0]), False, INF),
    "infinite alike": (torch.tensor([INF, 1.0]), torch.tensor([INF, 1.5]), False, 0.5),
    "largest number": (torch.tensor([INF]), torch.tensor([torch.finfo().max]), False, INF),
    "other sign": (torch.tensor([INF]), torch.tensor([-INF]), False, INF),
    "integers": (torch.tensor([3, 2**40]), torch.tensor([3, 2**40 + 1]), False, 1.0),
    "flags": (torch.tensor([True]), torch.tensor([False]), False, 1.0),
    "complex": (torch.tensor([1j]), torch.tensor([2j]), False, 1.0),
    "half": (torch.tensor([1.0]).half(), torch.tensor([2.0]).half(), False, 1.0),
    "empty": (torch.empty(0, 3), torch.empty(0, 3), True, 0.0),
}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_pair(name: str, there: bool) -> None:
    a, b, same, gap = CASES[name]
    pair = (Pretend(a), Pretend(b)) if there else (a, b)
    with Accelerator():
        if not there:  # torch.equal of a wrapper is the host's business
            assert alike([pair]) == [same]
        ((found, size),) = gaps([pair])
    finite = a[a.isfinite()].to(torch.complex128)
    assert found == gap
    assert size == (float(finite.abs().max()) if finite.numel() else 0.0)


def test_several_at_once_are_one_transfer() -> None:
    pairs = [(Pretend(a), Pretend(b)) for a, b, _, _ in CASES.values()]
    with Accelerator() as accelerator:
        found = gaps(pairs)
    assert [gap for gap, _ in found] == [gap for _, _, _, gap in CASES.values()]
    assert accelerator.transfers == {"tensor": 1}


def test_other_lengths_differ() -> None:
    assert alike([(torch.zeros(2), torch.zeros(3)), (torch.ones(2), torch.ones(2))]) == [
        False,
        True,
    ]
    assert alike([]) == [] == fetched([])
