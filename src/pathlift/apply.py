"""Change the parameters (and the optimiser's state): all of them or none, and exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathlift.capture import check_model, named_tensors
from pathlift.errors import ArgumentError, RangeError
from pathlift.sharded import largest_around, local_factors, local_part
from pathlift.symmetry.group import RescalingGroup
from pathlift.training.optimizers import Optimizers, state_changes

# Log2 factors of one tensor, as small tensors whose broadcast sum is meant.
Factors = list[Tensor]

# Integers of the size of a floating-point number, by its bytes.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Entries that are worked on at a time: they fit a processor's cache.
_PIECE = 1 << 18


def rescale_(
    model: nn.Module,
    group: RescalingGroup,
    log2_scales: Tensor | NDArray[np.generic],
    optimizer: Optimizers = None,
    extents: Mapping[str, Extent] | None = None,
) -> None:
    """Multiply every parameter by ``2 ** (E s)``; see :meth:`RescalingGroup.rescale_`.

    ``extents``: the parameters' magnitudes, if they have been looked at already.
    """
    model = check_model(model)
    variables = group.variables(log2_scales)
    exact = bool((variables == np.round(variables)).all())
    named, buffers, _ = named_tensors(model)
    parameters: dict[str, Tensor] = {**buffers, **named}
    changes: list[tuple[str, Tensor, Factors]] = []
    for name, spec in group.parameters.items():
        if name not in parameters:
            raise ArgumentError(
                f"the model has no parameter '{name}', which the group rescales. Pass the model "
                f"the group was computed for."
            )
        parameter = parameters[name]
        if parameter.shape != spec.shape:
            raise ArgumentError(
                f"parameter '{name}' has shape {tuple(parameter.shape)}; the group was computed "
                f"for {tuple(spec.shape)}. Pass the model the group was computed for."
            )
        if not spec.terms:
            continue
        exponents = group.parameter_exponents(name, variables)
        if exponents:
            changes.append((name, parameter, exponents))
    if exact:
        known = extents or {}
        changes = [(n, p, in_range(n, p, e, known.get(n))) for n, p, e in changes]
    states = list(state_changes(optimizer, changes))
    _all_or_none([(p.data, e, 1) for _, p, e in changes], states, exact)


def _all_or_none(
    parameters: list[tuple[Tensor, Factors, int]],
    states: list[tuple[Tensor, Factors, int]],
    exact: bool,
) -> None:
    """Multiply every target; if one fails, take the others back.

    Parameters stay in the normal range, so that the inverse factor takes an exact one back without
    a copy; an optimiser's state may underflow (the momentum of a dead unit), so it is copied.
    """
    undo: list[Callable[[], object]] = []
    with torch.no_grad():
        try:
            for group, reversible in ((parameters, exact), (states, False)):
                for tensor, exponents, power in group:
                    restore: Callable[[], object] = (
                        partial(multiply_, tensor, exponents, -power)
                        if reversible
                        else partial(tensor.copy_, tensor.clone())
                    )
                    multiply_(tensor, exponents, power)
                    undo.append(restore)
        except BaseException:
            for restore in reversed(undo):
                restore()
            raise


def multiply_(tensor: Tensor, exponents: Factors, power: int = 1) -> None:
    """``tensor *= 2 ** (power * sum(exponents))``; exact for integer exponents.

    Powers of two are made by ``ldexp`` on the host, never by a rounding ``pow``. One pass over the
    tensor per factor (rows, columns), each a small tensor that broadcasts.
    """
    exponents = local_factors(tensor, exponents)
    multiply_by_(local_part(tensor), power_factors(tensor.dtype, exponents, power))


def power_factors(dtype: torch.dtype, exponents: Factors, power: int = 1) -> list[Tensor]:
    """``2 ** (power * e)`` for each exponent tensor, in the dtype that the product needs."""
    wide = dtype in (torch.float64, torch.float32)
    largest = abs(power) * sum(float(e.abs().max()) for e in exponents if e.numel())
    compute = dtype if wide and largest < 100 else torch.float64
    found = []
    for exponent in exponents:
        scaled = (exponent * power).numpy()
        whole = np.rint(scaled)
        factor = np.asarray(np.ldexp(np.exp2(scaled - whole), whole.astype(np.int64)))
        found.append(torch.from_numpy(factor).to(compute))
    return found


def multiply_by_(tensor: Tensor, factors: Sequence[Tensor]) -> None:
    """Multiply by every factor in turn, in the factors' dtype, and round once.

    A piece that fits the cache is multiplied by all factors before the next one, so that memory is
    read and written once.
    """
    if not factors or not tensor.numel():
        return
    if not tensor.dim():
        tensor = tensor.view(1)
    compute = factors[0].dtype
    spread = [_spread(f.to(tensor.device), tensor) for f in factors]
    # On an accelerator a piece costs a launch, and there is memory bandwidth to spare.
    rows = max(1, _PIECE // max(tensor[:1].numel(), 1)) if tensor.device.type == "cpu" else 1 << 62
    for start in range(0, tensor.shape[0], rows):
        piece = tensor[start : start + rows]
        work = piece if compute == tensor.dtype else piece.to(compute)
        for factor in spread:
            work = work.mul_(factor[start : start + rows] if factor.shape[0] > 1 else factor)
        if work is not piece:
            piece.copy_(work.to(tensor.dtype))


def _spread(factor: Tensor, tensor: Tensor) -> Tensor:
    """The factor, written out along all dimensions behind the first that it varies in.

    A factor per input channel would otherwise be broadcast over a kernel's few positions, which
    leaves an inner loop of nine; written out it is as small as one row of the tensor.
    """
    factor = factor.reshape((1,) * (tensor.dim() - factor.dim()) + tuple(factor.shape))
    if factor[:1].numel() == 1 or factor.shape[0] > 1:
        return factor
    return factor.expand(1, *tensor.shape[1:]).contiguous()


def exponent_limits(dtype: torch.dtype) -> tuple[int, int]:
    """Binary exponents of the smallest and the largest normal number of a dtype."""
    info = torch.finfo(dtype)
    return int(np.frexp(info.tiny)[1]) - 1, int(np.frexp(info.max)[1]) - 1


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

    def allows(self, exponents: Factors) -> bool:
        """Whether factors ``2 ** exponents`` surely keep every entry normal, in any order."""
        if self.exponents is None:
            return True
        low, high = exponent_limits(self.dtype)
        return (
            self.exponents[1] + sum(max(float(e.max()), 0) for e in exponents) <= high
            and self.exponents[0] + sum(min(float(e.min()), 0) for e in exponents) >= low
        )


def extent(tensor: Tensor) -> Extent:
    """The magnitudes of a floating-point tensor, in one pass over its bits.

    Without the sign, the bits of a floating-point number order as its magnitude does; less one,
    the zeros come last. Of a sharded tensor every process finds the extent of the whole.
    """
    dtype = tensor.dtype
    integers = _INTEGERS[dtype.itemsize]
    mask = torch.iinfo(integers).max
    flat = _in_storage_order(local_part(tensor.detach())).view(integers)
    size = _PIECE if flat.device.type == "cpu" else max(flat.numel(), 1)
    low, high = mask, 0
    for piece in flat.split(size):
        if piece.numel():
            bits = piece.bitwise_and(mask)
            high = max(high, int(bits.amax()))
            low = min(low, int(bits.sub_(1).bitwise_and_(mask).amin()))
    high, low = largest_around(tensor, (high, -low))
    low = -low
    ends = torch.tensor([low, high - 1], dtype=integers).add_(1).view(dtype)
    if not bool(torch.isfinite(ends[1:].to(torch.float64)).all()):
        return Extent(dtype, None, False)
    if not high:
        return Extent(dtype, None)
    smallest, largest = ends.to(torch.float64).tolist()
    return Extent(dtype, (math.frexp(smallest)[1] - 1, math.frexp(largest)[1] - 1))


def _in_storage_order(tensor: Tensor) -> Tensor:
    """All entries as a vector, in whatever order costs no copy."""
    order = sorted(range(tensor.dim()), key=lambda d: (tensor.stride(d), tensor.shape[d]))
    return tensor.permute(order[::-1]).reshape(-1)


def in_range(
    name: str, parameter: Tensor, exponents: Factors, known: Extent | None = None
) -> Factors:
    """The factors to multiply by, in an order that is exact.

    ``known``: the parameter's magnitudes, if they have been looked at already.

    Raises:
        RangeError: there is none; bits would be lost.
    """
    if (known or extent(parameter)).allows(exponents):
        return exponents
    joined = [sum(exponents[1:], exponents[0])]
    part = local_part(parameter.detach())
    factors = local_factors(parameter, joined)
    back = part.clone()
    multiply_(back, factors)
    multiply_(back, factors, -1)
    (lost,) = largest_around(parameter, (int(not torch.equal(back, part)),))
    if lost:
        raise RangeError(
            f"rescaling '{name}' by 2**{joined[0].min():.0f} to 2**{joined[0].max():.0f} leaves "
            f"the normal range of {str(parameter.dtype).removeprefix('torch.')}: bits would be "
            f"lost. Nothing was changed. Use smaller scales or a wider dtype."
        )
    return joined


def extent_bounds(
    group: RescalingGroup, extents: Mapping[str, Extent]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds ``(H,)`` on the free log2 scales within which no parameter leaves its dtype's range.

    A tensor's headroom is shared equally among the scales that multiply it; activations keep half
    of the dtype's exponent range.
    """
    up = np.full(group.basis.shape[0], np.inf)
    down = np.full(group.basis.shape[0], np.inf)
    for name, spec in group.parameters.items():
        if not spec.terms:
            continue
        low, high = exponent_limits(extents[name].dtype)
        found = extents[name].exponents
        above = high // 2 if found is None else max(min(high - 1 - found[1], high // 2), 0)
        below = high // 2 if found is None else max(min(found[0] - low, high // 2), 0)
        share = sum(abs(c) for c, _ in spec.terms)
        for coefficient, ids in spec.terms:
            touched = np.unique(ids.numpy())
            rise, fall = (above, below) if coefficient > 0 else (below, above)
            up[touched] = np.minimum(up[touched], rise // share)
            down[touched] = np.minimum(down[touched], fall // share)
    # Through the basis: |s_h| is held to the tighter side where several scales add up.
    h = group.num_scales
    upper, lower = np.full(h, 60.0), np.full(h, -60.0)
    basis = group.basis.tocoo()
    weight = np.asarray(abs(group.basis).sum(axis=1)).ravel()
    row, col, c = basis.row, basis.col, basis.data
    both = np.minimum(up, down)
    simple = (weight[row] == 1) & (c == 1)
    high_side = np.where(simple, up[row], np.floor(both[row] / np.maximum(weight[row], 1)))
    low_side = np.where(simple, down[row], np.floor(both[row] / np.maximum(weight[row], 1)))
    np.minimum.at(upper, col, high_side)
    np.maximum.at(lower, col, -low_side)
    return lower, upper
