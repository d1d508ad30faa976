"""Linear maps: fully connected layers, convolutions, embeddings.

The weight carries the scale of its output minus that of its input; the input is tied over what the
weight is shared over (samples, positions), the output is free per channel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pathlift.capture.program import Call
from pathlift.lifting.parameters import LiftedRows
from pathlift.lifting.tables import Listing, Table, numbers
from pathlift.lifting.values import Lifted, Squares
from pathlift.operations.contraction import bilinear, plus, with_bias
from pathlift.operations.gains import lifted, table
from pathlift.operations.matrices import Pairing
from pathlift.operations.table import Operation, define
from pathlift.symmetry.scales import Form, Value, add_forms

# ------------------------------------------------------------------------------- linear


def _linear_labels(x: int, w: int) -> tuple[list[int], list[int], list[int]]:
    """``y[..., o] = sum_i w[o, i] x[..., i]``, from the ranks; a vector as weight lacks o."""
    lead = list(range(x - 1))
    i, o = x - 1, x
    return ([*lead, i], [i], lead) if w == 1 else ([*lead, i], [o, i], [*lead, o])


_LINEAR = Pairing(_linear_labels, F.linear)


def _linear_scales(inf: Any, call: Call, x: Value, weight: Value, bias: Any = None) -> Any:
    return plus(inf, _LINEAR.scales(inf, x, weight, call.shape), bias, call.shape)


def _linear_squares(c: Squares, call: Call, x: Any, weight: Any, bias: Any = None) -> Lifted:
    x, w = lifted(c, x), lifted(c, weight)
    rows: Any = w.tensor  # of which a few exist at a time
    by_rows = isinstance(rows, LiftedRows)
    product = rows.linear(x.tensor) if by_rows else F.linear(x.tensor, w.tensor)
    return c.plus(Lifted(product, x.shift + w.shift), bias).normalised()


def _linear_listing(c: Listing, call: Call, x: Any, weight: Any, bias: Any = None) -> Table:
    y = _LINEAR.listing(c, x, weight)
    return y if bias is None else c.sum(y, table(c, bias))


define(
    "linear",
    Operation(_linear_scales, _linear_squares, _linear_listing, samples=lambda call: ("x",)),
)


# ------------------------------------------------------------------------------- convolutions


def _convolve(
    inf: Any, call: Call, x: Value, w: Value, b: Value | None, groups: int, transposed: bool
) -> Form:
    """Weight ``(out, in / groups, *kernel)``; transposed ``(in, out / groups, *kernel)``."""
    kernel = (1,) * (len(w.shape) - 2)
    axis = len(x.shape) - len(kernel) - 1
    shape = call.shape
    entering, count = x.shape[axis], shape[axis]
    first = inf.tie(inf.form(x), [d for d in range(len(x.shape)) if d != axis])
    channels = first.map(lambda t: t.reshape(entering), (entering,))
    out = inf.fresh((count,))
    inside, outside = entering // groups, count // groups
    # (groups, out / groups, in / groups) as views; scales follow by reshaping alone.
    grid = (groups, inside, outside) if transposed else (groups, outside, inside)

    def per_out(t: Tensor) -> Tensor:
        return t.reshape((groups, 1, outside) if transposed else (groups, outside, 1)).expand(grid)

    def per_in(t: Tensor) -> Tensor:
        return t.reshape((groups, inside, 1) if transposed else (groups, 1, inside)).expand(grid)

    def on_weight(t: Tensor) -> Tensor:
        return t.reshape(*w.shape[:2], *kernel).expand(w.shape)

    columns = channels.map(lambda t: on_weight(per_in(t)), w.shape)
    inf.note_input(w, columns)
    rows = Form(w.shape, ((1, on_weight(per_out(out))),))
    inf.bind(w, add_forms(rows, columns.scaled(-1)))
    if b is not None:
        inf.bind(b, Form(b.shape, ((1, out),)))
    view = [1] * len(shape)
    view[axis] = count
    return Form(shape, ((1, out.reshape(view).expand(shape)),))


def _conv_squares(c: Squares, call: Call, x: Any, w: Any, b: Any) -> Lifted:
    x, w = lifted(c, x), lifted(c, w)
    # On the host PyTorch's gradient of a grouped convolution is wrong for a weight in channels-last
    # order where the one sample is a view of stride 0 (up to 2.13 at least).
    out = call.run(input=x.tensor.contiguous(), weight=w.tensor.contiguous(), bias=None)
    spatial = w.tensor.dim() - 2
    return c.plus(Lifted(out, x.shift + w.shift), b, (-1,) + (1,) * spatial).normalised()


def _conv_listing(c: Listing, call: Call, x: Any, w: Any, b: Any) -> Table:
    x, w = table(c, x), table(c, w)

    def function(left: Tensor, right: Tensor) -> Tensor:
        return call.run(input=left, weight=right, bias=None)

    return with_bias(c, bilinear(c, function, x, w), b, 1 - len(w.shape))


def _samples(call: Call) -> tuple[str, ...]:
    """A batch has one dimension more than one sample, whose first are the channels."""
    return ("x",) if len(call.shape) == len(call["weight"].shape) else ()


def _convolution(turned: bool) -> Operation:
    """``turned``: transposed, where the call doesn't say it itself."""

    def scales(
        inf: Any,
        call: Call,
        x: Value,
        weight: Value,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        output_padding: Any = 0,
        transposed: bool = turned,
    ) -> Form:
        return _convolve(inf, call, x, weight, bias, groups, transposed)

    def squares(
        c: Squares,
        call: Call,
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        output_padding: Any = 0,
        transposed: bool = turned,
    ) -> Lifted:
        return _conv_squares(c, call, x, weight, bias)

    def listing(
        c: Listing,
        call: Call,
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        output_padding: Any = 0,
        transposed: bool = turned,
    ) -> Table:
        return _conv_listing(c, call, x, weight, bias)

    return Operation(scales, squares, listing, samples=_samples)


define("conv1d conv2d conv3d convolution", _convolution(turned=False))
define("conv_transpose1d conv_transpose2d conv_transpose3d", _convolution(turned=True))


# ------------------------------------------------------------------------------- embeddings


def _rows(inf: Any, weight: Value) -> Form:
    """Scales ``(columns,)`` of a table of which any row may be taken: fresh per column."""
    count = weight.shape[1]
    if inf.is_new(weight):
        out = inf.fresh((1, count))
        inf.bind(weight, Form(weight.shape, ((1, out.expand(weight.shape)),)))
        return Form(torch.Size((count,)), ((1, out[0]),))
    return inf.tie(inf.form(weight), [0]).map(lambda t: t.reshape(count), (count,))


def _taken(c: Squares, weight: Lifted, indices: Any, omitted: int = -1) -> Tensor:
    """The rows at known indices; at unknown ones the paths of all rows."""
    if isinstance(indices, Tensor):
        return F.embedding(indices.long(), weight.tensor)
    rows = torch.arange(weight.tensor.shape[0], device=c.device) != omitted
    return weight.tensor[rows].sum(0)


def _embedding_scales(
    inf: Any,
    call: Call,
    weight: Value,
    indices: Value,
    padding_idx: Any = -1,
    scale_grad_by_freq: Any = False,
    sparse: Any = False,
) -> Any:
    """A linear map of one-hot vectors."""
    if weight.zero:
        return Value(call.shape, Form(call.shape), zero=True)
    return _rows(inf, weight).expand(call.shape)


def _embedding_squares(
    c: Squares,
    call: Call,
    weight: Any,
    indices: Any,
    padding_idx: Any = -1,
    scale_grad_by_freq: Any = False,
    sparse: Any = False,
) -> Lifted:
    w = lifted(c, weight)
    return Lifted(_taken(c, w, indices).expand(call.shape), w.shift)


def _every(rows: int, columns: int, omitted: int = -1) -> tuple[Tensor, Tensor]:
    """``(row, column)`` of every entry of a table, rows that are omitted left out."""
    kept = torch.arange(rows)[torch.arange(rows) != omitted]
    row, column = torch.meshgrid(kept, torch.arange(columns), indexing="ij")
    return row.reshape(-1), column.reshape(-1)


def _taken_listing(c: Listing, w: Table, indices: Any, shape: Any, omitted: int = -1) -> Table:
    if isinstance(indices, Tensor):
        return c.picked(w, F.embedding(indices.long(), numbers(w.shape)))
    row, column = _every(w.shape[0], w.shape[1], omitted)
    places = torch.arange(torch.Size(shape).numel() // w.shape[1])[:, None]
    out = (places * w.shape[1] + column).reshape(-1)
    source = (row * w.shape[1] + column).expand(len(places), -1).reshape(-1)
    return c.mapped(w, shape, out.numpy(), source.numpy())


def _embedding_listing(
    c: Listing,
    call: Call,
    weight: Any,
    indices: Any,
    padding_idx: Any = -1,
    scale_grad_by_freq: Any = False,
    sparse: Any = False,
) -> Table:
    return _taken_listing(c, table(c, weight), indices, call.shape)


define("embedding", Operation(_embedding_scales, _embedding_squares, _embedding_listing))


def _bag_scales(
    inf: Any,
    call: Call,
    weight: Value,
    indices: Value,
    offsets: Value,
    scale_grad_by_freq: Any = False,
    mode: int = 0,
    sparse: Any = False,
    per_sample_weights: Value | None = None,
    include_last_offset: Any = False,
    padding_idx: int = -1,
) -> Any:
    """Sums, means or maxima of rows, each times its own weight."""
    rest = [inf.fixed(s.shape) for s in call.outputs[1:]]
    factors = per_sample_weights
    if weight.zero or (factors is not None and factors.zero):
        return [Value(call.shape, Form(call.shape), zero=True), *rest]
    form = _rows(inf, weight).expand(call.shape)
    if factors is not None:
        form = add_forms(form, inf.tie(inf.form(factors), [0]).expand(call.shape))
    return [form, *rest]


def _members(call: Call, indices: Any, offsets: Any, padding_idx: int) -> Tensor:
    """``(bags, indices)``: the coefficient of each row in each bag.

    Where an index falls is not known of offsets that are not: then it is in every bag, of which
    each has the mean size.
    """
    bags, count = call.shape[0], call["indices"].shape.numel()
    if not isinstance(offsets, Tensor):
        size = max(count / max(bags, 1), 1)
        return torch.full((bags, count), 1 / size if call["mode"] == 1 else 1.0).double()
    edges = offsets.reshape(-1).long().cpu()[:bags]
    at = torch.arange(count)
    inside = at >= edges[:, None]
    inside[:-1] &= at < edges[1:, None]
    if isinstance(indices, Tensor):
        inside &= indices.reshape(-1).cpu() != padding_idx
    members = inside.double()
    return members / members.sum(1, keepdim=True).clamp_min(1) if call["mode"] == 1 else members


def _bag_squares(
    c: Squares,
    call: Call,
    weight: Any,
    indices: Any,
    offsets: Any,
    scale_grad_by_freq: Any = False,
    mode: int = 0,
    sparse: Any = False,
    per_sample_weights: Any = None,
    include_last_offset: Any = False,
    padding_idx: int = -1,
) -> Lifted:
    w = lifted(c, weight)
    members = c.coefficient(_members(call, indices, offsets, padding_idx))
    rows = _taken(c, w, indices, padding_idx).expand(members.shape[1], -1)
    shift = w.shift
    if per_sample_weights is not None:
        factors = c.lifted(per_sample_weights)
        rows, shift = rows * factors.tensor[:, None], shift + factors.shift
    return Lifted(members @ rows, shift).normalised()


def _bag_listing(
    c: Listing,
    call: Call,
    weight: Any,
    indices: Any,
    offsets: Any,
    scale_grad_by_freq: Any = False,
    mode: int = 0,
    sparse: Any = False,
    per_sample_weights: Any = None,
    include_last_offset: Any = False,
    padding_idx: int = -1,
) -> Table:
    w = table(c, weight)
    members = _members(call, indices, offsets, padding_idx)
    count, width = members.shape[1], w.shape[1]
    rows = _taken_listing(c, w, indices, (count, width), padding_idx)
    if per_sample_weights is not None:
        rows = c.product(rows, table(c, per_sample_weights).reshaped((count, 1)))
    bag, entry = members.nonzero(as_tuple=True)
    column = torch.arange(width)
    out = (bag[:, None] * width + column).reshape(-1)
    source = (entry[:, None] * width + column).reshape(-1)
    each = members[bag, entry].repeat_interleave(width)
    return c.mapped(rows, call.shape, out.numpy(), source.numpy(), each.numpy())


define(
    "_embedding_bag _embedding_bag_forward_only",
    Operation(_bag_scales, _bag_squares, _bag_listing),
)
