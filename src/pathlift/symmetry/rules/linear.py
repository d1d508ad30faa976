"""Linear maps with a weight: input tied over positions, fresh scales per output channel."""

from __future__ import annotations

from typing import Any

from torch import fx

from pathlift.capture import shape_of
from pathlift.symmetry.inference import Inference, Result, rule
from pathlift.symmetry.scales import Form, Value, add_forms


@rule("linear")
def linear(inf: Inference, node: fx.Node, x: Value, w: Value, b: Value | None = None) -> Result:
    """``y[..., o] = sum_i w[o, i] x[..., i] + b[o]``."""
    channels = _channels(inf, x, len(x.shape) - 1)
    out = inf.fresh((w.shape[0],))
    _bind(inf, w, out[:, None], channels.map(lambda t: t[None, :], (1, x.shape[-1])))
    if b is not None:
        inf.bind(b, Form(b.shape, ((1, out),)))
    shape = shape_of(node)
    return Form(shape, ((1, out.expand(shape)),))


@rule("conv1d", "conv2d", "conv3d")
def conv(
    inf: Inference,
    node: fx.Node,
    x: Value,
    w: Value,
    b: Value | None = None,
    *rest: Any,
    groups: int = 1,
    **_: Any,
) -> Result:
    """Convolution; weight (out, in / groups, *kernel)."""
    groups = rest[3] if len(rest) > 3 else groups
    return _convolve(inf, node, x, w, b, groups, transposed=False)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(
    inf: Inference,
    node: fx.Node,
    x: Value,
    w: Value,
    b: Value | None = None,
    *rest: Any,
    groups: int = 1,
    **_: Any,
) -> Result:
    """Transposed convolution; weight (in, out / groups, *kernel)."""
    groups = rest[3] if len(rest) > 3 else groups
    return _convolve(inf, node, x, w, b, groups, transposed=True)


@rule("convolution", "_convolution")
def convolution(
    inf: Inference,
    node: fx.Node,
    x: Value,
    w: Value,
    b: Value | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    *rest: Any,
) -> Result:
    """The general form that functionalised graphs hold."""
    return _convolve(inf, node, x, w, b, groups, transposed)


def _convolve(
    inf: Inference,
    node: fx.Node,
    x: Value,
    w: Value,
    b: Value | None,
    groups: int,
    transposed: bool,
) -> Result:
    kernel = (1,) * (len(w.shape) - 2)
    axis = len(x.shape) - len(kernel) - 1
    channels = _channels(inf, x, axis)
    shape = shape_of(node)
    count = shape[axis]
    out = inf.fresh((count,))
    # Grouped weights: (groups, out / groups, in / groups); scales follow by reshaping alone.
    inside, outside = x.shape[axis] // groups, count // groups
    if groups == 1:
        rows = out.reshape(1, count) if transposed else out.reshape(count, 1)
        per_in = (x.shape[axis], 1) if transposed else (1, x.shape[axis])
        cols = channels.map(lambda t: t.reshape(per_in), per_in)
    elif transposed:
        rows = out.reshape(groups, 1, outside).expand(groups, inside, outside)
        rows = rows.reshape(groups * inside, outside)
        cols = channels.map(lambda t: t.reshape(-1, 1), (groups * inside, 1))
    else:
        rows = out.reshape(count, 1)
        cols = channels.map(
            lambda t: (
                t.reshape(groups, 1, inside).expand(groups, outside, inside).reshape(count, inside)
            ),
            (count, inside),
        )
    _bind(
        inf,
        w,
        rows.reshape(*rows.shape, *kernel),
        cols.map(lambda t: t.reshape(*t.shape, *kernel), (*cols.shape, *kernel)),
    )
    if b is not None:
        inf.bind(b, Form(b.shape, ((1, out),)))
    view = [1] * len(shape)
    view[axis] = count
    return Form(shape, ((1, out.reshape(view).expand(shape)),))


@rule("embedding")
def embedding(inf: Inference, node: fx.Node, w: Value, index: Value, *_: Any, **__: Any) -> Result:
    """A linear map of one-hot vectors: fresh scales per embedding dimension."""
    if not inf.is_new(w) and w.constant is not None:
        return inf.fixed(shape_of(node))
    out = inf.fresh((w.shape[1],))
    inf.bind(w, Form(w.shape, ((1, out[None, :].expand(w.shape)),)))
    shape = shape_of(node)
    return Form(shape, ((1, out.expand(shape)),))


@rule("addmm")
def addmm(inf: Inference, node: fx.Node, b: Value, x: Value, w: Value, **factors: Any) -> Result:
    """``b + x @ w``."""
    return inf_matmul(inf, node, x, w, b)


@rule("matmul", "mm", "bmm")
def matmul(inf: Inference, node: fx.Node, x: Value, w: Value) -> Result:
    """A product of two tensors contracted over one dimension."""
    return inf_matmul(inf, node, x, w, None)


@rule("baddbmm")
def baddbmm(inf: Inference, node: fx.Node, b: Value, x: Value, w: Value, **_: Any) -> Result:
    """``b + x @ w``, batched."""
    return inf_matmul(inf, node, x, w, b)


def inf_matmul(inf: Inference, node: fx.Node, x: Value, w: Value, b: Value | None) -> Result:
    """``y[m, n] = sum_k x[m, k] w[k, n]``: ``s(x[m, k]) + s(w[k, n])`` is the same for all k."""
    shape = shape_of(node)
    if inf.is_new(w) and len(w.shape) == 2:
        channels = _channels(inf, x, len(x.shape) - 1)
        out = inf.fresh((w.shape[1],))
        _bind(inf, w, out[None, :], channels.map(lambda t: t[:, None], (x.shape[-1], 1)))
        form = Form(shape, ((1, out.expand(shape)),))
    else:
        a, c = inf.form(x), inf.form(w)
        rows = a if len(a.shape) > 1 else a.map(lambda t: t[None, :], (1, *a.shape))
        cols = c if len(c.shape) > 1 else c.map(lambda t: t[:, None], (*c.shape, 1))
        batch = tuple(_broadcast(rows.shape[:-2], cols.shape[:-2]))
        grid = (*batch, rows.shape[-2], cols.shape[-1], rows.shape[-1])
        left = rows.map(lambda t: t.unsqueeze(-2), (*rows.shape[:-1], 1, rows.shape[-1]))
        right = cols.map(
            lambda t: t.transpose(-1, -2).unsqueeze(-3),
            (*cols.shape[:-2], 1, cols.shape[-1], cols.shape[-2]),
        )
        tied = inf.tie(add_forms(left.expand(grid), right.expand(grid)), [len(grid) - 1])
        form = tied.map(lambda t: t.squeeze(-1).reshape(shape), shape)
    if b is not None:
        if inf.is_new(b):
            first = inf.tie(form, [d for d in range(len(shape)) if _broadcasts(b, shape, d)])
            inf.bind(b, first.map(lambda t: t.reshape(b.shape), b.shape))
        else:
            inf.equate(form, inf.form(b))
    return form


def _broadcast(a: Any, b: Any) -> Any:
    import torch

    return torch.broadcast_shapes(a, b)


def _broadcasts(b: Value, shape: Any, d: int) -> bool:
    own = d - (len(shape) - len(b.shape))
    return own < 0 or b.shape[own] == 1


def _channels(inf: Inference, x: Value, axis: int) -> Form:
    """Tie ``x`` over all dimensions but ``axis``; returns the form of shape (channels,)."""
    first = inf.tie(inf.form(x), [d for d in range(len(x.shape)) if d != axis])
    count = x.shape[axis]
    return first.map(lambda t: t.reshape(count), (count,))


def _bind(inf: Inference, w: Value, rows: Any, cols: Form) -> None:
    """``w`` carries output scale minus input scale."""
    shape = w.shape
    inf.bind(
        w,
        add_forms(
            Form(shape, ((1, rows.expand(shape)),)),
            cols.expand(shape).scaled(-1),
        ),
    )
