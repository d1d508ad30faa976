"""The definition: list every path of a small network, one by one.

An activation element is a list of paths; a path is (fixed coefficient, indices of the parameter
entries along it). Fixed linear operations are read off the real operation applied to unit vectors,
operations linear in a weight too by unit weights. Nothing here is shared with the fast pass but
the captured graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pathlift.capture.model import capture
from pathlift.capture.program import Call, Symbol, replaced

IDENTITY = {
    "relu",
    "leaky_relu",
    "abs",
    "dropout",
    "_prelu_kernel",
    "prelu",
    "clone",
    "contiguous",
    "alias",
    "detach",
    "_to_copy",
}
FIXED = {
    "max_pool2d",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "upsample_nearest2d",
    "max_pool1d",
    "upsample_bilinear2d",
    "mean",
    "sum",
    "avg_pool1d",
    "adaptive_avg_pool1d",
}
INDEX = {
    "view",
    "_unsafe_view",
    "reshape",
    "flatten",
    "permute",
    "transpose",
    "slice",
    "roll",
    "pixel_shuffle",
    "unsqueeze",
    "squeeze",
    "select",
    "chunk",
    "split",
    "expand",
    "flip",
}
BILINEAR = {"linear", "conv1d", "conv2d", "conv_transpose2d"}


class Listing:
    """All paths of ``model`` and what follows from them by definition (one sample)."""

    def __init__(self, model: nn.Module, *inputs: Tensor) -> None:
        program = capture(model, inputs)
        graph = program.graph(program.training)
        self.names: list[tuple[str, torch.Size]] = []
        self.theta: list[float] = []
        env: dict[Symbol, Any] = {}

        def value(symbol: Symbol) -> Any:
            if symbol in env:
                return env[symbol]
            if symbol in graph.constants:
                return graph.constants[symbol]
            name, shape = graph.tensors.get(symbol), tuple(symbol.shape)
            if name in program.buffers:
                return program.buffers[name]
            if name is None:
                found = _fill(shape, lambda k: [(1.0, ())])
            else:
                start = len(self.theta)
                self.names.append((name, torch.Size(shape)))
                self.theta += program.parameters[name].detach().double().flatten().tolist()
                found = _fill(shape, lambda k, s=start: [(1.0, (s + k,))])
            return env.setdefault(symbol, found)

        for call in graph.calls:
            arguments = replaced(call.arguments, value)
            args, kwargs = [], {}
            for argument in call.target._schema.arguments:
                if argument.kwarg_only:
                    kwargs[argument.name] = arguments[argument.name]
                else:
                    args.append(arguments[argument.name])
            made = _run(call, *args, **kwargs)
            env.update(zip(call.outputs, made if isinstance(made, list) else [made], strict=False))
        self.paths = [p for s in graph.outputs for cell in value(s).flat for p in cell]

    def weights(self) -> np.ndarray:
        """Phi: (paths,), absolute values."""
        return np.array([abs(c) * np.prod([abs(self.theta[i]) for i in e]) for c, e in self.paths])

    def norm(self, p: float) -> float:
        return float((self.weights() ** p).sum() ** (1 / p))

    def jacobian(self) -> np.ndarray:
        """dPhi: (paths, parameters)."""
        out = np.zeros((len(self.paths), len(self.theta)))
        for row, (c, entries) in enumerate(self.paths):
            for k, i in enumerate(entries):
                rest = entries[:k] + entries[k + 1 :]
                out[row, i] += c * np.prod([self.theta[j] for j in rest])
        return out

    def diagonal(self) -> dict[str, Tensor]:
        g = torch.from_numpy((self.jacobian() ** 2).sum(0))
        sizes = [shape.numel() for _, shape in self.names]
        return {
            n: part.reshape(shape)
            for (n, shape), part in zip(self.names, g.split(sizes), strict=True)
        }


def _fill(shape: tuple[int, ...], make: Any) -> np.ndarray:
    out = np.empty(shape, dtype=object)
    for k in range(out.size):
        out.flat[k] = make(k)
    return out


def _scaled(paths: list[Any], a: float) -> list[Any]:
    return [(c * a, e) for c, e in paths]


def _times(x: list[Any], y: list[Any], a: float = 1.0) -> list[Any]:
    return [(a * c * d, e + f) for c, e in x for d, f in y]


def _cells(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return np.broadcast_to(value, shape)
    tensor = torch.as_tensor(value, dtype=torch.float64).expand(shape)
    flat = tensor.reshape(-1).tolist()
    return _fill(shape, lambda k: [(flat[k], ())] if flat[k] else [])


def _combine(matrix: Tensor, cells: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Apply a (out, in) matrix of fixed coefficients."""
    flat, rows = list(cells.flat), matrix.tolist()
    return _fill(
        shape, lambda o: [p for i, a in enumerate(rows[o]) if a for p in _scaled(flat[i], a)]
    )


def _matrix(function: Any, shape: tuple[int, ...]) -> Tensor:
    """Columns: the function's value on each unit vector."""
    size = int(np.prod(shape))
    eye = torch.eye(size, dtype=torch.float64)
    return torch.stack([function(e.reshape(shape)).reshape(-1) for e in eye], 1)


def _run(node: Call, *args: Any, **kwargs: Any) -> Any:
    name, shape = node.name, tuple(node.shape)
    x = args[0]
    if name in IDENTITY:
        return x
    if name in FIXED:
        matrix = _matrix(lambda e: node.target(e, *args[1:], **kwargs), x.shape)
        return _combine(matrix, x, shape)
    if name in INDEX:
        ids = node.target(torch.arange(x.size).reshape(x.shape), *args[1:], **kwargs)
        pick = lambda i: x.reshape(-1)[i.reshape(-1).numpy()].reshape(tuple(i.shape))  # noqa: E731
        return [pick(i) for i in ids] if isinstance(ids, (list, tuple)) else pick(ids)
    if name in BILINEAR:
        return _bilinear(node, shape, *args, **kwargs)
    if name in ("add", "sub", "mul"):
        left, right = _cells(x, shape), _cells(args[1], shape)
        pairs = list(zip(left.flat, right.flat, strict=True))
        if name == "mul":
            return _fill(shape, lambda k: _times(*pairs[k]))
        sign = -1.0 if name == "sub" else 1.0
        return _fill(shape, lambda k: pairs[k][0] + _scaled(pairs[k][1], sign))
    if name == "cat":
        return np.concatenate(x, args[1])
    if name == "pad":
        ids = torch.nn.functional.pad(torch.arange(1, x.size + 1).reshape(x.shape), args[1])
        flat = [[], *x.flat]
        index = ids.reshape(-1).tolist()
        return _fill(shape, lambda k: flat[index[k]])
    if name == "batch_norm":
        return _batch_norm(x, *args[1:])
    raise NotImplementedError(name)


def _bilinear(
    node: Call, shape: tuple[int, ...], x: Any, w: Any, b: Any = None, *rest: Any, **kwargs: Any
) -> np.ndarray:
    out = _fill(shape, lambda k: [])
    zero = torch.zeros(w.shape, dtype=torch.float64)
    for k in range(w.size):
        unit = zero.clone()
        unit.view(-1)[k] = 1
        if node.name == "linear":
            matrix = _matrix(lambda e, u=unit: node.target(e, u), x.shape)
        else:
            matrix = _matrix(lambda e, u=unit: node.target(e, u, None, *rest, **kwargs), x.shape)
        for o, i in matrix.nonzero().tolist():
            out.flat[o] = out.flat[o] + _times(
                list(x.flat)[i], list(w.flat)[k], float(matrix[o, i])
            )
    if b is not None:
        axis = len(shape) - 1 if node.name == "linear" else 1
        view = [1] * len(shape)
        view[axis] = -1
        bias = np.broadcast_to(b.reshape(view), shape)
        for k in range(out.size):
            out.flat[k] = out.flat[k] + bias.flat[k]
    return out


def _batch_norm(
    x: Any,
    w: Any,
    b: Any,
    mean: Tensor,
    var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> np.ndarray:
    """gamma (x - mu) / sigma + beta with running statistics."""
    shape = x.shape
    view = (-1,) + (1,) * (x.ndim - 2)
    sigma = (var.double() + eps).sqrt().reshape(view).expand(shape).reshape(-1).tolist()
    mu = mean.double().reshape(view).expand(shape).reshape(-1).tolist()
    gamma = np.broadcast_to(w.reshape(view), shape) if w is not None else _cells(1.0, shape)
    beta = np.broadcast_to(b.reshape(view), shape) if b is not None else _cells(0.0, shape)
    return _fill(
        shape,
        lambda k: _times(x.flat[k] + [(-mu[k], ())], gamma.flat[k], 1 / sigma[k]) + beta.flat[k],
    )
