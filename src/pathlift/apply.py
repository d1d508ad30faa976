"""Change the parameters (and the optimiser's state): all of them or none, and exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathlift.capture.names import check_model, named_tensors
from pathlift.errors import ArgumentError, RangeError
from pathlift.extents import Extent, Joined, extents
from pathlift.pieces import entries_at_a_time
from pathlift.sharded import largest_around, local_factors, local_part
from pathlift.symmetry.group import RescalingGroup
from pathlift.training.optimizers import Optimizers, state_changes

# Log2 factors of one tensor, as small tensors whose broadcast sum is meant.
Factors = list[Tensor]


def rescale_(
    model: nn.Module,
    group: RescalingGroup,
    log2_scales: Tensor | NDArray[np.generic],
    optimizer: Optimizers = None,
) -> None:
    """Multiply every parameter by ``2 ** (E s)``; see :meth:`RescalingGroup.rescale_`."""
    parameters, buffers, _ = named_tensors(check_model(model))
    rescale_tensors_({**buffers, **parameters}, group, log2_scales, optimizer)


def rescale_tensors_(
    tensors: Mapping[str, Tensor],
    group: RescalingGroup,
    log2_scales: Tensor | NDArray[np.generic],
    optimizer: Optimizers = None,
    known: Mapping[str, Extent] | None = None,
) -> None:
    """:func:`rescale_` of a model's parameters and buffers by name.

    ``known``: their magnitudes, if they have been looked at already.
    """
    for name, spec in group.parameters.items():
        if name not in tensors:
            raise ArgumentError(
                f"the model has no parameter '{name}', which the group rescales. Pass the model "
                f"the group was computed for."
            )
        if tensors[name].shape != spec.shape:
            raise ArgumentError(
                f"parameter '{name}' has shape {tuple(tensors[name].shape)}; the group was "
                f"computed for {tuple(spec.shape)}. Pass the model the group was computed for."
            )
    variables = group.variables(log2_scales)
    exact = bool((variables == np.round(variables)).all())
    exponents = group.parameter_exponents(variables)
    if exact:
        known = known or extents({n: tensors[n] for n in exponents})
        exponents = in_range(tensors.__getitem__, exponents, known)
    changes = [(n, tensors[n], e) for n, e in exponents.items()]
    states = list(state_changes(optimizer, changes))
    _all_or_none([(p.data, e) for _, p, e in changes], states, exact)


def _all_or_none(
    parameters: list[tuple[Tensor, Factors]],
    states: list[tuple[Tensor, Factors, int]],
    exact: bool,
) -> None:
    """Multiply every target; if one fails, take the others back.

    Parameters stay in the normal range, so that the inverse factor takes an exact one back without
    a copy; an optimiser's state may underflow (the momentum of a dead unit), so it is copied.
    """
    undo: list[Callable[[], object]] = []

    def copied(tensor: Tensor) -> Callable[[], object]:
        return partial(tensor.copy_, tensor.clone())

    with torch.no_grad():
        try:
            local = [(local_part(t), local_factors(t, e)) for t, e in parameters]
            made = power_factors([(t.dtype, e) for t, e in local])
            for (tensor, exponents), factors in zip(local, made, strict=True):
                restore = partial(multiply_, tensor, exponents, -1) if exact else copied(tensor)
                multiply_by_(tensor, factors)
                undo.append(restore)
            for tensor, exponents, power in states:
                restore = copied(tensor)
                multiply_(tensor, exponents, power)
                undo.append(restore)
        except BaseException:
            for restore in reversed(undo):
                restore()
            raise


def multiply_(tensor: Tensor, exponents: Factors, power: int = 1) -> None:
    """``tensor *= 2 ** (power * sum(exponents))``; exact for integer exponents."""
    exponents = local_factors(tensor, exponents)
    (factors,) = power_factors([(tensor.dtype, exponents)], power)
    multiply_by_(local_part(tensor), factors)


def power_factors(
    targets: Sequence[tuple[torch.dtype, Factors]], power: int = 1
) -> list[list[Tensor]]:
    """``2 ** (power * e)`` of every exponent tensor, in the dtype that its product needs.

    Powers of two are made by ``ldexp`` on the host, never by a rounding ``pow``; all at once, since
    a model has hundreds of small ones.
    """
    joined = Joined.of([e for _, exponents in targets for e in exponents])
    scaled = joined.entries * power
    whole = np.rint(scaled)
    wide = torch.from_numpy(np.ldexp(np.exp2(scaled - whole), whole.astype(np.int64)))
    pieces = {
        dtype: iter(wide.to(dtype).split(joined.sizes.tolist()))
        for dtype in (torch.float64, torch.float32)
    }
    reach = iter([max(-low, high) for low, high in joined.spans()])
    found = []
    for dtype, exponents in targets:
        largest = abs(power) * sum(next(reach) for _ in exponents)
        plain = dtype in (torch.float64, torch.float32) and largest < 100
        made = []
        for exponent in exponents:
            here = {d: next(p) for d, p in pieces.items()}
            made.append(here[dtype if plain else torch.float64].view(exponent.shape))
        found.append(made)
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
    spread = [_spread(f.to(tensor.device), tensor) for f in factors]
    size = entries_at_a_time(tensor.device)
    if tensor.numel() <= size:
        _multiply_piece_(tensor, spread)
        return
    rows = max(1, size // max(tensor[:1].numel(), 1))
    for start in range(0, tensor.shape[0], rows):
        here = slice(start, start + rows)
        _multiply_piece_(tensor[here], [f[here] if f.shape[0] > 1 else f for f in spread])


def _multiply_piece_(piece: Tensor, factors: Sequence[Tensor]) -> None:
    work = piece if factors[0].dtype == piece.dtype else piece.to(factors[0].dtype)
    for factor in factors:
        work = work.mul_(factor)
    if work is not piece:
        piece.copy_(work.to(piece.dtype))


def _spread(factor: Tensor, tensor: Tensor) -> Tensor:
    """The factor, written out along all dimensions behind the first that it varies in.

    A factor per input channel would otherwise be broadcast over a kernel's few positions, which
    leaves an inner loop of nine; written out it is as small as one row of the tensor.
    """
    factor = factor.reshape((1,) * (tensor.dim() - factor.dim()) + tuple(factor.shape))
    if factor[:1].numel() == 1 or factor.shape[0] > 1:
        return factor
    return factor.expand(1, *tensor.shape[1:]).contiguous()


def in_range(
    values: Callable[[str], Tensor],
    exponents: Mapping[str, Factors],
    known: Mapping[str, Extent],
) -> dict[str, Factors]:
    """The factors to multiply each tensor by, in an order that is exact.

    ``values``: the tensor of a name; ``known``: the tensors' magnitudes.

    Raises:
        RangeError: there is none; bits would be lost.
    """
    spans = iter(Joined.of([e for factors in exponents.values() for e in factors]).spans())
    return {
        name: factors
        if known[name].allows([next(spans) for _ in factors])
        else _joined_in_range(name, values(name), factors)
        for name, factors in exponents.items()
    }


def _joined_in_range(name: str, parameter: Tensor, exponents: Factors) -> Factors:
    """One factor for all; tried on a copy."""
    whole = [sum(exponents[1:], exponents[0])]
    part = local_part(parameter.detach())
    factors = local_factors(parameter, whole)
    back = part.clone()
    multiply_(back, factors)
    multiply_(back, factors, -1)
    (lost,) = largest_around(parameter, (int(not torch.equal(back, part)),))
    if lost:
        raise RangeError(
            f"rescaling '{name}' by 2**{whole[0].min():.0f} to 2**{whole[0].max():.0f} leaves "
            f"the normal range of {str(parameter.dtype).removeprefix('torch.')}: bits would be "
            f"lost. Nothing was changed. Use smaller scales or a wider dtype."
        )
    return whole
