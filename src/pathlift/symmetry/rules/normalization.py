"""Normalisations with affine parameters: input pinned, output free per affine entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from pathlift.capture import operation, shape_of
from pathlift.symmetry.inference import BATCH_NORMS, Inference, Result, rule
from pathlift.symmetry.scales import Form, Value


def _affine(
    inf: Inference,
    node: fx.Node,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    axes: Sequence[int],
) -> Result:
    inf.pin(x, "normalization input")
    meta = node.meta.get("val")
    shape = meta[0].shape if isinstance(meta, (list, tuple)) else shape_of(node)
    if weight is None:
        inf.pin(bias, "bias of a normalization without weight")
        form = Form(shape)
    else:
        scale = inf.elementwise_form(weight)
        inf.bind(bias, scale)
        view = [1] * len(shape)
        for axis, n in zip(axes, weight.shape, strict=True):
            view[axis] = n
        form = scale.map(lambda ids: ids.reshape(view).expand(shape), shape)
    return [form] if isinstance(meta, (list, tuple)) else form


@rule("instance_norm", *BATCH_NORMS)
def batch_norm(
    inf: Inference,
    node: fx.Node,
    x: Value,
    weight: Value | None = None,
    bias: Value | None = None,
    mean: Value | None = None,
    variance: Value | None = None,
    *_: Any,
    **__: Any,
) -> Result:
    """``gamma (x - mu) / sigma + beta``; channels on dimension 1.

    The input is pinned, or (the optional family) free where the running statistics are rescaled
    along: ``mu`` with the input's scale, ``sigma^2`` with twice that.
    """
    statistics = [v for v in (mean, variance) if isinstance(v, Value)]
    carried = all(v.leaf is not None for v in statistics)
    if inf.free_batch_norms and carried and operation(node) != "instance_norm":
        count = x.shape[1]
        tied = inf.tie(inf.form(x), [d for d in range(len(x.shape)) if d != 1])
        channels = tied.map(lambda t: t.reshape(count), (count,))
        for power, value in enumerate(statistics, 1):
            inf.bind(value, channels.scaled(power))
        x = inf.fixed(x.shape)
    return _affine(inf, node, x, weight, bias, [1])


@rule("group_norm", "native_group_norm")
def group_norm(
    inf: Inference,
    node: fx.Node,
    x: Value,
    groups: Any,
    weight: Any = None,
    bias: Any = None,
    *_: Any,
    **__: Any,
) -> Result:
    """Affine per channel (dimension 1)."""
    if not isinstance(groups, int):  # native_group_norm(x, weight, bias, N, C, HxW, group, eps)
        weight, bias = groups, weight
    return _affine(inf, node, x, weight, bias, [1])


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(
    inf: Inference,
    node: fx.Node,
    x: Value,
    shape: Sequence[int],
    weight: Value | None = None,
    bias: Any = None,
    *_: Any,
    **__: Any,
) -> Result:
    """Affine per entry of the normalised (last) dimensions."""
    axes = range(len(x.shape) - len(shape), len(x.shape))
    return _affine(inf, node, x, weight, bias if isinstance(bias, Value) else None, list(axes))
