"""Resizing: fixed linear maps of each channel's positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathlift.capture.program import Call
from pathlift.lifting.values import Lifted, Squares
from pathlift.operations.gains import once
from pathlift.operations.pools import positions_tied, separable, slicewise, spatial
from pathlift.operations.table import NoPaths, Operation, define


def _nearest(n: int) -> Operation:
    """Every element is one of the input's."""

    def squares(c: Squares, call: Call, x: Lifted, **sizes: Any) -> Lifted:
        first = "input" if "input" in call.arguments else "self"
        dims = range(x.tensor.dim() - n, x.tensor.dim())
        return x.map(lambda t: once(lambda s: call.run(**{first: s}), t, dims))

    return Operation(positions_tied(n), squares, slicewise(n), samples=spatial(n))


def _interpolation(n: int) -> Operation:
    """Separable: one matrix of coefficients per dimension, raised to p."""

    def squares(
        c: Squares,
        call: Call,
        x: Lifted,
        output_size: Any,
        align_corners: bool,
        scales: Any = None,
        scales_d: Any = None,
        scales_h: Any = None,
        scales_w: Any = None,
        scale_factors: Any = None,
    ) -> Lifted:
        own = [scales] if n == 1 else [scales_d, scales_h, scales_w][-n:]
        factors = scale_factors or own
        inside, target = x.tensor.shape[-n:], call.shape[-n:]
        matrices = [
            _matrix(call, n, d, inside[d], target[d], align_corners, factors[d])
            .to(c.device, c.dtype)
            .abs()
            ** c.p
            for d in range(n)
        ]
        return x.map(lambda t: separable(t, matrices))

    return Operation(positions_tied(n), squares, slicewise(n), samples=spatial(n))


def _matrix(
    call: Call, n: int, d: int, size: int, target: int, align: bool, factor: float | None
) -> Tensor:
    """``(in, out)``: the operation on the unit vectors of one dimension, the others constant.

    The others have size 2: with 1, some of PyTorch's kernels read the memory in another order.
    """
    shape, sizes = [size, 1, *[1] * n], [2] * n
    shape[2 + d], sizes[d] = size, target
    factors = [factor if k == d else None for k in range(n)]
    units = torch.eye(size, dtype=torch.float64).reshape(shape)
    full = units.expand([size, 1, *(size if k == d else 2 for k in range(n))]).contiguous()
    found = call.target.overloadpacket.default(full, sizes, align, *factors)
    index = [slice(None) if k == d else 0 for k in range(n)]
    return torch.as_tensor(found[(slice(None), 0, *index)])


for _n, _linear in ((1, "linear"), (2, "bilinear"), (3, "trilinear")):
    define(f"upsample_nearest{_n}d _upsample_nearest_exact{_n}d", _nearest(_n))
    define(f"upsample_{_linear}{_n}d", _interpolation(_n))

define(
    "upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa",
    _interpolation(2),
)

# ------------------------------------------------------------------------------- unpooling


def _unpool(n: int) -> Operation:
    """Values go where indices say; readings don't know where and spread them evenly."""

    def squares(c: Squares, call: Call, x: Lifted, indices: Any, output_size: Any, **_: Any) -> Any:
        c.approximate()
        dims = tuple(range(x.tensor.dim() - n, x.tensor.dim()))
        count = call.shape[-n:].numel()
        return x.map(lambda t: (t.sum(dims, keepdim=True) / max(count, 1)).expand(call.shape))

    return Operation(positions_tied(n), squares, NoPaths("its paths depend on the data"))


define("max_unpool2d", _unpool(2))
define("max_unpool3d", _unpool(3))
