"""Shape operations: executed on the ids themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pathlift.capture import operation, shape_of
from pathlift.symmetry.inference import Inference, Result, refuse, rule
from pathlift.symmetry.scales import Form, Value, compact, varying


def _reshape(ids: Tensor, shape: Sequence[int]) -> Tensor:
    """Reshape; an expanded leading dimension stays expanded instead of being copied."""
    shape = tuple(shape)
    if ids.dim() > 1 and len(shape) > 1 and shape[0] == ids.shape[0] and ids.stride(0) == 0:
        inner = ids[0].reshape(shape[1:])
        return (inner if inner.data_ptr() == ids.data_ptr() else compact(inner)).expand(shape)
    out = ids.reshape(shape)
    return out if out.data_ptr() == ids.data_ptr() else compact(out)


@rule(
    "view",
    "reshape",
    "_unsafe_view",
    "_reshape_alias",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "view_copy",
    "_reshape_copy",
    "view_as",
    "reshape_as",
    "squeeze_copy",
    "unsqueeze_copy",
)
def reshape(inf: Inference, node: fx.Node, x: Value, *_: Any, **__: Any) -> Result:
    """The output's shape says all (``view`` with a dtype is refused)."""
    if len(node.args) > 1 and isinstance(node.args[1], torch.dtype):
        refuse()
    shape = shape_of(node)
    if x.zero:
        return Value(shape, Form(shape), zero=True)
    return inf.form(x).map(lambda ids: _reshape(ids, shape), shape)


@rule(
    "permute",
    "transpose",
    "t",
    "numpy_T",
    "mT",
    "swapaxes",
    "movedim",
    "expand",
    "expand_as",
    "slice",
    "select",
    "narrow",
    "diagonal",
    "as_strided_off",
    "permute_copy",
    "slice_copy",
    "select_copy",
    "transpose_copy",
    "expand_copy",
    "t_copy",
    "swapdims",
    "moveaxis",
    "adjoint",
    "broadcast_to",
    "unfold",
)
def strided(inf: Inference, node: fx.Node, x: Value, *args: Any, **kwargs: Any) -> Result:
    """Views of any tensor."""
    plain = _ids_free(args)
    shape = shape_of(node)
    if x.zero:
        return Value(shape, Form(shape), zero=True)
    return inf.form(x).map(lambda ids: node.target(ids, *plain, **kwargs), shape)  # type: ignore[operator]


@rule(
    "split",
    "split_with_sizes",
    "chunk",
    "tensor_split",
    "unbind",
    "split_copy",
    "split_with_sizes_copy",
    "unbind_copy",
    "unsafe_split",
    "unsafe_chunk",
    "hsplit",
    "vsplit",
)
def pieces(inf: Inference, node: fx.Node, x: Value, *args: Any, **kwargs: Any) -> Result:
    """Several views at once."""
    form = inf.form(x)
    shapes = [m.shape for m in node.meta["val"]]
    parts = [node.target(ids, *args, **kwargs) for _, ids in form.terms]  # type: ignore[operator]
    return [
        Form(shape, tuple((c, p[k]) for (c, _), p in zip(form.terms, parts, strict=True)))
        for k, shape in enumerate(shapes)
    ]


@rule(
    "roll",
    "flip",
    "pixel_shuffle",
    "pixel_unshuffle",
    "repeat",
    "tile",
    "channel_shuffle",
    "repeat_interleave",
    "tril",
    "triu",
    "rot90",
    "native_channel_shuffle",
)
def copied(inf: Inference, node: fx.Node, x: Value, *args: Any, **kwargs: Any) -> Result:
    """Operations that copy; the copy is compacted to views again."""
    if any(isinstance(a, Value) for a in args):
        refuse()
    shape = shape_of(node)

    def run(ids: Tensor) -> Tensor:
        out: Tensor = node.target(_positive(ids, node), *args, **kwargs)  # type: ignore[operator]
        return compact(out)

    if "tril" in str(node.target) or "triu" in str(node.target):
        return inf.form(x)  # zeroed entries may carry any scale
    return inf.form(x).map(run, shape)


def _positive(ids: Tensor, node: fx.Node) -> Tensor:
    return ids.contiguous() if "channel_shuffle" in str(node.target) else ids


def _ids_free(args: Sequence[Any]) -> list[Any]:
    return [a.shape if isinstance(a, Value) else a for a in args]


def _merge(
    inf: Inference,
    values: Sequence[Value],
    dims: set[int],
    join: Callable[[list[Tensor]], Tensor],
    shape: torch.Size,
) -> Form:
    """Join single id tensors along ``dims``; where none varies, one slice stands for all."""
    ids = [inf.single(v) for v in values]
    rank = ids[0].dim()
    still = [
        d
        for d in range(rank)
        if d not in dims and all(t.size(d) == 1 or t.stride(d) == 0 for t in ids)
    ]
    index = tuple(slice(0, 1) if d in still else slice(None) for d in range(rank))
    joined = join([t[index] for t in ids])
    return Form(shape, ((1, joined.expand(shape)),))


@rule("cat", "concat", "concatenate")
def cat(inf: Inference, node: fx.Node, tensors: Sequence[Value], dim: int = 0) -> Result:
    """Concatenation; an empty legacy operand is dropped."""
    shape = shape_of(node)
    tensors = [t for t in tensors if len(t.shape) == len(shape)]
    dim %= len(shape)
    if all(t.form is not None and t.form.pinned and not t.zero for t in tensors):
        return Form(shape)
    return _merge(inf, tensors, {dim}, lambda ids: torch.cat(ids, dim), shape)


@rule("stack")
def stack(inf: Inference, node: fx.Node, tensors: Sequence[Value], dim: int = 0) -> Result:
    """Stacking along a new dimension."""
    shape = shape_of(node)
    dim %= len(shape)
    if all(t.form is not None and t.form.pinned and not t.zero for t in tensors):
        return Form(shape)
    ids = [inf.single(t).unsqueeze(dim) for t in tensors]
    values = [Value(i.shape, Form(i.shape, ((1, i),))) for i in ids]
    return _merge(inf, values, {dim}, lambda parts: torch.cat(parts, dim), shape)


@rule("pad", "constant_pad_nd")
def pad(
    inf: Inference,
    node: fx.Node,
    x: Value,
    widths: Sequence[int],
    mode: Any = "constant",
    value: Any = None,
) -> Result:
    """Zeros may carry any scale: fresh ones. Reflected borders repeat their source's."""
    shape = shape_of(node)
    constant = mode == "constant" or not isinstance(mode, str)
    fill = (value if isinstance(mode, str) else mode) if constant else 0
    # Zero and infinity may carry any scale: 2**s leaves them what they are.
    if constant and fill not in (None, 0, 0.0, False, math.inf, -math.inf):
        refuse()
    rank = len(x.shape)
    padded = {rank - 1 - k // 2 for k, w in enumerate(widths) if w}
    if not constant:
        return inf.tie(inf.form(x), sorted(padded)).expand(shape)
    form = inf.form(x)
    if form.pinned:
        return Form(shape)
    ids = inf.single(x)
    for d in sorted(padded):
        k = 2 * (rank - 1 - d)
        before, after = widths[k], widths[k + 1]
        if ids.size(d) and (ids.stride(d) == 0 or ids.size(d) == 1):
            # zeros take any scale: their neighbour's
            wide = [n + before + after if i == d else n for i, n in enumerate(ids.shape)]
            ids = ids.narrow(d, 0, 1).expand(wide)
            continue
        start, stop = max(-before, 0), ids.size(d) - max(-after, 0)
        parts = [ids.narrow(d, start, stop - start)]
        for count, front in ((before, True), (after, False)):
            if count > 0:
                edge = [1 if ids.stride(i) == 0 else n for i, n in enumerate(ids.shape)]
                wide = list(ids.shape)
                edge[d] = wide[d] = count
                zeros = inf.fresh(edge).expand(wide)
                parts.insert(0, zeros) if front else parts.append(zeros)
        ids = compact(torch.cat(parts, d))
    return Form(shape, ((1, ids),))


@rule("index", "_unsafe_index")
def index(inf: Inference, node: fx.Node, x: Value, indices: Sequence[Value | None]) -> Result:
    """Constant indices are executed on the ids; others tie the dimensions they pick from."""
    shape = shape_of(node)
    form = inf.form(x)
    if form.pinned:
        return Form(shape)
    known = [i.constant if i is not None else None for i in indices]
    if any(i is not None and k is None for i, k in zip(indices, known, strict=True)):
        if any(k is not None for k in known):
            refuse()
        dims = [d for d, i in enumerate(indices) if i is not None]
        form = inf.tie(form, dims).expand(x.shape)
        known = [None if i is None else torch.zeros(i.shape, dtype=torch.int64) for i in indices]
    return form.map(lambda ids: compact(torch.ops.aten.index.Tensor(ids, known)), shape)


@rule("index_select")
def index_select(inf: Inference, node: fx.Node, x: Value, dim: int, which: Value) -> Result:
    """Like ``index`` along one dimension."""
    shape = shape_of(node)
    form = inf.form(x)
    if which.constant is None:
        return inf.tie(form, [dim]).expand(shape)
    picked = which.constant
    return form.map(lambda ids: compact(ids.index_select(dim, picked)), shape)


def _tied(inf: Inference, x: Value, dims: Sequence[int]) -> Form:
    """The form with equal scales along ``dims``, in full shape."""
    return inf.tie(inf.form(x), dims).expand(x.shape)


@rule("gather", "take_along_dim")
def gather(inf: Inference, node: fx.Node, x: Value, *args: Any, **_: Any) -> Result:
    """Values are moved along one dimension and cut along the others."""
    shape = shape_of(node)
    dims = [a for a in args if isinstance(a, int)] or list(range(len(x.shape)))
    index = tuple(slice(0, n) for n in shape)
    fixed = {d % len(x.shape) for d in dims}
    cut = tuple(slice(0, 1) if d in fixed else s for d, s in enumerate(index))
    return _tied(inf, x, dims).map(lambda t: t[cut].expand(shape), shape)


@rule(
    "scatter",
    "scatter_add",
    "index_add",
    "index_copy",
    "scatter_reduce",
    "index_reduce",
    "index_fill",
)
def scatter(
    inf: Inference,
    node: fx.Node,
    x: Value,
    dim: int,
    which: Value,
    source: Any,
    *rest: Any,
    **_: Any,
) -> Result:
    """Values of ``source`` land somewhere along ``dim``: one scale there, the same as ``x``'s."""
    name = operation(node)
    if "prod" in rest:
        refuse()
    target = _tied(inf, x, [dim])
    if not isinstance(source, Value):
        if source != 0:
            inf.zero(target)
        return target
    if source.zero:
        return target
    given = inf.tie(inf.form(source), [dim])
    # ``scatter`` reads source[i, j] for the positions of the index alone, which start at 0.
    size = list(x.shape)
    size[dim] = 1
    if name.startswith("scatter"):
        size = [
            min(a, b) if d != dim % len(size) else 1
            for d, (a, b) in enumerate(zip(size, which.shape, strict=True))
        ]
    cut = tuple(slice(0, n) for n in size)
    part = given.map(lambda t: t[cut], size)
    if x.zero and list(size[:dim] + size[dim + 1 :]) == [
        n for d, n in enumerate(x.shape) if d != dim % len(x.shape)
    ]:
        return part.expand(x.shape)
    if not x.zero:
        inf.equate(target.map(lambda t: t[cut], size), part)
        return target
    inf.zero(part)
    return Form(x.shape)


@rule("index_put", "_unsafe_index_put", "put")
def index_put(
    inf: Inference, node: fx.Node, x: Value, indices: Sequence[Value | None], source: Value, *_: Any
) -> Result:
    """Known positions are written into the ids; others tie the dimensions they may reach."""
    if operation(node) == "put":
        refuse()
    shape = shape_of(node)
    if x.zero and source.zero:
        return Value(shape, Form(shape), zero=True)
    if all(i is None or i.constant is not None for i in indices) and not (_ and _[0]):
        known = [None if i is None else i.constant for i in indices]
        ids = inf.single(x).clone()
        torch.ops.aten.index_put_(ids, known, inf.single(source))
        return Form(shape, ((1, compact(ids)),))
    dims = [d for d, i in enumerate(indices) if i is not None]
    target = _tied(inf, x, dims)
    flat = inf.tie(inf.form(source), range(len(source.shape) - (len(shape) - len(dims))))
    if dims != list(range(len(dims))) or source.shape.numel() == 0:
        refuse()
    rest = shape[len(dims) :]
    view = flat.map(
        lambda t: t.reshape(t.shape[-len(rest) :] if rest else ()),
        flat.shape[-len(rest) :] if rest else (),
    )
    part = Form(torch.Size(rest), tuple((c, t.expand(rest)) for c, t in view.terms))
    if source.zero:
        return target
    if x.zero:
        return part.expand(shape)
    inf.equate(target, part)
    return target


@rule("select_scatter", "slice_scatter", "as_strided_scatter", "diagonal_scatter")
def write(
    inf: Inference, node: fx.Node, x: Value, source: Value, *args: Any, **kwargs: Any
) -> Result:
    """A part of the ids is overwritten, as the part of the tensor is."""
    shape = shape_of(node)
    if x.zero and source.zero:
        return Value(shape, Form(shape), zero=True)
    if inf.form(x).pinned and inf.form(source).pinned and not x.zero and not source.zero:
        return Form(shape)
    base, part = inf.single(x), inf.single(source)
    name = operation(node)
    if name in ("select_scatter", "slice_scatter"):
        # one position stands for all along the dimensions in which neither varies
        dim = (args[0] if args else kwargs.get("dim", 0)) % base.dim()
        if name == "select_scatter":
            part = part.unsqueeze(dim)
        moving = varying(base) | varying(part) | {dim}
        index = tuple(slice(None) if d in moving else slice(0, 1) for d in range(base.dim()))
        base, part = base[index], part[index]
        if name == "select_scatter":
            part = part.squeeze(dim)
    written = node.target(base.contiguous(), part, *args, **kwargs)  # type: ignore[operator]
    return Form(shape, ((1, compact(written).expand(shape)),))


@rule("im2col", "unfold_copy_off")
def im2col(inf: Inference, node: fx.Node, x: Value, kernel: Sequence[int], *_: Any) -> Result:
    """Patches: each channel repeated for every position of the kernel."""
    shape = shape_of(node)
    axis = len(x.shape) - 3
    first = inf.tie(inf.form(x), [axis + 1, axis + 2])
    count = math.prod(kernel)
    return first.map(lambda t: t.squeeze(-1).repeat_interleave(count, axis).expand(shape), shape)


@rule("col2im")
def col2im(
    inf: Inference, node: fx.Node, x: Value, size: Any, kernel: Sequence[int], *_: Any
) -> Result:
    """Sums of patches: one scale per channel."""
    shape = shape_of(node)
    axis = len(x.shape) - 2
    count = math.prod(kernel)
    form = inf.tie(inf.form(x), [axis + 1])
    split = [*x.shape[:axis], x.shape[axis] // count, count, 1]
    grouped = form.map(lambda t: t.reshape(split), split)
    tied = inf.tie(grouped, [axis + 1])
    return tied.map(lambda t: t.expand([*split[:-2], 1, 1]).expand(shape), shape)


@rule(
    *(
        f"fft_{kind}{suffix}"
        for kind in ("fft", "ifft", "rfft", "irfft")
        for suffix in ("", "2", "n")
    )
)
def fourier(
    inf: Inference, node: fx.Node, x: Value, sizes: Any = None, dim: Any = None, *_: Any, **__: Any
) -> Result:
    """Linear along the transformed dimensions."""
    name, rank = operation(node), len(x.shape)
    if name.endswith("2"):
        default: list[int] = [-2, -1]
    else:
        default = list(range(rank)) if name.endswith("n") else [-1]
    dims = default if dim is None else [dim] if isinstance(dim, int) else list(dim)
    return inf.tie(inf.form(x), dims).expand(shape_of(node))


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sample(inf: Inference, node: fx.Node, x: Value, grid: Value, *_: Any) -> Result:
    """Linear in the image for pinned positions."""
    inf.pin(grid, "positions of a grid sample")
    dims = list(range(2, len(x.shape)))
    return inf.tie(inf.form(x), dims).expand(shape_of(node))


@rule("masked_fill", "where")
def masked(inf: Inference, node: fx.Node, *args: Any) -> Result:
    """Choosing between a tensor and zero keeps its scale; between two tensors ties them."""
    shape = shape_of(node)
    name = str(node.target)
    mask, values = (args[1], (args[0], args[2])) if "masked_fill" in name else (args[0], args[1:])
    if not values:  # where(mask): positions, known only at run time
        refuse()
    live = []
    for v in values:
        zero = v.zero if isinstance(v, Value) else v == 0
        infinite = not isinstance(v, Value) and v in (float("inf"), float("-inf"))
        if zero or infinite:
            continue
        live.append(v if isinstance(v, Value) else inf.fixed(()))
    if not live:
        return Value(shape, Form(shape), zero=True)
    for other in live[1:]:
        inf.equate(inf.form(live[0]), inf.form(other))
    return inf.form(live[0]).expand(shape)
