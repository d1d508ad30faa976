"""Convolutions and embeddings: input tied over positions, fresh scales per output channel."""

from __future__ import annotations

from typing import Any

from torch import fx

from pathlift.capture import shape_of
from pathlift.symmetry.inference import Inference, Result, rule
from pathlift.symmetry.scales import Form, Value, add_forms


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


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(inf: Inference, node: fx.Node, w: Value, *_: Any, **__: Any) -> Result:
    """Sums, means or maxima of rows: fresh scales per embedding dimension."""
    out = inf.fresh((w.shape[1],))
    inf.bind(w, Form(w.shape, ((1, out[None, :].expand(w.shape)),)))
    shape = node.meta["val"][0].shape
    weights = _[6] if len(_) > 6 else __.get("per_sample_weights")
    if isinstance(weights, Value):
        inf.pin(weights, "weights of an embedding bag")
    return [Form(shape, ((1, out.expand(shape)),))]


@rule("embedding")
def embedding(inf: Inference, node: fx.Node, w: Value, index: Value, *_: Any, **__: Any) -> Result:
    """A linear map of one-hot vectors: fresh scales per embedding dimension."""
    if not inf.is_new(w) and w.constant is not None:
        return inf.fixed(shape_of(node))
    out = inf.fresh((w.shape[1],))
    inf.bind(w, Form(w.shape, ((1, out[None, :].expand(w.shape)),)))
    shape = shape_of(node)
    return Form(shape, ((1, out.expand(shape)),))


def _channels(inf: Inference, x: Value, axis: int) -> Form:
    """Tie ``x`` over all dimensions but ``axis``; returns the form of shape (channels,)."""
    first = inf.tie(inf.form(x), [d for d in range(len(x.shape)) if d != axis])
    count = x.shape[axis]
    return first.map(lambda t: t.reshape(count), (count,))


def _bind(inf: Inference, w: Value, rows: Any, cols: Form) -> None:
    """``w`` carries output scale minus input scale."""
    shape = w.shape
    inf.note_input(w, cols)
    inf.bind(
        w,
        add_forms(
            Form(shape, ((1, rows.expand(shape)),)),
            cols.expand(shape).scaled(-1),
        ),
    )
