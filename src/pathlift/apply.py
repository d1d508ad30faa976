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
        changes = [(n, p, in_range(n, p, exponents)) for n, p, exponents in changes]
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
    multiply_by_(tensor, power_factors(tensor.dtype, exponents, power))


def power_factors(dtype: torch.dtype, exponents: Factors, power: int = 1) -> list[Tensor]:
    """``2 ** (power * e)`` for each exponent tensor, in the dtype that the product needs."""
    wide = dtype in (torch.float64, torch.float32)
    largest = abs(power) * sum(float(e.abs().max()) for e in exponents)
    compute = dtype if wide and largest < 100 else torch.float64
    found = []
    for exponent in exponents:
        scaled = (exponent * power).numpy()
        whole = np.rint(scaled)
        factor = np.asarray(np.ldexp(np.exp2(scaled - whole), whole.astype(np.int64)))
        found.append(torch.from_numpy(factor).to(compute))
    return found


def multiply_by_(tensor: Tensor, factors: Sequence[Tensor]) -> None:
    """Multiply by every factor in turn, in the factors' dtype, and round once."""
    if not factors:
        return
    compute = factors[0].dtype
    work = tensor if compute == tensor.dtype else tensor.to(compute)
    for factor in factors:
        work = work.mul_(factor.to(tensor.device))
    if work is not tensor:
        tensor.copy_(work.to(tensor.dtype))


def exponent_range(tensor: Tensor) -> tuple[int, int] | None:
    """Smallest and largest binary exponent of the non-zero entries (None if there are none)."""
    if not tensor.numel():
        return None
    size = tensor.detach()
    top = float(torch.linalg.vector_norm(size, math.inf))
    if top == 0 or not math.isfinite(top):
        return None
    low = float(torch.linalg.vector_norm(size, -math.inf))
    if low == 0:
        low = float(torch.linalg.vector_norm(size[size != 0], -math.inf))
    return math.frexp(low)[1] - 1, math.frexp(top)[1] - 1


def exponent_limits(dtype: torch.dtype) -> tuple[int, int]:
    """Binary exponents of the smallest and the largest normal number of a dtype."""
    info = torch.finfo(dtype)
    return int(np.frexp(info.tiny)[1]) - 1, int(np.frexp(info.max)[1]) - 1


@dataclass(frozen=True)
class Extent:
    """What is known of a tensor's magnitudes: its dtype and :func:`exponent_range`."""

    dtype: torch.dtype
    exponents: tuple[int, int] | None

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
    """The magnitudes of a tensor."""
    return Extent(tensor.dtype, exponent_range(tensor))


def in_range(name: str, parameter: Tensor, exponents: Factors) -> Factors:
    """The factors to multiply by, in an order that is exact.

    Raises:
        RangeError: there is none; bits would be lost.
    """
    if extent(parameter).allows(exponents):
        return exponents
    joined = [sum(exponents[1:], exponents[0])]
    moved = parameter.detach().clone()
    multiply_(moved, joined)
    back = moved.clone()
    multiply_(back, joined, -1)
    if not torch.equal(back, parameter.detach()):
        raise RangeError(
            f"rescaling '{name}' by 2**{joined[0].min():.0f} to 2**{joined[0].max():.0f} leaves "
            f"the normal range of {str(parameter.dtype).removeprefix('torch.')}: bits would be "
            f"lost. Nothing was changed. Use smaller scales or a wider dtype."
        )
    return joined


def scale_bounds(
    group: RescalingGroup, parameters: Mapping[str, Tensor]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds ``(H,)`` on the free log2 scales within which no parameter leaves its dtype's range.

    A tensor's headroom is shared equally among the scales that multiply it; activations keep half
    of the dtype's exponent range.
    """
    scaled = [n for n, spec in group.parameters.items() if spec.terms]
    return extent_bounds(group, {n: extent(parameters[n]) for n in scaled})


def extent_bounds(
    group: RescalingGroup, extents: Mapping[str, Extent]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """:func:`scale_bounds` of tensors of which only the magnitudes are known."""
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
