"""Pooling: the same positively homogeneous map of each channel's positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pathlift.capture.program import Call
from pathlift.lifting.tables import Listing, Table
from pathlift.lifting.values import Lifted, Squares
from pathlift.operations.gains import once
from pathlift.operations.table import Operation, define
from pathlift.symmetry.scales import Value, values_in

# Unit vectors are run through an operation in batches of this many numbers.
_BATCH_ENTRIES = 2**22


def spatial(n: int) -> Callable[[Call], tuple[str, ...]]:
    """Whether the first of the dimensions before the last n is one of samples."""
    return lambda call: ("x",) if len(call.shape) >= n + 2 else ()


def positions_tied(n: int) -> Callable[..., Any]:
    """The scales reading of any map of the last n dimensions, whatever its other numbers."""

    def scales(inf: Any, call: Call, x: Value, **others: Any) -> Any:
        for value in values_in(others):
            inf.pin(value, f"argument of {call.name}")
        if x.zero:
            form = inf.form(inf.fixed(call.shape))
        else:
            dims = range(len(x.shape) - n, len(x.shape))
            form = inf.tie(inf.form(x), dims).expand(call.shape)
        return [form, inf.fixed(call.shape)] if call.several else form

    return scales


def slicewise(n: int, **fixed: Callable[[Tensor], Tensor]) -> Callable[..., Table]:
    """The listing reading of such a map: its coefficients are its values on unit vectors.

    (Of max pooling: 1 where the window holds the unit.) ``fixed``: arguments to run it with, made
    from the unit vectors.
    """

    def listing(c: Listing, call: Call, x: Table, **others: Any) -> Table:
        inside, target = x.shape[-n:], call.shape
        size, count = math.prod(inside), math.prod(target[-n:])
        first = "input" if "input" in call.arguments else "self"
        step = max(1, _BATCH_ENTRIES // max(size, 1))
        found, weights = [torch.zeros((2, 0), dtype=torch.int64)], [torch.zeros(0).double()]
        for start in range(0, size, step):
            units = torch.eye(size, dtype=torch.float64)[start : start + step]
            units = units.reshape(-1, 1, *inside)
            value = call.run(**{first: units}, **{k: make(units) for k, make in fixed.items()})
            value = (value[0] if isinstance(value, (list, tuple)) else value).flatten(1)
            # A window of padding alone is 0 / 0 or -inf; it holds no path.
            value = value.nan_to_num(0.0, 0.0, 0.0)
            unit, position = value.nonzero(as_tuple=True)
            found.append(torch.stack([position, unit + start]))
            weights.append(value[unit, position])
        out, source = torch.cat(found, 1).numpy()
        slices = np.arange(x.size // max(size, 1))[:, None]
        return c.mapped(
            x,
            target,
            (slices * count + out).reshape(-1),
            (slices * size + source).reshape(-1),
            np.tile(torch.cat(weights).numpy(), len(slices)),
        )

    return listing


def separable(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """One matrix ``(in, out)`` per dimension of the last ones."""
    n = len(matrices)

    def apply(out: Tensor) -> Tensor:
        for d, matrix in enumerate(matrices):
            axis = out.dim() - n + d
            out = torch.movedim(torch.movedim(out, axis, -1) @ matrix, -1, axis)
        return out

    return once(apply, x, range(x.dim() - n, x.dim()))


def _numbers(value: Any, n: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * n if len(values) == 1 else values


# ------------------------------------------------------------------------------- windows


def _window_sum(
    x: Tensor,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    target: Sequence[int],
) -> Tensor:
    """Sum over each window, by a convolution with ones (any dilation, ceil mode by padding)."""
    n = len(size)
    if n == 2 and set(dilation) == {1}:
        out = F.avg_pool2d(x, size, stride, padding, True, True, divisor_override=1)
        if out.shape[-2:] == tuple(target):
            return out
    lead = x.shape[: x.dim() - n]
    flat = x.reshape(-1, 1, *x.shape[-n:])
    pads: list[int] = []
    for d in range(n):
        reach = (target[d] - 1) * stride[d] + dilation[d] * (size[d] - 1) + 1
        pads = [padding[d], max(reach - flat.shape[2 + d] - padding[d], 0), *pads]
    flat = F.pad(flat, pads)
    weight = x.new_ones((1, 1, *size))
    convolve = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    out = convolve(flat, weight, stride=stride, dilation=dilation)
    for d in range(n):
        out = out.narrow(2 + d, 0, target[d])
    return out.reshape(*lead, *target)


def _max_pool(n: int) -> Operation:
    def squares(
        c: Squares,
        call: Call,
        x: Lifted,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> Any:
        """Every path through a maximum is kept."""
        size = _numbers(kernel_size, n)
        step = _numbers(stride, n) if stride else size
        pad, apart, target = _numbers(padding, n), _numbers(dilation, n), call.shape[-n:]
        out = x.map(lambda t: _window_sum(t, size, step, pad, apart, target)).normalised()
        return [out, None] if call.several else out

    return Operation(positions_tied(n), squares, slicewise(n), samples=spatial(n))


def _avg_pool(n: int) -> Operation:
    def squares(
        c: Squares,
        call: Call,
        x: Lifted,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: Any = None,
    ) -> Lifted:
        size, pad = _numbers(kernel_size, n), _numbers(padding, n)
        step, target = _numbers(stride, n) if stride else size, call.shape[-n:]
        one = (1,) * n
        unit = c.ones((1, 1, *x.tensor.shape[-n:]))
        # Each output position has one coefficient 1 / divisor; read it off the operation itself.
        mean = call.run(self=unit)
        count = _window_sum(unit, size, step, pad, one, target)
        # A window of padding alone (count 0) holds no path.
        weight = torch.where(count > 0, mean / count.clamp_min(1), 0.0).reshape(target) ** c.p
        return x.map(lambda t: _window_sum(t, size, step, pad, one, target) * weight).normalised()

    return Operation(positions_tied(n), squares, slicewise(n), samples=spatial(n))


def _adaptive(n: int, averaged: bool) -> Operation:
    pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[n - 1]

    def squares(c: Squares, call: Call, x: Lifted, output_size: Any) -> Any:
        target, inside = call.shape[-n:], x.tensor.shape[-n:]
        count = c.ones(target)
        for d in range(n):
            widths = [
                -(-(i + 1) * inside[d] // target[d]) - i * inside[d] // target[d]
                for i in range(target[d])
            ]
            view = [1] * n
            view[d] = -1
            count = count * torch.tensor(widths, dtype=c.dtype).to(c.device).reshape(view)
        weight = count ** (1 - c.p) if averaged else count
        out = x.map(lambda t: pool(t, list(target)) * weight).normalised()
        return [out, None] if call.several else out

    return Operation(positions_tied(n), squares, slicewise(n), samples=spatial(n))


for _n in (1, 2, 3):
    define(f"max_pool{_n}d max_pool{_n}d_with_indices", _max_pool(_n))
    define(f"avg_pool{_n}d", _avg_pool(_n))
    define(f"adaptive_avg_pool{_n}d _adaptive_avg_pool{_n}d", _adaptive(_n, averaged=True))
    define(f"adaptive_max_pool{_n}d", _adaptive(_n, averaged=False))

# ------------------------------------------------------------------------------- random windows


def _middle(n: int) -> Callable[[Tensor], Tensor]:
    """The draws in the middle of their range, for inputs of one channel."""
    return lambda units: torch.full((len(units), 1, n), 0.5, dtype=units.dtype, device=units.device)


def _fractional(n: int) -> Operation:
    """Windows begin where random numbers say; readings take the middle of their range."""

    def squares(
        c: Squares,
        call: Call,
        x: Lifted,
        kernel_size: Any,
        output_size: Any,
        random_samples: Any,
    ) -> Any:
        """Every path through a maximum is kept."""
        size, target, inside = _numbers(kernel_size, n), call.shape[-n:], x.tensor.shape[-n:]
        # On growing numbers the maximum is the last corner of each window.
        ramp = torch.arange(math.prod(inside), dtype=c.dtype).reshape(1, 1, *inside)
        last = call.run(self=ramp, random_samples=_middle(n)(ramp))[1].reshape(target)
        corner = torch.unravel_index(last, tuple(inside))
        matrices = []
        for d in range(n):
            ends = corner[d].movedim(d, -1).reshape(-1, target[d])[0]
            behind = ends - torch.arange(inside[d])[:, None]
            held = (behind >= 0) & (behind < size[d])
            matrices.append(held.to(c.device, c.dtype))
        return [x.map(lambda t: separable(t, matrices)).normalised(), None]

    listing = slicewise(n, random_samples=_middle(n))
    return Operation(positions_tied(n), squares, listing, samples=spatial(n))


define("fractional_max_pool2d", _fractional(2))
define("fractional_max_pool3d", _fractional(3))
