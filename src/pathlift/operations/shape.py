"""Shape operations: views, moves and patches. They are executed on ids and element numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathlift.capture.program import Call
from pathlift.lifting.tables import Listing, Table, numbers
from pathlift.lifting.values import Lifted, Squares
from pathlift.operations.kinds import identity, moves
from pathlift.operations.table import Operation, define
from pathlift.symmetry.scales import Form, Value, compact

define(
    "permute transpose t expand slice select diagonal unfold split split_with_sizes unbind "
    "unsafe_split unsafe_split_with_sizes roll flip rot90 repeat pixel_shuffle pixel_unshuffle "
    "permute_copy transpose_copy t_copy expand_copy slice_copy select_copy diagonal_copy "
    "unfold_copy split_copy split_with_sizes_copy unbind_copy",
    moves,
)


def _narrow_squares(
    c: Squares, call: Call, x: Lifted, dim: Any = 0, start: Any = 0, length: Any = 1
) -> Lifted:
    """As a view, which has a derivative in every torch; the copy has none in 2.11, say."""

    def part(t: Tensor) -> Tensor:
        return t.narrow(call["dim"], call["start"], call["length"])

    return Lifted(part(x.tensor), x.shift, None if x.gain is None else part(x.gain))


define("narrow_copy", moves.but(squares=_narrow_squares))

define(
    "alias detach clone lift lift_fresh alias_copy detach_copy lift_fresh_copy",
    identity,
)


# ------------------------------------------------------------------------------- reshaping


def reshaped(ids: Tensor, shape: Sequence[int]) -> Tensor:
    """Reshape; an expanded leading dimension stays expanded instead of being copied."""
    shape = tuple(shape)
    if ids.dim() > 1 and len(shape) > 1 and shape[0] == ids.shape[0] and ids.stride(0) == 0:
        inner = ids[:1].reshape(1, *shape[1:])
        kept = inner.data_ptr() == ids.data_ptr()
        return (inner if kept else compact(inner)).expand(shape)
    out = ids.reshape(shape)
    return out if out.data_ptr() == ids.data_ptr() else compact(out)


def _reshape_scales(
    inf: Any,
    call: Call,
    x: Value,
    size: Any = None,
    shape: Any = None,
    stride: Any = None,
    dim: Any = None,
) -> Any:
    """The output's shape says all. A ``view`` as another dtype sets an argument not named here."""
    if x.zero:
        return Value(call.shape, Form(call.shape), zero=True)
    return inf.form(x).map(lambda ids: reshaped(ids, call.shape), call.shape)


def _reshape_squares(
    c: Squares,
    call: Call,
    x: Lifted,
    size: Any = None,
    shape: Any = None,
    stride: Any = None,
    dim: Any = None,
) -> Lifted:
    gain = None if x.gain is None else x.gain.expand(x.tensor.shape).reshape(call.shape)
    return Lifted(x.tensor.reshape(call.shape), x.shift, gain)


def _reshape_listing(
    c: Listing,
    call: Call,
    x: Table,
    size: Any = None,
    shape: Any = None,
    stride: Any = None,
    dim: Any = None,
) -> Table:
    return x.reshaped(call.shape)


define(
    "view reshape _unsafe_view _reshape_alias squeeze unsqueeze view_copy _reshape_copy "
    "squeeze_copy unsqueeze_copy _reshape_alias_copy",
    Operation(_reshape_scales, _reshape_squares, _reshape_listing),
)


# ------------------------------------------------------------------------------- shuffles, zeroing


def _shuffle_scales(inf: Any, call: Call, x: Value, groups: int) -> Any:
    """Written as views: the operation itself has no kernel for integers on every device."""
    batch, channels, *rest = x.shape
    split = [batch, groups, channels // groups, *rest]
    return inf.form(x).map(
        lambda ids: reshaped(reshaped(ids, split).transpose(1, 2), call.shape), call.shape
    )


define("channel_shuffle", moves.but(scales=_shuffle_scales))


def _zeroing_scales(inf: Any, call: Call, x: Value, diagonal: int = 0) -> Any:
    """What becomes zero may carry any scale: the one it had."""
    if x.zero:
        return x
    return inf.form(x)


define("tril triu", moves.but(scales=_zeroing_scales))


def _diag_embed_scales(
    inf: Any, call: Call, x: Value, offset: int = 0, dim1: int = -2, dim2: int = -1
) -> Any:
    """The zeros around the diagonal may carry any scale: new ones."""
    if x.zero:
        return Value(call.shape, Form(call.shape), zero=True)
    if inf.form(x).pinned:
        return Form(call.shape, why=inf.form(x).why)
    ids = call.run(self=inf.single(x))
    empty = call.run(self=torch.ones(x.shape, dtype=torch.bool)) == 0
    ids[empty] = inf.fresh([int(empty.sum())])
    return Form(call.shape, ((1, compact(ids)),))


define("diag_embed", moves.but(scales=_diag_embed_scales))


# ------------------------------------------------------------------------------- patches


def _im2col_scales(
    inf: Any,
    call: Call,
    x: Value,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Any:
    """Patches: each channel repeated for every position of the kernel."""
    axis = len(x.shape) - 3
    first = inf.tie(inf.form(x), [axis + 1, axis + 2])
    count = math.prod(kernel_size)

    def patches(ids: Tensor) -> Tensor:
        out = ids.squeeze(-1).repeat_interleave(count, axis)
        return compact(out).expand(call.shape)

    return first.map(patches, call.shape)


define("im2col", moves.but(scales=_im2col_scales))


def _col2im_scales(
    inf: Any,
    call: Call,
    x: Value,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Any:
    """Sums of patches: one scale per channel."""
    axis = len(x.shape) - 2
    count = math.prod(kernel_size)
    form = inf.tie(inf.form(x), [axis + 1])
    split = [*x.shape[:axis], x.shape[axis] // count, count, 1]
    grouped = form.map(lambda t: t.reshape(split), split)
    tied = inf.tie(grouped, [axis + 1])
    return tied.expand([*split[:-2], 1, 1]).expand(call.shape)


def _col2im_squares(
    c: Squares,
    call: Call,
    x: Lifted,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Lifted:
    return x.map(lambda t: call.run(self=t)).normalised()


def _col2im_listing(
    c: Listing,
    call: Call,
    x: Table,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Table:
    """The adjoint of cutting the output into patches, which says where each entry goes."""
    cut = torch.ops.aten.im2col(numbers(call.shape), kernel_size, dilation, padding, stride)
    out = cut.reshape(-1).to(torch.int64).numpy()
    source = np.flatnonzero(out)
    return c.mapped(x, call.shape, out[source] - 1, source)


define("col2im", Operation(_col2im_scales, _col2im_squares, _col2im_listing))
