"""Magnitudes of tensors, and what factors they leave room for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathlift.tensors.pieces import entries_at_a_time
from pathlift.tensors.shards import is_sharded, largest_around, local_part

# Log2 factors of one tensor, as small tensors whose broadcast sum is meant.
Factors = list[Tensor]
# Smallest and largest log2 factor of one tensor of factors.
Span = tuple[float, float]

# Integers of the size of a floating-point number, by its bytes.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Tensors of fewer entries are looked at together: each would cost more to start than to read.
_SMALL = 1 << 14


@dataclass(frozen=True)
class Extent:
    """What is known of a tensor's magnitudes.

    Attributes:
        dtype: the tensor's.
        exponents: smallest and largest binary exponent of the non-zero entries; None if there are
            none, or if not all are finite.
        finite: whether no entry is NaN or infinite.
    """

    dtype: torch.dtype
    exponents: tuple[int, int] | None
    finite: bool = True

    @staticmethod
    def of_all(dtype: torch.dtype, pieces: Iterable[Extent]) -> Extent:
        """The extent of a tensor that lies in pieces."""
        pieces = list(pieces)
        if not all(p.finite for p in pieces):
            return Extent(dtype, None, False)
        spans = [p.exponents for p in pieces if p.exponents is not None]
        if not spans:
            return Extent(dtype, None)
        return Extent(dtype, (min(low for low, _ in spans), max(high for _, high in spans)))

    def allows(self, spans: Iterable[Span]) -> bool:
        """Whether factors within these spans surely keep every entry normal, in any order."""
        if self.exponents is None:
            return True
        low, high = exponent_limits(self.dtype)
        spans = list(spans)
        return (
            self.exponents[1] + sum(max(top, 0) for _, top in spans) <= high
            and self.exponents[0] + sum(min(bottom, 0) for bottom, _ in spans) >= low
        )


@lru_cache
def exponent_limits(dtype: torch.dtype) -> tuple[int, int]:
    """Binary exponents of the smallest and the largest normal number of a dtype."""
    info = torch.finfo(dtype)
    return int(np.frexp(info.tiny)[1]) - 1, int(np.frexp(info.max)[1]) - 1


@lru_cache
def _format(dtype: torch.dtype) -> tuple[int, int, int]:
    """Of a floating-point format: bits of the mantissa, the exponent's bias, the bits of the
    largest number."""
    info = torch.finfo(dtype)
    largest = torch.tensor(info.max, dtype=dtype).view(_INTEGERS[dtype.itemsize])
    return -round(math.log2(info.eps)), 1 - exponent_limits(dtype)[0], int(largest)


def extents(tensors: Mapping[str, Tensor]) -> dict[str, Extent]:
    """The magnitudes of floating-point tensors, by name; see :func:`extent`."""
    together: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    found: dict[str, Extent | None] = dict.fromkeys(tensors)
    for name, tensor in tensors.items():
        if tensor.numel() < _SMALL and tensor.numel() and not is_sharded(tensor):
            together.setdefault((tensor.dtype, tensor.device), []).append(name)
        else:
            found[name] = extent(tensor)
    for (dtype, _), names in together.items():
        flat = torch.cat([tensors[n].detach().reshape(-1) for n in names])
        bits = flat.view(_INTEGERS[dtype.itemsize]).cpu().numpy() & _mask(dtype)
        starts = np.cumsum([0, *(tensors[n].numel() for n in names[:-1])])
        high = np.maximum.reduceat(bits, starts)
        low = np.minimum.reduceat((bits - 1) & _mask(dtype), starts)
        for name, a, b in zip(names, low.tolist(), high.tolist(), strict=True):
            found[name] = _of_bits(dtype, a, b)
    return {n: e for n, e in found.items() if e is not None}


def extent(tensor: Tensor) -> Extent:
    """The magnitudes of a floating-point tensor, in one pass over its bits.

    Without the sign, the bits of a floating-point number order as its magnitude does; less one,
    the zeros come last. Of a sharded tensor every process finds the extent of the whole.
    """
    dtype, mask = tensor.dtype, _mask(tensor.dtype)
    flat = _in_storage_order(local_part(tensor.detach())).view(_INTEGERS[dtype.itemsize])
    low, high = mask, 0
    pieces = flat.split(entries_at_a_time(flat.device)) if flat.numel() else ()
    buffer = torch.empty_like(pieces[0]) if pieces else flat
    for piece in pieces:
        bits = torch.bitwise_and(piece, mask, out=buffer[: len(piece)])
        bottom, top = (int(end) for end in torch.stack(torch.aminmax(bits)).cpu())
        if not bottom:
            bottom = int(bits.sub_(1).bitwise_and_(mask).amin()) + 1
        low, high = min(low, bottom - 1), max(high, top)
    high, low = largest_around(tensor, (high, -low))
    return _of_bits(dtype, -low, high)


def _mask(dtype: torch.dtype) -> int:
    return torch.iinfo(_INTEGERS[dtype.itemsize]).max


def _of_bits(dtype: torch.dtype, low: int, high: int) -> Extent:
    """``low``: the bits of the smallest entry that is not 0, less one; ``high``: of the largest."""
    mantissa, bias, largest = _format(dtype)
    if high > largest:
        return Extent(dtype, None, False)
    if not high:
        return Extent(dtype, None)

    def exponent(bits: int) -> int:
        field = bits >> mantissa
        return (field or bits.bit_length() - mantissa) - bias

    return Extent(dtype, (exponent(low + 1), exponent(high)))


def _in_storage_order(tensor: Tensor) -> Tensor:
    """All entries as a vector, in whatever order costs no copy."""
    order = sorted(range(tensor.dim()), key=lambda d: (tensor.stride(d), tensor.shape[d]))
    return tensor.permute(order[::-1]).reshape(-1)


@dataclass(frozen=True)
class Joined:
    """Many small tensors of log2 factors as one vector.

    Attributes:
        entries: all of them.
        sizes: how many entries each tensor has.
    """

    entries: NDArray[np.float64]
    sizes: NDArray[np.int64]

    @staticmethod
    def of(exponents: Sequence[Tensor]) -> Joined:
        """The tensors, one after the other."""
        sizes = np.asarray([e.numel() for e in exponents], dtype=np.int64)
        none = torch.zeros(0, dtype=torch.float64)
        return Joined(torch.cat([none, *(e.reshape(-1) for e in exponents)]).numpy(), sizes)

    def spans(self) -> list[Span]:
        """The smallest and the largest entry of every tensor; (0, 0) of an empty one."""
        bottom, top = np.zeros(len(self.sizes)), np.zeros(len(self.sizes))
        filled = self.sizes > 0
        starts = (np.cumsum(self.sizes) - self.sizes)[filled]
        if len(starts):
            bottom[filled] = np.minimum.reduceat(self.entries, starts)
            top[filled] = np.maximum.reduceat(self.entries, starts)
        return list(zip(bottom.tolist(), top.tolist(), strict=True))
