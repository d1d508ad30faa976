"""Magnitudes of tensors, against the definition, entry by entry."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pathlift.tensors.extents import Extent, Joined, exponent_limits, extent, extents

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]


def by_definition(tensor: Tensor) -> Extent:
    values = [abs(v) for v in tensor.double().reshape(-1).tolist()]
    if not all(math.isfinite(v) for v in values):
        return Extent(tensor.dtype, None, False)
    exponents = [math.frexp(v)[1] - 1 for v in values if v]
    span = (min(exponents), max(exponents)) if exponents else None
    return Extent(tensor.dtype, span)


def drawn(seed: int, dtype: torch.dtype, size: int) -> Tensor:
    """Normal and subnormal numbers, zeros of both signs, now and then one that is not finite."""
    generator = torch.Generator().manual_seed(seed)
    low, high = exponent_limits(dtype)
    low -= -round(math.log2(torch.finfo(dtype).eps))
    bits = torch.randint(low, high + 1, (size,), generator=generator).double()
    values = torch.ldexp(1 + torch.rand(size, generator=generator).double(), bits)
    values *= torch.randint(-1, 2, (size,), generator=generator)
    if size and seed % 5 == 0:
        values[seed % size] = (math.nan, math.inf, -math.inf)[seed % 3]
    return values.to(dtype)


@settings(max_examples=200, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 10**6), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    sizes=st.lists(st.integers(0, 40), min_size=5, max_size=5),
    small=st.integers(0, 40),
)
def test_extents(seeds: list[int], dtype: torch.dtype, sizes: list[int], small: int) -> None:
    tensors = {
        str(k): drawn(s, dtype, n) for k, (s, n) in enumerate(zip(seeds, sizes, strict=False))
    }
    tensors["other"] = drawn(seeds[0], torch.float32, 6).view(2, 3).t()
    expected = {n: by_definition(t) for n, t in tensors.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathlift.tensors.extents._SMALL", small)
        patch.setattr("pathlift.tensors.pieces.HOST", 7)
        assert extents(tensors) == expected
    assert {n: extent(t) for n, t in tensors.items()} == expected


def test_spans_of_empty_tensors() -> None:
    tensors = [torch.zeros(0, 1), torch.tensor([[2.0], [-3.0]]), torch.zeros(1, 0)]
    assert Joined.of([t.double() for t in tensors]).spans() == [(0, 0), (-3, 2), (0, 0)]
    assert Joined.of([]).spans() == []
