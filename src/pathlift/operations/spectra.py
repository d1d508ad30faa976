"""Linear maps along given dimensions: Fourier transforms, and sampling at given positions.

Fourier transforms have complex coefficients of one modulus; the weight of a path is a complex
number there, and the lifted network takes the p-th power of its modulus.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pathlift.capture.program import Call
from pathlift.lifting.tables import Listing, Table
from pathlift.lifting.values import Lifted, Squares
from pathlift.operations.constants import known
from pathlift.operations.table import NoPaths, Operation, Undescribed, define
from pathlift.symmetry.scales import Form, Value

# A sampling matrix of more entries is not built.
_MAX_MATRIX = 2**22

# ------------------------------------------------------------------------------- Fourier


def _tied_scales(inf: Any, call: Call, x: Value, dims: Sequence[int]) -> Any:
    if x.zero:
        return Value(call.shape, Form(call.shape), zero=True)
    return inf.tie(inf.form(x), dims).expand(call.shape)


def _modulus(call: Call) -> float:
    """The modulus of every coefficient; n counts the real or complex signal's values."""
    signal = call.shape if "last_dim_size" in call.arguments else call["self"].shape
    count = math.prod(signal[d] for d in call["dim"])
    return math.pow(count, {0: 0.0, 1: -0.5, 2: -1.0}[call["normalization"]])


def _transformed(c: Squares, call: Call, x: Lifted, weight: Tensor | None = None) -> Lifted:
    if not x.tensor.dim():
        raise Undescribed
    factor = c.coefficient(_modulus(call))
    values = x.tensor if weight is None else x.tensor * weight
    total = values.sum([int(d) for d in call["dim"]], keepdim=True) * factor
    return Lifted(total.expand(call.shape), x.shift).normalised()


def _half_weight(c: Squares, call: Call, x: Lifted) -> Tensor:
    """Of a half spectrum, all but the first and (for an even length) the last entry stand for
    themselves and for their mirror images."""
    d, size = call["dim"][-1] % x.tensor.dim(), call["last_dim_size"]
    weight = 2 * c.ones((x.tensor.shape[d],))
    weight[0] = 1
    if size % 2 == 0:
        weight[size // 2 :] = 1
    return weight.reshape([-1 if i == d else 1 for i in range(x.tensor.dim())])


_COMPLEX = NoPaths("its coefficients are complex numbers, which the listing does not hold")

define(
    "_fft_r2c",
    Operation(
        lambda inf, call, x, dim, normalization, onesided: _tied_scales(inf, call, x, dim),
        lambda c, call, x, dim, normalization, onesided: _transformed(c, call, x),
        _COMPLEX,
    ),
)
define(
    "_fft_c2c",
    Operation(
        lambda inf, call, x, dim, normalization, forward: _tied_scales(inf, call, x, dim),
        lambda c, call, x, dim, normalization, forward: _transformed(c, call, x),
        _COMPLEX,
    ),
)
define(
    "_fft_c2r",
    Operation(
        lambda inf, call, x, dim, normalization, last_dim_size: _tied_scales(inf, call, x, dim),
        lambda c, call, x, dim, normalization, last_dim_size: _transformed(
            c, call, x, _half_weight(c, call, x)
        ),
        _COMPLEX,
    ),
)


# ------------------------------------------------------------------------------- grid sampling


def _sample_scales(
    inf: Any,
    call: Call,
    x: Value,
    grid: Value,
    interpolation_mode: int,
    padding_mode: int,
    align_corners: bool,
) -> Any:
    """Linear in the image for positions of scale 0."""
    inf.pin(grid, "positions of a grid sample")
    return _tied_scales(inf, call, x, range(2, len(x.shape)))


def _matrices(call: Call, shape: Sequence[int], grid: Tensor) -> Tensor | None:
    """Per sample (or one for all), ``(places, positions)``: the coefficients, if that is small."""
    inside = list(shape[2:])
    places, positions = math.prod(inside), math.prod(call.shape[2:])
    if bool((grid == grid[:1]).all()):
        grid = grid[:1]
    if places * positions * len(grid) > _MAX_MATRIX:
        return None
    units = torch.eye(places, dtype=torch.float64, device=grid.device)
    units = units.reshape(places, 1, *inside)
    found = [
        call.run(input=units, grid=g.double().expand(places, *g.shape)).flatten(1) for g in grid
    ]
    return torch.stack(found)


def _sample_squares(
    c: Squares,
    call: Call,
    x: Any,
    grid: Any,
    interpolation_mode: int,
    padding_mode: int,
    align_corners: bool,
) -> Lifted:
    """Where the positions are not known, every place stands at every position, evenly."""
    image: Lifted = c.lifted(x)
    fixed = known(c, call["grid"], grid)
    matrices = None if fixed is None else _matrices(call, image.tensor.shape, fixed)
    if matrices is None:
        c.approximate()
        dims = list(range(2, image.tensor.dim()))
        return image.map(lambda t: t.mean(dims, keepdim=True).expand(call.shape))
    weights = c.coefficient(matrices)
    return image.map(lambda t: (t.flatten(2) @ weights).reshape(call.shape)).normalised()


def _sample_listing(
    c: Listing,
    call: Call,
    x: Any,
    grid: Any,
    interpolation_mode: int,
    padding_mode: int,
    align_corners: bool,
) -> Table:
    matrices = _matrices(call, call["input"].shape, grid) if isinstance(grid, Tensor) else None
    if matrices is None or not isinstance(x, Table):
        raise c.refuse("where it samples depends on the input, or there are too many places")
    batch, channels = x.shape[:2]
    full = matrices.expand(batch, -1, -1)[:, None].expand(-1, channels, -1, -1)
    _, _, places, positions = full.shape
    n, ch, place, position = full.nonzero(as_tuple=True)
    slices = n * channels + ch
    out = (slices * positions + position).numpy()
    source = (slices * places + place).numpy()
    return c.mapped(x, call.shape, out, source, full[n, ch, place, position].numpy())


define(
    "grid_sampler_2d grid_sampler_3d",
    Operation(_sample_scales, _sample_squares, _sample_listing),
)
