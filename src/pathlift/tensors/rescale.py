"""Multiply a set of tensors by powers of two: all of them or none, and exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from pathlift.errors import ArgumentError, RangeError
from pathlift.tensors.extents import Extent, Factors, Joined, extents
from pathlift.tensors.pieces import entries_at_a_time
from pathlift.tensors.shards import largest_around, local_factors, local_part
from pathlift.tensors.state import Optimizers, state_changes

# Puts everything back as it was, bit for bit.
Undo = Callable[[], None]

# Tensors of fewer entries are multiplied together: each would cost more to start than to read.
_SMALL = 1 << 14
# Where several tensors are worked on in one call.
_TOGETHER = ("cpu", "cuda", "xpu")


@dataclass(frozen=True)
class Target:
    """``tensor *= 2 ** (power * sum(exponents))``.

    Attributes:
        tensor: what this process holds; changed in place.
        exponents: log2 factors, float64, each of a shape that broadcasts to the tensor's.
        power: of the factors.
        exact: whether the inverse factors take it back bit for bit.
    """

    tensor: Tensor
    exponents: Factors
    power: int = 1
    exact: bool = False


def rescale_(
    tensors: Mapping[str, Tensor],
    exponents: Mapping[str, Factors],
    optimizer: Optimizers = None,
    known: Mapping[str, Extent] | None = None,
) -> Undo:
    """Multiply ``tensors[n]`` by ``2 ** sum(exponents[n])``, in place; all of them or none.

    Args:
        tensors: name -> dense floating-point tensor; of a DTensor, this process's part is changed.
        exponents: name -> log2 factors, float64, each of a shape that broadcasts to the tensor's.
            If all are integers, every bit of the significands is kept.
        optimizer: whose state of these tensors is carried along.
        known: the tensors' magnitudes, if they have been looked at already.

    Returns:
        A function that puts everything back. Until it is let go, copies of what powers of two
        don't take back exactly are kept.

    Raises:
        RangeError: a tensor would leave the normal range of its dtype.
        ArgumentError: state of the optimiser whose transformation is not known, or an expanded
            tensor.
    """
    for name in exponents:
        check_memory(name, tensors[name])
    exact = whole(exponents)
    if exact:
        known = known or extents({n: tensors[n] for n in exponents})
        exponents = in_range(tensors.__getitem__, exponents, known)
    changes = [(n, tensors[n], e) for n, e in exponents.items()]
    states = state_changes(optimizer, changes)
    targets = [_target(t.data, e, 1, exact) for _, t, e in changes]
    # State may underflow (the momentum of a dead unit), so it is never exact.
    return multiply_all_([*targets, *(_target(t, e, power, False) for t, e, power in states)])


def check_memory(name: str, tensor: Tensor) -> None:
    if any(stride == 0 and n > 1 for stride, n in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ArgumentError(
            f"'{name}' is expanded: of its {tensor.numel()} entries several share one place in "
            f"memory (strides {tuple(tensor.stride())}), so they can't be multiplied by factors "
            f"of their own. Give it memory of its own: .clone()."
        )


def whole(exponents: Mapping[str, Factors]) -> bool:
    """Whether all log2 factors are integers."""
    entries = Joined.of([e for factors in exponents.values() for e in factors]).entries
    return bool((entries == np.rint(entries)).all())


def multiply_(tensor: Tensor, exponents: Factors, power: int = 1) -> None:
    """``tensor *= 2 ** (power * sum(exponents))``; exact for integer exponents."""
    multiply_all_([_target(tensor, exponents, power, False)])


def multiply_into_(
    tensors: Mapping[str, Tensor], source: Mapping[str, Tensor], exponents: Mapping[str, Factors]
) -> None:
    """``tensors[n] = source[n] * 2 ** sum(exponents[n])``; without exponents, what the source has.

    Args:
        tensors: name -> dense tensor; written.
        source: name -> tensor of the same shape and dtype, in memory of its own.
        exponents: log2 factors by name, float64, of shapes that broadcast.
    """
    targets = [Target(t, exponents.get(n, [])) for n, t in tensors.items()]
    with torch.no_grad():
        for name, target, factors in zip(tensors, targets, power_factors(targets), strict=True):
            multiply_by_(target.tensor, factors, source[name])


def _target(tensor: Tensor, exponents: Factors, power: int, exact: bool) -> Target:
    return Target(local_part(tensor), local_factors(tensor, exponents), power, exact)


def multiply_all_(targets: Sequence[Target]) -> Undo:
    """Multiply every target; if one fails, those before it are as they were.

    Parameters stay in the normal range, so that the inverse factor takes a large one back without
    a copy.
    """
    undo: list[Undo] = []

    def restore() -> None:
        with torch.no_grad():
            while undo:
                undo.pop()()

    with torch.no_grad():
        try:
            factors = power_factors(targets)
            together: dict[object, list[int]] = {}
            for k, target in enumerate(targets):
                if _is_small(target.tensor):
                    kind = (target.tensor.dtype, target.tensor.device, _dtype(factors[k]))
                    together.setdefault(kind, []).append(k)
                elif factors[k]:
                    _multiply_one_(target, factors[k], undo)
            for members in together.values():
                _multiply_together_(
                    [targets[k].tensor for k in members], [factors[k] for k in members], undo
                )
        except BaseException:
            restore()
            raise
    return restore


def _multiply_one_(target: Target, factors: Sequence[Tensor], undo: list[Undo]) -> None:
    tensor = target.tensor
    if not target.exact:
        undo.append(partial(_copy_back_, [tensor], [tensor.clone()]))
    multiply_by_(tensor, factors)
    if target.exact:
        inverse = Target(tensor, target.exponents, -target.power)
        undo.append(partial(_multiply_back_, inverse))


def _multiply_back_(target: Target) -> None:
    multiply_by_(target.tensor, power_factors([target])[0])


def _copy_back_(tensors: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    for tensor, copy in zip(tensors, kept, strict=True):
        # What could not be written to was not changed and can't be written to now.
        if not torch.equal(tensor, copy):
            tensor.copy_(copy)


def _is_small(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type in _TOGETHER
    return plain and 0 < tensor.numel() < _SMALL and tensor.dim() > 0


def _dtype(factors: Sequence[Tensor]) -> torch.dtype | None:
    return factors[0].dtype if factors else None


def _multiply_together_(
    tensors: Sequence[Tensor], factors: Sequence[Sequence[Tensor]], undo: list[Undo]
) -> None:
    """Multiply tensors of one dtype on one device by factors of one dtype, and round once."""
    wide = _dtype(factors[0])
    if wide is None:
        return
    undo.append(partial(_copy_back_, tensors, [t.clone() for t in tensors]))
    work = list(tensors) if tensors[0].dtype == wide else [t.to(wide) for t in tensors]
    for k in range(max(map(len, factors))):
        there = [(w, f[k]) for w, f in zip(work, factors, strict=True) if len(f) > k]
        torch._foreach_mul_([w for w, _ in there], [f for _, f in there])
    if tensors[0].dtype != wide:
        torch._foreach_copy_(list(tensors), work)


def power_factors(targets: Sequence[Target]) -> list[list[Tensor]]:
    """``2 ** (power * e)`` of every exponent tensor, in the dtype that its product needs.

    Powers of two are made by ``ldexp`` on the host, never by a rounding ``pow``; all at once, since
    a model has hundreds of small ones.
    """
    joined = Joined.of([e for target in targets for e in target.exponents])
    powers = np.asarray([t.power for t in targets for _ in t.exponents], dtype=np.float64)
    scaled = joined.entries * np.repeat(powers, joined.sizes)
    rounded = np.rint(scaled)
    wide = torch.from_numpy(np.ldexp(np.exp2(scaled - rounded), rounded.astype(np.int64)))
    sizes = joined.sizes.tolist()
    made: dict[tuple[torch.dtype, torch.device], tuple[Tensor, ...]] = {}
    reach = [max(-low, high) for low, high in joined.spans()]
    found, k = [], 0
    for target in targets:
        dtype, device = target.tensor.dtype, target.tensor.device
        stop = k + len(target.exponents)
        largest = abs(target.power) * sum(reach[k:stop])
        plain = dtype in (torch.float64, torch.float32) and largest < 100
        kind = (dtype if plain else torch.float64, device)
        if kind not in made and stop > k:
            made[kind] = wide.to(device, kind[0]).split(sizes)
        here = range(k, stop)
        found.append([made[kind][j].view(target.exponents[j - k].shape) for j in here])
        k = stop
    return found


def multiply_by_(tensor: Tensor, factors: Sequence[Tensor], source: Tensor | None = None) -> None:
    """Multiply by every factor in turn, in the factors' dtype, and round once.

    A piece that fits the cache is multiplied by all factors before the next one, so that memory is
    read and written once. If a piece fails, those before it are divided again (exact for powers of
    two that stay in range).

    Args:
        tensor: changed in place.
        factors: broadcast to its shape.
        source: what is multiplied, of the tensor's shape; None: the tensor itself.
    """
    if not tensor.numel() or not (factors or source is not None):
        return
    if not tensor.dim():
        tensor, source = tensor.view(1), None if source is None else source.view(1)
    spread = [_spread(f.to(tensor.device), tensor) for f in factors]
    size = entries_at_a_time(tensor.device)
    rows = max(1, size // max(tensor[:1].numel(), 1))
    pieces = [slice(start, start + rows) for start in range(0, tensor.shape[0], rows)]
    done = 0
    try:
        for here in pieces:
            if source is not None:
                tensor[here].copy_(source[here])
            _multiply_piece_(tensor[here], [_rows(f, here) for f in spread])
            done += 1
    except BaseException:
        for here in pieces[:done] if source is None else ():
            _multiply_piece_(tensor[here], [_rows(f, here).reciprocal() for f in spread])
        raise


def _rows(factor: Tensor, here: slice) -> Tensor:
    return factor[here] if factor.shape[0] > 1 else factor


def _multiply_piece_(piece: Tensor, factors: Sequence[Tensor]) -> None:
    if not factors:
        return
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
