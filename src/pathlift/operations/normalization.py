"""Norms: input pinned, output free per entry of their own weight and bias.

What a norm divides by is a fixed gain to the lift: its running statistics, where it has some, else
the size of the lifted activations themselves, detached. So a norm is a linear map, and paths pass
through it and its weight (METHOD section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pathlift.capture.program import Call
from pathlift.lifting.tables import Listing, Table, constant
from pathlift.lifting.values import Lifted, Squares
from pathlift.operations.contraction import with_bias
from pathlift.operations.gains import lifted, table
from pathlift.operations.moments import averages_batches
from pathlift.operations.table import NoPaths, Operation, define
from pathlift.symmetry.scales import Form, Value

_NO_STATISTICS = NoPaths("it divides by statistics of its input, which makes no fixed affine map")


def is_batch_norm(call: Call) -> bool:
    """See :func:`pathlift.operations.moments.averages_batches`."""
    return averages_batches(call.arguments)


def epsilon(call: Call) -> float:
    """``eps`` of a norm, whichever way its schema calls it."""
    found = call.arguments.get("eps", call.arguments.get("epsilon"))
    return 1e-5 if found is None else float(found)


# ------------------------------------------------------------------------------- scales


def _affine(
    inf: Any, call: Call, x: Value, weight: Value | None, bias: Value | None, axes: Sequence[int]
) -> Any:
    """Results of a norm: the first carries the weight's scale, statistics carry none."""
    inf.pin(x, "normalization input")
    shape = call.shape
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
    if not call.several:
        return form
    return [form, *(None if s is None else inf.fixed(s.shape) for s in call.outputs[1:])]


def _free_input(inf: Any, call: Call, x: Value, mean: Value, variance: Value) -> Value:
    """The optional family: the input is free where the running statistics are rescaled along,
    ``mu`` with the input's scale, ``sigma^2`` with twice that."""
    count = x.shape[1]
    tied = inf.tie(inf.form(x), [d for d in range(len(x.shape)) if d != 1])
    channels = tied.map(lambda t: t.reshape(count), (count,))
    inf.bind(mean, channels)
    inf.bind(variance, channels.scaled(2))
    return inf.fixed(x.shape)


def _batch_norm_scales(
    inf: Any,
    call: Call,
    x: Value,
    weight: Any = None,
    bias: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    training: Any = False,
    momentum: Any = 0,
    eps: Any = 0,
    exponential_average_factor: Any = 0,
    epsilon: Any = 0,
    cudnn_enabled: Any = False,
) -> Any:
    """``gamma (x - mu) / sigma + beta``; channels on dimension 1."""
    statistics = [v for v in (running_mean, running_var) if v is not None]
    carried = len(statistics) == 2 and all(v.leaf is not None for v in statistics)
    if inf.free_batch_norms and carried and not call.several:
        x = _free_input(inf, call, x, running_mean, running_var)
    else:
        for value in statistics:
            inf.pin(value, "statistics of a pinned normalization")
    return _affine(inf, call, x, weight, bias, [1])


def _instance_norm_scales(
    inf: Any,
    call: Call,
    x: Value,
    weight: Any = None,
    bias: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    use_input_stats: Any = True,
    momentum: Any = 0,
    eps: Any = 0,
    cudnn_enabled: Any = False,
) -> Any:
    for value in (running_mean, running_var):
        inf.pin(value, "statistics of a pinned normalization")
    return _affine(inf, call, x, weight, bias, [1])


def _group_norm_scales(
    inf: Any,
    call: Call,
    x: Value,
    num_groups: Any = 1,
    weight: Any = None,
    bias: Any = None,
    eps: Any = 0,
    cudnn_enabled: Any = True,
    N: Any = 0,
    C: Any = 0,
    HxW: Any = 0,
    group: Any = 1,
) -> Any:
    return _affine(inf, call, x, weight, bias, [1])


def _layer_norm_scales(
    inf: Any,
    call: Call,
    x: Value,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: Any = None,
    cudnn_enable: Any = True,
) -> Any:
    """The last dimensions are normalised, each entry of them with its own weight."""
    rank = len(x.shape)
    return _affine(inf, call, x, weight, bias, range(rank - len(normalized_shape), rank))


# ------------------------------------------------------------------------------- squares


def _weighted(c: Squares, x: Lifted, weight: Any, bias: Any, view: Sequence[int] | None) -> Lifted:
    """``x * weight + bias``, with both seen as of shape ``view``."""
    if weight is not None:
        w = c.lifted(weight)
        shape = w.tensor.shape if view is None else tuple(view)
        x = Lifted(x.tensor * w.tensor.reshape(shape), x.shift + w.shift)
    return c.plus(x, bias, view).normalised()


def _divided(c: Squares, x: Lifted, groups: Tensor, dims: Sequence[int], eps: float) -> Lifted:
    """``x`` over its size along ``dims`` of ``groups``, a view of ``x`` whose elements share it.

    As a norm takes it: the root of the mean of squares, where the square of an activation is the
    power 2/p of what the lift has. It is detached, so it is a gain.
    """
    c.approximate()
    squares = groups.detach() ** (2 / c.p)
    unit = 2.0 ** min(-2 * x.shift / c.p, 1000)
    mean = squares.mean(tuple(dims), keepdim=True) + eps * unit
    size = torch.where(mean > 0, mean, torch.ones_like(mean)) ** (c.p / 2)
    return Lifted((groups / size).reshape(x.tensor.shape))


def _with_running(c: Squares, x: Lifted, mean: Tensor, variance: Tensor, eps: float) -> Lifted:
    view = (-1,) + (1,) * (x.tensor.dim() - 2)
    sigma = (variance.to(c.device, torch.float64) + eps).sqrt().to(c.dtype)
    (left, right), shift = c.aligned((x, mean))
    return Lifted((left + right.reshape(view)) / (sigma**c.p).reshape(view), shift)


def _normed(
    c: Squares, x: Lifted, weight: Any, bias: Any, mean: Any, variance: Any, eps: float, first: int
) -> Lifted:
    """By running statistics where there are some; else per channel, from dimension ``first`` on."""
    x = lifted(c, x)
    rank = x.tensor.dim()
    if isinstance(mean, Tensor) and isinstance(variance, Tensor):
        out = _with_running(c, x, mean, variance, eps)
    else:
        dims = [d for d in range(rank) if d != 1 and (d > 1 or first == 0)]
        out = _divided(c, x, x.tensor, dims, eps)
    return _weighted(c, out, weight, bias, (-1,) + (1,) * (rank - 2))


def _batch_norm_squares(
    c: Squares,
    call: Call,
    x: Any,
    weight: Any = None,
    bias: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    training: Any = False,
    momentum: Any = 0,
    eps: float = 0,
    exponential_average_factor: Any = 0,
    epsilon: float = 0,
    cudnn_enabled: Any = False,
) -> Lifted:
    return _normed(c, x, weight, bias, running_mean, running_var, eps or epsilon, 0)


def _instance_norm_squares(
    c: Squares,
    call: Call,
    x: Any,
    weight: Any = None,
    bias: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    use_input_stats: Any = True,
    momentum: Any = 0,
    eps: float = 0,
    cudnn_enabled: Any = False,
) -> Lifted:
    return _normed(c, x, weight, bias, running_mean, running_var, eps, 2)


def _group_norm_squares(
    c: Squares,
    call: Call,
    x: Any,
    num_groups: int = 0,
    weight: Any = None,
    bias: Any = None,
    eps: float = 0,
    cudnn_enabled: Any = True,
    N: Any = 0,
    C: Any = 0,
    HxW: Any = 0,
    group: int = 0,
) -> Lifted:
    x = lifted(c, x)
    groups = x.tensor.unflatten(1, (num_groups or group, -1))
    out = _divided(c, x, groups, range(2, groups.dim()), eps)
    return _weighted(c, out, weight, bias, (-1,) + (1,) * (x.tensor.dim() - 2))


def _layer_norm_squares(
    c: Squares,
    call: Call,
    x: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float | None = None,
    cudnn_enable: Any = True,
) -> Lifted:
    x = lifted(c, x)
    rank = x.tensor.dim()
    if eps is None:  # an RMS norm's default
        eps = torch.finfo(call["input"].dtype).eps
    out = _divided(c, x, x.tensor, range(rank - len(normalized_shape), rank), eps)
    return _weighted(c, out, weight, bias, None)


# ------------------------------------------------------------------------------- listing


def _affine_listing(
    c: Listing, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, eps: float
) -> Table:
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        raise c.refuse(_NO_STATISTICS.why)
    x = table(c, x)
    shape = (-1,) + (1,) * (len(x.shape) - 2)
    centred = c.sum(x, constant(-mean.reshape(shape)))
    out = c.product(centred, constant((variance.double() + eps).rsqrt().reshape(shape)))
    if weight is not None:
        w = table(c, weight)
        out = c.product(out, w.reshaped((w.size, *shape[1:])))
    return with_bias(c, out, bias, 1)


def _batch_norm_listing(
    c: Listing,
    call: Call,
    x: Any,
    weight: Any = None,
    bias: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    training: Any = False,
    momentum: Any = 0,
    eps: float = 0,
    exponential_average_factor: Any = 0,
    epsilon: float = 0,
    cudnn_enabled: Any = False,
) -> Table:
    return _affine_listing(c, x, weight, bias, running_mean, running_var, eps or epsilon)


def _instance_norm_listing(
    c: Listing,
    call: Call,
    x: Any,
    weight: Any = None,
    bias: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    use_input_stats: Any = True,
    momentum: Any = 0,
    eps: float = 0,
    cudnn_enabled: Any = False,
) -> Table:
    return _affine_listing(c, x, weight, bias, running_mean, running_var, eps)


define(
    "batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional "
    "_native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm "
    "_batch_norm_with_update _batch_norm_with_update_functional _batch_norm_no_update",
    Operation(
        _batch_norm_scales, _batch_norm_squares, _batch_norm_listing, samples=lambda call: ("x",)
    ),
)
define(
    "instance_norm",
    Operation(_instance_norm_scales, _instance_norm_squares, _instance_norm_listing),
)
define(
    "group_norm native_group_norm",
    Operation(_group_norm_scales, _group_norm_squares, _NO_STATISTICS),
)
define(
    "layer_norm native_layer_norm rms_norm _fused_rms_norm",
    Operation(_layer_norm_scales, _layer_norm_squares, _NO_STATISTICS),
)
