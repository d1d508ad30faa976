"""Comparisons of many tensors at once: on an accelerator each answer alone would cost a wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]

_NARROW = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def alike(pairs: Sequence[Pair]) -> list[bool]:
    """Whether the two tensors of each pair, of one dtype, have the same shape and numbers.

    A NaN is like a NaN.
    """
    found = [a.shape == b.shape and _alone(a, b) and _host_alike(a, b) for a, b in pairs]
    together = [k for k, (a, b) in enumerate(pairs) if a.shape == b.shape and not _alone(a, b)]
    flags = fetched([_same_entries(*pairs[k]).all() for k in together])
    for k, flag in zip(together, flags, strict=True):
        found[k] = bool(flag)
    return found


def gaps(pairs: Sequence[Pair]) -> list[tuple[float, float]]:
    """Of each pair of one shape and dtype the largest difference, and the size of the first tensor.

    Differences are taken in float64 (complex128); where both are NaN, or the same infinity, there
    is none, where one is, it is infinite. The size is that of the largest finite entry.
    """
    numbers: list[Tensor] = []
    for a, b in pairs:
        wide = torch.complex128 if a.is_complex() else torch.float64
        one, other = a.detach().to(wide), b.detach().to(wide)
        gap = torch.where(_same_entries(one, other), 0.0, (one - other).abs())
        gap = gap.nan_to_num(nan=torch.inf, posinf=torch.inf)
        size = torch.where(one.isfinite(), one.abs(), 0.0)
        zero = gap.new_zeros(1)
        numbers.append(
            torch.cat([gap.nan_to_num(nan=torch.inf, posinf=torch.inf).reshape(-1), zero]).max()
        )
        numbers.append(torch.cat([size.reshape(-1), zero]).max())
    values = fetched(numbers)
    return list(zip(values[::2], values[1::2], strict=True))


def fetched(numbers: Sequence[Tensor]) -> list[float]:
    """The values of tensors without dimensions, with one transfer per device."""
    found = [0.0] * len(numbers)
    for device in {n.device for n in numbers}:
        here = [k for k, n in enumerate(numbers) if n.device == device]
        values = torch.stack([numbers[k].to(torch.float64) for k in here]).cpu()
        for k, value in zip(here, values, strict=True):
            found[k] = float(value)
    return found


def _alone(a: Tensor, b: Tensor) -> bool:
    """Whether a pair is best compared by itself: on the host, or of a kind of its own."""
    plain = type(a) in (Tensor, torch.nn.Parameter) and type(b) in (Tensor, torch.nn.Parameter)
    if not plain or a.device != b.device or a.device.type == "cpu":
        return True
    known = a.dtype in _NARROW or not (a.is_floating_point() or a.is_quantized)
    return not known or a.layout != torch.strided or b.layout != torch.strided


def _host_alike(a: Tensor, b: Tensor) -> bool:
    if torch.equal(a, b):
        return True
    return (a.dtype in _NARROW or a.is_complex()) and bool(_same_entries(a, b).all())


def _same_entries(a: Tensor, b: Tensor) -> Tensor:
    same = a == b
    return same | (a.isnan() & b.isnan()) if a.is_floating_point() or a.is_complex() else same
