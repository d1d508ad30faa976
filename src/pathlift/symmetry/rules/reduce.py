"""Pooling, resizing and reductions: scales are tied over what is combined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from pathlift.capture import operation, shape_of
from pathlift.symmetry.inference import Inference, Result, refuse, rule
from pathlift.symmetry.scales import Form, Value


def _spatial(inf: Inference, node: fx.Node, x: Value, count: int) -> Form:
    """Tie over the last ``count`` dimensions and expand to the output's."""
    meta = node.meta.get("val")
    shape = meta[0].shape if isinstance(meta, (list, tuple)) else shape_of(node)
    dims = range(len(x.shape) - count, len(x.shape))
    return inf.tie(inf.form(x), list(dims)).expand(shape)


def _register(names: Sequence[str], count: int) -> None:
    @rule(*names)
    def pool(inf: Inference, node: fx.Node, x: Value, *_: Any, **__: Any) -> Result:
        """A positively homogeneous map of each channel's positions."""
        form = _spatial(inf, node, x, count)
        return [form] if isinstance(node.meta.get("val"), (list, tuple)) else form


for _n in (1, 2, 3):
    _register(
        [
            f"max_pool{_n}d",
            f"max_pool{_n}d_with_indices",
            f"avg_pool{_n}d",
            f"adaptive_avg_pool{_n}d",
            f"_adaptive_avg_pool{_n}d",
            f"adaptive_max_pool{_n}d",
            f"upsample_nearest{_n}d",
            f"_upsample_nearest_exact{_n}d",
            f"upsample_{('linear', 'bilinear', 'trilinear')[_n - 1]}{_n}d",
            f"reflection_pad{_n}d",
            f"replication_pad{_n}d",
            f"lp_pool{_n}d",
            f"fractional_max_pool{_n}d",
        ],
        _n,
    )
_register(["upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"], 2)


def _dims(x: Value, dim: Any) -> list[int]:
    if dim is None or dim == []:
        return list(range(len(x.shape)))
    return [d % max(len(x.shape), 1) for d in ([dim] if isinstance(dim, int) else dim)]


@rule("mean", "sum", "amax", "amin", "nansum")
def reduction(
    inf: Inference,
    node: fx.Node,
    x: Value,
    dim: Any = None,
    keepdim: bool = False,
    **_: Any,
) -> Result:
    """Homogeneous of degree 1 over the reduced dimensions."""
    first = inf.tie(inf.form(x), _dims(x, dim))
    shape = shape_of(node)
    return first.map(
        lambda t: t.reshape(shape) if t.numel() <= 1 else _drop(t, x, dim, shape), shape
    )


def _drop(t: Any, x: Value, dim: Any, shape: Any) -> Any:
    if len(shape) == t.dim():
        return t
    for d in sorted(_dims(x, dim), reverse=True):
        t = t.squeeze(d)
    return t


@rule("max", "min", "median", "nanmedian")
def extremum(
    inf: Inference,
    node: fx.Node,
    x: Value,
    other: Any = None,
    keepdim: bool = False,
    **_: Any,
) -> Result:
    """``max(x)``, ``max(x, dim)`` (values; indices carry no scale), ``max(x, y)``."""
    if isinstance(other, Value):
        inf.equate(inf.form(x), inf.form(other))
        return inf.form(x).expand(shape_of(node))
    first = inf.tie(inf.form(x), _dims(x, other))
    meta = node.meta.get("val")
    shape = meta[0].shape if isinstance(meta, (list, tuple)) else shape_of(node)
    form = first.map(lambda t: _drop(t, x, other, shape).reshape(shape), shape)
    return [form] if isinstance(meta, (list, tuple)) else form


@rule("linalg_vector_norm", "norm")
def norm(
    inf: Inference,
    node: fx.Node,
    x: Value,
    p: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    **_: Any,
) -> Result:
    """A norm is homogeneous of degree 1 (others than these go through logarithms)."""
    if p not in (1, 2, math.inf, -math.inf, "fro"):
        refuse()
    return reduction(inf, node, x, dim, keepdim)


@rule("sort", "topk", "kthvalue", "mode", "msort")
def ranked(inf: Inference, node: fx.Node, x: Value, *args: Any, **kwargs: Any) -> Result:
    """Values change places along one dimension; indices carry no scale."""
    name, shape = operation(node), shape_of(node)
    given = [a for a in args if not isinstance(a, bool)]
    position = 1 if name in ("topk", "kthvalue") else 0
    default = 0 if name == "msort" else -1
    dim = kwargs.get("dim", given[position] if len(given) > position else default)
    meta = node.meta.get("val")
    shape = meta[0].shape if isinstance(meta, (list, tuple)) else shape
    first = inf.tie(inf.form(x), [dim])
    form = first.map(lambda t: _drop(t, x, dim, shape).expand(shape), shape)
    return [form] if isinstance(meta, (list, tuple)) else form


@rule("std", "var", "std_mean", "var_mean")
def spread(inf: Inference, node: fx.Node, x: Value, dim: Any = None, *_: Any, **__: Any) -> Result:
    """A standard deviation is homogeneous of degree 1, a variance of degree 2."""
    dims = None if isinstance(dim, bool) else dim
    meta = node.meta.get("val")
    shape = meta[0].shape if isinstance(meta, (list, tuple)) else shape_of(node)
    first = inf.tie(inf.form(x), _dims(x, dims))
    form = first.map(
        lambda t: t.reshape(shape) if t.numel() <= 1 else _drop(t, x, dims, shape), shape
    )
    out = form.scaled(2) if operation(node).startswith("var") else form
    return [out, form] if isinstance(meta, (list, tuple)) else out


@rule("cumsum", "cummax", "cummin")
def cumulative(inf: Inference, node: fx.Node, x: Value, dim: int, **_: Any) -> Result:
    """Tied along the dimension."""
    form = inf.tie(inf.form(x), [dim]).expand(x.shape)
    return [form] if isinstance(node.meta.get("val"), (list, tuple)) else form
