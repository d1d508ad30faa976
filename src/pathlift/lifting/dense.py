"""The path lifting by definition: every path of a small network, its Jacobian and its kernel.

A path starts at an input coordinate, at a bias or at a constant and ends at an output coordinate;
its weight ``Phi_path`` is the product of the fixed coefficients and parameters along it (METHOD
section 2; Gonon et al., ICLR 2024). Everything here needs memory in proportion to the number of
paths, so it serves small networks: to look at a whole spectrum, or to check what the passes in
:mod:`pathlift.lifting.squared` compute without listing.

How it lists: an activation is a table of paths, sorted by the element they end in. Every operation
becomes index triples "output element, left element, right element, coefficient", and one join of
two tables on them. The triples come from the operation itself: shape operations are run on element
numbers, pools on unit vectors, and operations linear in two arguments on element numbers on the
left and unit vectors on the right.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, fx, nn

from pathlift.capture import Graph, Program, capture, in_place, module_path, operation, shape_of
from pathlift.errors import ArgumentError, PathliftError, UnsupportedOperationError
from pathlift.lifting.squared import lifted_pass

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

# Unit vectors are run through an operation in batches of this many numbers.
_BATCH_ENTRIES = 2**22
# A dense Jacobian may have this many entries (2 GiB).
_MAX_DENSE_ENTRIES = 2**28


# --------------------------------------------------------------------------- public


@dataclass(frozen=True)
class Paths:
    """All paths of a network, one sample.

    Attributes:
        coefficients: ``(paths,)``, product of the fixed coefficients along each path.
        entries: ``(paths, longest)``, indices of the parameter entries along each path; -1 fills
            up. A parameter that the path passes m times stands there m times.
        theta: ``(parameters,)``, all floating-point parameters, flattened and joined, in float64.
        columns: parameter name -> its part of ``theta``; tied parameters stand under their first
            name.
    """

    coefficients: Array
    entries: Indices
    theta: Array
    columns: dict[str, slice]

    def __len__(self) -> int:
        return len(self.coefficients)

    def _factors(self) -> Array:
        """``(paths, longest)``: the parameters along each path, 1 where it is filled up."""
        return np.append(self.theta, 1.0)[self.entries]

    def lifting(self) -> Array:
        """``Phi``: ``(paths,)``, with sign."""
        return np.asarray(self.coefficients * self._factors().prod(axis=1))

    def jacobian(self) -> sparse.csr_array:
        """``dPhi``: ``(paths, parameters)``, sparse.

        The derivative of a monomial: a parameter passed m times gives ``m * Phi / theta``. It is
        the product of all the other factors, so a parameter that is 0 is no exception.
        """
        factors = self._factors()
        before, after = np.ones_like(factors), np.ones_like(factors)
        before[:, 1:] = np.cumprod(factors[:, :-1], axis=1)
        after[:, :-1] = np.cumprod(factors[:, :0:-1], axis=1)[:, ::-1]
        others = self.coefficients[:, None] * before * after
        rows, position = np.nonzero(self.entries >= 0)
        triples = (others[rows, position], (rows, self.entries[rows, position]))
        return sparse.csr_array(sparse.coo_array(triples, shape=(len(self), len(self.theta))))


def list_paths(model: nn.Module, example_inputs: object, *, max_paths: int = 100_000) -> Paths:
    """Every path of ``model``, one by one.

    Supported: fully connected layers, convolutions, products with parameters, sums, biases, skips,
    concatenation, shape operations, pooling, resizing, ReLU and its kin (identities on paths), and
    batch norm in affine form ``(x - mu) gamma / sigma + beta`` with its running statistics. Every
    path through a max is kept. A fixed coefficient of 0 holds no path; a parameter of 0 does.

    Where inputs and outputs have one common leading size and at least two dimensions, that is the
    batch, and the paths of the first sample are listed. Pass one sample to save work.

    Args:
        model: a small network, left as found.
        example_inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
        max_paths: where to stop.

    Raises:
        UnsupportedOperationError: an operation without paths, or that this listing does not know.
        PathliftError: more than ``max_paths`` paths end in one of the activations.
        ArgumentError, CaptureError: see :func:`pathlift.rescaling_group`.
    """
    if isinstance(max_paths, bool) or not isinstance(max_paths, int) or max_paths < 1:
        raise ArgumentError(f"max_paths must be a positive integer; found {max_paths!r}.")
    program = capture(model, example_inputs)
    graph = program.graph(program.training)
    columns, theta = _joined_parameters(program)
    context = _Context(program, max_paths, _batch_size(graph), columns)
    outputs = [table for table in _run(context, graph) if isinstance(table, _Table)]
    if not outputs:
        raise UnsupportedOperationError(
            "no output of the model depends on its inputs or parameters; there are no paths. "
            "Check that forward returns floating-point tensors."
        )
    found = _stacked([_first_sample(t, context.batch) for t in outputs])
    return Paths(found.coefficient, found.entries, theta, columns)


def path_lifting(model: nn.Module, example_inputs: object, *, max_paths: int = 100_000) -> Tensor:
    """``Phi``: the weight of every path, with sign, ``(paths,)`` in float64.

    Arguments and errors: :func:`list_paths`. A rescaling does not change it.
    """
    return torch.from_numpy(list_paths(model, example_inputs, max_paths=max_paths).lifting())


def path_jacobian(model: nn.Module, example_inputs: object, *, max_paths: int = 100_000) -> Tensor:
    """``dPhi = dPhi_path / dtheta_i``: dense ``(paths, parameters)`` in float64.

    Columns: all floating-point parameters in the order of ``model.named_parameters()``, each
    flattened (``list_paths(...).columns`` names them, ``list_paths(...).jacobian()`` is sparse).

    Raises:
        PathliftError: more than ``2**28`` entries (2 GiB).
        And see :func:`list_paths`.
    """
    return torch.from_numpy(_dense(list_paths(model, example_inputs, max_paths=max_paths)))


def path_gram(model: nn.Module, example_inputs: object, *, max_paths: int = 100_000) -> Tensor:
    """``G = dPhi^T dPhi``: dense ``(parameters, parameters)`` in float64.

    Its diagonal is :func:`pathlift.path_kernel_diagonal` where no path passes a parameter twice,
    and its non-zero spectrum is that of the path kernel ``K = dPhi dPhi^T``. Rescaling by
    ``theta' = D theta`` makes it ``D^-1 G D^-1``.

    Arguments and errors: :func:`list_paths`, columns as in :func:`path_jacobian`.
    """
    jacobian = list_paths(model, example_inputs, max_paths=max_paths).jacobian()
    count = jacobian.shape[1]
    if count * count > _MAX_DENSE_ENTRIES:
        raise PathliftError(
            f"the Gram matrix of {count:,} parameters has {count * count:,} entries, more than "
            f"{_MAX_DENSE_ENTRIES:,}. Use list_paths(...).jacobian(), which is sparse."
        )
    return torch.from_numpy((jacobian.T @ jacobian).toarray())


def path_kernel_spectrum(
    model: nn.Module, example_inputs: object, *, max_paths: int = 100_000
) -> Tensor:
    """Eigenvalues of the path kernel ``K = dPhi dPhi^T``, descending, float64.

    They are the squared singular values of ``dPhi``, ``min(paths, parameters)`` of them; what is
    left of K's spectrum is 0. Of these too, one per rescaling direction is 0 up to rounding
    (``1e-16`` of the largest singular value, so ``1e-32`` of the largest eigenvalue).

    Arguments and errors: :func:`list_paths` and :func:`path_jacobian`.
    """
    jacobian = _dense(list_paths(model, example_inputs, max_paths=max_paths))
    return torch.from_numpy(_singular_values(jacobian) ** 2)


def logdet_divergence(
    model: nn.Module,
    example_inputs: object,
    alpha: float | None = None,
    *,
    max_paths: int = 100_000,
) -> float:
    """Burg divergence of the path kernel from ``alpha I`` on the range of K, in nats.

    With the r non-zero eigenvalues ``l`` of K

        D(K || alpha I) = sum (l / alpha - log(l / alpha) - 1),

    which is 0 exactly when all of them equal ``alpha``. Its minimiser over ``alpha`` is
    ``trace(K) / r``, where ``D = r log(arithmetic mean / geometric mean of l)``.

    This is the exact divergence. The criterion F of METHOD section 3 differs from it: see
    ``docs/theory.md``.

    Args:
        model, example_inputs, max_paths: see :func:`list_paths`.
        alpha: the reference, positive; the best one if None.

    Returns:
        The divergence; 0.0 where K is 0. An eigenvalue counts as 0 where its root is below
        ``eps * max(paths, parameters)`` times the largest root.

    Raises:
        ArgumentError: ``alpha`` is not a positive number.
        And see :func:`list_paths` and :func:`path_jacobian`.
    """
    if alpha is not None and (
        isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf
    ):
        raise ArgumentError(f"alpha must be a positive number or None; found {alpha!r}.")
    jacobian = _dense(list_paths(model, example_inputs, max_paths=max_paths))
    roots = _singular_values(jacobian)
    if not roots.size or roots[0] == 0:
        return 0.0
    threshold = roots[0] * max(jacobian.shape) * np.finfo(np.float64).eps
    eigenvalues = roots[roots > threshold] ** 2
    ratios = eigenvalues / (eigenvalues.mean() if alpha is None else alpha)
    return float((ratios - np.log(ratios) - 1.0).sum())


def _dense(paths: Paths) -> Array:
    count = len(paths) * len(paths.theta)
    if count > _MAX_DENSE_ENTRIES:
        raise PathliftError(
            f"the dense Jacobian of {len(paths):,} paths and {len(paths.theta):,} parameters has "
            f"{count:,} entries, more than {_MAX_DENSE_ENTRIES:,}. Use "
            f"list_paths(...).jacobian(), which is sparse."
        )
    return np.asarray(paths.jacobian().toarray())


def _singular_values(jacobian: Array) -> Array:
    """Descending. Taken from dPhi, not from G: squaring would lose half of the digits."""
    if not jacobian.size:
        return np.zeros(0)
    return np.asarray(np.linalg.svd(jacobian, compute_uv=False))


# --------------------------------------------------------------------------- tables of paths


@dataclass(frozen=True)
class _Table:
    """The paths that end in the elements of one activation.

    ``shape`` is the activation's; ``owner`` ``(n,)`` the flat element each path ends in, ascending;
    ``coefficient`` ``(n,)``; ``entries`` ``(n, longest)`` as in :class:`Paths`.
    """

    shape: tuple[int, ...]
    owner: Indices
    coefficient: Array
    entries: Indices

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def counts(self) -> Indices:
        """``(size,)``: paths per element."""
        return np.bincount(self.owner, minlength=self.size).astype(np.int64)

    def reshaped(self, shape: Sequence[int]) -> _Table:
        return _Table(tuple(shape), self.owner, self.coefficient, self.entries)

    def times(self, factor: float) -> _Table:
        return _Table(self.shape, self.owner, self.coefficient * factor, self.entries)


class _Unknown:
    """A value that no path runs through and that is not known either (a mask, a random draw)."""


_UNKNOWN = _Unknown()


def _sorted(shape: Sequence[int], owner: Indices, coefficient: Array, entries: Indices) -> _Table:
    order = np.argsort(owner, kind="stable")
    return _Table(tuple(shape), owner[order], coefficient[order], entries[order])


def _constant(value: Tensor) -> _Table:
    """One path without parameters per element that is not 0."""
    flat = value.detach().to("cpu", torch.float64).reshape(-1).numpy()
    owner = np.flatnonzero(flat)
    return _Table(tuple(value.shape), owner, flat[owner], np.zeros((len(owner), 0), np.int64))


def _leaf(shape: Sequence[int], first: int) -> _Table:
    """A parameter whose entries are numbered from ``first``."""
    size = math.prod(shape)
    entries = np.arange(first, first + size, dtype=np.int64)[:, None]
    return _Table(tuple(shape), np.arange(size), np.ones(size), entries)


_UNIT = _constant(torch.ones(()))


def _widened(entries: Indices, width: int) -> Indices:
    return np.pad(entries, ((0, 0), (0, width - entries.shape[1])), constant_values=-1)


def _stacked(tables: Sequence[_Table]) -> _Table:
    """Tables one after the other, as one flat activation."""
    width = max(t.entries.shape[1] for t in tables)
    starts = np.cumsum([0, *(t.size for t in tables)])
    return _Table(
        (int(starts[-1]),),
        np.concatenate([t.owner + s for t, s in zip(tables, starts[:-1], strict=True)]),
        np.concatenate([t.coefficient for t in tables]),
        np.concatenate([_widened(t.entries, width) for t in tables]),
    )


def _first_sample(table: _Table, batch: int) -> _Table:
    keep = table.owner < table.size // batch
    return _Table(
        (table.size // batch,), table.owner[keep], table.coefficient[keep], table.entries[keep]
    )


# --------------------------------------------------------------------------- the run over the graph


@dataclass
class _Context:
    """What the rules see: the node at hand and the bound on the number of paths."""

    program: Program
    max_paths: int
    batch: int
    columns: dict[str, slice]
    node: fx.Node = field(init=False)

    def check(self, count: float) -> None:
        """Raise if an activation of the whole batch has too many paths."""
        if count / self.batch <= self.max_paths:
            return
        raise PathliftError(
            f"{count / self.batch:,.0f} paths end in the output of '{_name(self.node)}' "
            f"(in module '{module_path(self.node)}'), more than max_paths={self.max_paths:,}; the "
            f"whole model has about {_total(self.program)}. Listing is for small networks: use "
            f"path_norm and path_kernel_diagonal, which list nothing, or raise max_paths."
        )

    def refuse(self, reason: str) -> UnsupportedOperationError:
        return UnsupportedOperationError(
            f"paths can't be listed through '{_name(self.node)}' "
            f"(in module '{module_path(self.node)}'): {reason}. Supported: linear maps, "
            f"convolutions, ReLU and its kin, pooling, sums, products, shape operations and batch "
            f"norm with running statistics."
        )

    def table(self, value: Any) -> _Table:
        """A number or a known tensor as an activation that starts paths of its own."""
        if isinstance(value, _Table):
            return value
        return _constant(torch.as_tensor(value, dtype=torch.float64))

    def joined(
        self,
        shape: Sequence[int],
        out: Indices,
        left: _Table,
        i: Indices,
        right: _Table,
        j: Indices,
        coefficients: Array | float = 1.0,
    ) -> _Table:
        """``out[k] += coefficients[k] * left[i[k]] * right[j[k]]``: every pair of their paths."""
        counts, others = left.counts(), right.counts()
        pairs = counts[i] * others[j]
        # In float64 first: the number of pairs may leave the integers.
        self.check(float((counts[i].astype(np.float64) * others[j]).sum()))
        triple = np.repeat(np.arange(len(out)), pairs)
        local = np.arange(len(triple)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
        inner = others[j][triple]
        row = (np.cumsum(counts) - counts)[i][triple] + local // np.maximum(inner, 1)
        col = (np.cumsum(others) - others)[j][triple] + local % np.maximum(inner, 1)
        scale = np.broadcast_to(coefficients, len(out))[triple]
        return _sorted(
            shape,
            out[triple],
            scale * left.coefficient[row] * right.coefficient[col],
            np.hstack([left.entries[row], right.entries[col]]),
        )

    def mapped(
        self,
        x: _Table,
        shape: Sequence[int],
        out: Indices,
        source: Indices,
        coefficients: Array | float = 1.0,
    ) -> _Table:
        """``out[k] += coefficients[k] * x[source[k]]``."""
        return self.joined(shape, out, x, source, _UNIT, np.zeros_like(source), coefficients)

    def picked(self, x: _Table, numbers: Tensor) -> _Table:
        """``x`` at element numbers that count from 1, of the result's shape; 0 stands for none."""
        flat = numbers.to(torch.int64).reshape(-1).numpy()
        out = np.flatnonzero(flat)
        return self.mapped(x, numbers.shape, out, flat[out] - 1)

    def sum(self, left: _Table, right: _Table) -> _Table:
        """Sum with broadcasting: the paths of both."""
        shape = np.broadcast_shapes(left.shape, right.shape)
        parts = [self.expanded(t, shape) for t in (left, right)]
        self.check(float(sum(len(t.owner) for t in parts)))
        both = _stacked(parts)
        return _sorted(shape, both.owner % max(math.prod(shape), 1), both.coefficient, both.entries)

    def product(self, left: _Table, right: _Table) -> _Table:
        """Element-wise product with broadcasting."""
        shape = np.broadcast_shapes(left.shape, right.shape)
        i, j = (np.broadcast_to(np.arange(t.size).reshape(t.shape), shape) for t in (left, right))
        out = np.arange(math.prod(shape))
        return self.joined(shape, out, left, i.reshape(-1), right, j.reshape(-1))

    def expanded(self, x: _Table, shape: Sequence[int]) -> _Table:
        if x.shape == tuple(shape):
            return x
        return self.picked(x, _numbers(x.shape).expand(tuple(shape)))


def _name(node: fx.Node) -> str:
    return operation(node) if node.op == "call_function" else str(node.target)


def _total(program: Program) -> str:
    """The number of paths: the lifted pass with exponent 0, where every factor is 1."""
    try:
        with torch.no_grad():
            result = lifted_pass(program, program.training, p=0)
    except UnsupportedOperationError:
        return "as many or more"
    log10 = (math.log2(float(result.total)) + result.shift) * math.log10(2)
    return f"{10**log10:,.0f}" if log10 < 9 else f"10**{log10:.1f}"


def _joined_parameters(program: Program) -> tuple[dict[str, slice], Array]:
    columns: dict[str, slice] = {}
    values = [torch.zeros(0, dtype=torch.float64)]
    start = 0
    for name, q in program.parameters.items():
        if q.is_floating_point():
            columns[name] = slice(start, start + q.numel())
            start += q.numel()
            values.append(q.detach().to("cpu", torch.float64).reshape(-1))
    return columns, torch.cat(values).numpy()


def _batch_size(graph: Graph) -> int:
    """The leading size that all inputs and outputs share (1 if there is none)."""
    inputs = [
        n
        for n in graph.nodes
        if n.op == "placeholder" and n not in graph.constants and n.name not in graph.tensors
    ]
    shapes = [
        shape_of(n) for n in [*inputs, *graph.outputs()] if isinstance(n.meta.get("val"), Tensor)
    ]
    sizes = {s[0] if len(s) > 1 else 1 for s in shapes}
    return int(sizes.pop()) or 1 if len(sizes) == 1 else 1


def _run(context: _Context, graph: Graph) -> list[Any]:
    """Every node in order; the values of the outputs."""
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        context.node = node
        if node in graph.constants:
            env[node] = graph.constants[node]
        elif node.op == "placeholder":
            env[node] = _placeholder(context, graph.tensors.get(node.name, ""))
        elif node.op == "call_function":
            env[node] = _call(context, env)
            if in_place(node) and isinstance(node.args[0], fx.Node):
                env[node.args[0]] = env[node]
    return [env.get(n) for n in graph.outputs()]


def _placeholder(context: _Context, name: str) -> Any:
    node = context.node
    if name in context.columns:
        return _leaf(shape_of(node), context.columns[name].start)
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.is_floating_point():
        context.check(float(shape_of(node).numel()))
        return _constant(torch.ones(shape_of(node)))
    return _UNKNOWN


def _call(context: _Context, env: dict[fx.Node, Any]) -> Any:
    node = context.node
    args: Any = fx.node.map_arg(node.args, lambda n: env.get(n, _UNKNOWN))
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: env.get(n, _UNKNOWN))
    if node.target is operator.getitem:
        return args[0][args[1]] if isinstance(args[0], (list, tuple)) else _UNKNOWN
    values = _leaves((args, kwargs))
    if not any(isinstance(v, _Table) for v in values):
        return _UNKNOWN
    rule = RULES.get(operation(node))
    if rule is None:
        raise context.refuse("it has no paths, or none that this listing knows")
    if any(v is _UNKNOWN for v in values):
        raise context.refuse("one of its arguments is neither a constant nor made of paths")
    out = rule(context, *args, **kwargs)
    several = isinstance(node.meta.get("val"), (list, tuple))
    return [out, *[_UNKNOWN] * 3] if several and isinstance(out, _Table) else out


def _leaves(nested: Any) -> list[Any]:
    if isinstance(nested, dict):
        return [v for x in nested.values() for v in _leaves(x)]
    if isinstance(nested, (list, tuple)):
        return [v for x in nested for v in _leaves(x)]
    return [nested]


# --------------------------------------------------------------------------- rules

RULES: dict[str, Callable[..., Any]] = {}


def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what an ATen operation does to tables of paths."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            RULES[name] = function
        return function

    return register


def _numbers(shape: Sequence[int]) -> Tensor:
    """Element numbers from 1, as float64 (exact) because not every operation takes integers."""
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(tuple(shape))


@rule(
    *("relu", "leaky_relu", "rrelu", "abs", "prelu", "_prelu_kernel", "positive"),
    *("dropout", "feature_dropout", "native_dropout"),
    *("clone", "contiguous", "to", "_to_copy", "alias", "detach", "type_as", "float", "double"),
    *("lift_fresh", "lift_fresh_copy"),
)
def _identity(c: _Context, x: _Table, *_: Any, **__: Any) -> _Table:
    return x


@rule("clamp_min", "clamp")
def _clamp(c: _Context, x: _Table, min: Any = None, max: Any = None) -> _Table:
    if isinstance(min, (_Table, Tensor)) or min != 0 or max is not None:
        raise c.refuse("only a lower bound of 0 is piecewise linear without an offset")
    return x


@rule("neg")
def _neg(c: _Context, x: _Table) -> _Table:
    return x.times(-1.0)


@rule("add", "sub", "rsub", "maximum")
def _add(c: _Context, x: Any, y: Any, alpha: float = 1) -> _Table:
    x, y = c.table(x), c.table(y)
    name = operation(c.node)
    if name == "rsub":
        x, y = y, x
    return c.sum(x, y.times(-alpha if name in ("sub", "rsub") else alpha))


@rule("mul", "multiply")
def _mul(c: _Context, x: Any, y: Any) -> _Table:
    return c.product(c.table(x), c.table(y))


@rule("div", "divide", "true_divide")
def _div(c: _Context, x: Any, y: Any, **_: Any) -> _Table:
    if isinstance(y, _Table):
        raise c.refuse("the divisor depends on the inputs or parameters")
    return c.product(c.table(x), _constant(1.0 / torch.as_tensor(y, dtype=torch.float64)))


def _bilinear(
    c: _Context, function: Callable[[Tensor, Tensor], Tensor], x: _Table, w: _Table
) -> _Table:
    """An operation linear in each argument, where an entry of ``w`` meets at most one entry of
    ``x`` per output element: run on the element numbers of x and one unit vector of w, it returns
    the number of the entry it meets."""
    counts = (torch.from_numpy(t.counts()).double().reshape(t.shape) for t in (x, w))
    total = function(*counts)
    c.check(float(total.sum()))
    numbers = _numbers(x.shape)
    step = max(1, _BATCH_ENTRIES // max(total.numel(), w.size, 1))
    found = []
    for start in range(0, w.size, step):
        entries = torch.arange(start, min(start + step, w.size))
        units = torch.nn.functional.one_hot(entries, w.size).double().reshape(-1, *w.shape)
        met = torch.func.vmap(lambda unit: function(numbers, unit))(units).flatten(1)
        entry, position = met.nonzero(as_tuple=True)
        found.append(torch.stack([position, met[entry, position].long() - 1, entry + start]))
    out, i, j = torch.cat(found, 1).numpy() if found else np.zeros((3, 0), np.int64)
    return c.joined(tuple(total.shape), out, x, i, w, j)


def _with_bias(c: _Context, x: _Table, b: Any, axis: int) -> _Table:
    if b is None:
        return x
    shape = [1] * len(x.shape)
    shape[axis] = -1
    b = c.table(b)
    shape[axis] = b.size
    return c.sum(x, b.reshaped(shape))


@rule("linear")
def _linear(c: _Context, x: Any, w: Any, b: Any = None) -> _Table:
    return _with_bias(c, _bilinear(c, c.node.target, c.table(x), c.table(w)), b, -1)  # type: ignore[arg-type]


@rule(*(f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3)), "convolution")
def _conv(c: _Context, x: Any, w: Any, b: Any = None, *args: Any, **kwargs: Any) -> _Table:
    x, w = c.table(x), c.table(w)
    spatial = len(w.shape) - 2

    def function(left: Tensor, right: Tensor) -> Tensor:
        return c.node.target(left, right, None, *args, **kwargs)  # type: ignore[operator]

    return _with_bias(c, _bilinear(c, function, x, w), b, -1 - spatial)


@rule("matmul", "mm", "bmm")
def _matmul(c: _Context, x: Any, y: Any) -> _Table:
    return _bilinear(c, torch.matmul, c.table(x), c.table(y))


@rule("addmm", "baddbmm")
def _addmm(c: _Context, b: Any, x: Any, y: Any, beta: float = 1, alpha: float = 1) -> _Table:
    return c.sum(_matmul(c, x, y).times(alpha), c.table(b).times(beta))


@rule(
    *("batch_norm", "_native_batch_norm_legit_no_training"),
    *("_native_batch_norm_legit", "native_batch_norm", "_native_batch_norm_legit_functional"),
)
def _batch_norm(
    c: _Context, x: _Table, w: Any, b: Any, mean: Any = None, var: Any = None, *rest: Any
) -> _Table:
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        raise c.refuse("without running statistics it is no fixed affine map")
    eps = float(rest[-2] if operation(c.node) == "batch_norm" else rest[-1])
    shape = (-1,) + (1,) * (len(x.shape) - 2)
    centred = c.sum(x, _constant(-mean.reshape(shape)))
    out = c.product(centred, _constant((var.double() + eps).rsqrt().reshape(shape)))
    if w is not None:
        w = c.table(w)
        out = c.product(out, w.reshaped((w.size, *shape[1:])))
    return _with_bias(c, out, b, 1)


@rule("mean", "sum", "amax", "max")
def _reduce(c: _Context, x: _Table, dim: Any = None, keepdim: bool = False, **_: Any) -> _Table:
    if isinstance(dim, (_Table, Tensor)):  # max of two tensors
        return c.sum(x, c.table(dim))
    rank = len(x.shape)
    chosen = [dim] if isinstance(dim, int) else list(dim or range(rank))
    kept = list(x.shape)
    for d in chosen:
        kept[d] = 1
    target = _numbers(kept).expand(x.shape).reshape(-1).numpy().astype(np.int64) - 1
    share = math.prod(kept) / x.size if operation(c.node) == "mean" else 1.0
    return c.mapped(x, _first_shape(c.node), target, np.arange(x.size), share)


def _first_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of the node's first (or only) output."""
    value = node.meta["val"]
    first = value[0] if isinstance(value, (list, tuple)) else value
    return tuple(int(n) for n in first.shape)


def _slicewise(spatial: int) -> Callable[..., _Table]:
    """A fixed map of the last ``spatial`` dimensions, the same for every slice.

    Its coefficients are its values on unit vectors (max pooling: 1 where the window holds it).
    """

    def run(c: _Context, x: _Table, *args: Any, **kwargs: Any) -> _Table:
        inside = x.shape[-spatial:]
        target = _first_shape(c.node)
        size, count = math.prod(inside), math.prod(target[-spatial:])
        step = max(1, _BATCH_ENTRIES // size)
        found: list[Tensor] = []
        weights: list[Tensor] = []
        for start in range(0, size, step):
            units = torch.eye(size, dtype=torch.float64)[start : start + step]
            value = c.node.target(units.reshape(-1, 1, *inside), *args, **kwargs)  # type: ignore[operator]
            value = (value[0] if isinstance(value, (list, tuple)) else value).flatten(1)
            # A window of padding alone is 0 / 0 or -inf; it holds no path.
            value = value.nan_to_num(0.0, 0.0, 0.0)
            unit, position = value.nonzero(as_tuple=True)
            found.append(torch.stack([position, unit + start]))
            weights.append(value[unit, position])
        out, source = torch.cat(found, 1).numpy()
        slices = np.arange(x.size // size)[:, None]
        return c.mapped(
            x,
            target,
            (slices * count + out).reshape(-1),
            (slices * size + source).reshape(-1),
            np.tile(torch.cat(weights).numpy(), len(slices)),
        )

    return run


for _d, _linear_name in ((1, "linear"), (2, "bilinear"), (3, "trilinear")):
    rule(
        *(f"max_pool{_d}d", f"max_pool{_d}d_with_indices", f"avg_pool{_d}d"),
        *(f"adaptive_{kind}_pool{_d}d" for kind in ("avg", "max")),
        *(f"_adaptive_avg_pool{_d}d", f"upsample_{_linear_name}{_d}d"),
        *(f"upsample_nearest{_d}d", f"_upsample_nearest_exact{_d}d"),
    )(_slicewise(_d))


@rule(
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("_reshape_alias", "view_copy", "_reshape_copy", "view_as", "reshape_as"),
)
def _reshape(c: _Context, x: _Table, *_: Any, **__: Any) -> _Table:
    return x.reshaped(shape_of(c.node))


@rule(
    *("permute", "transpose", "t", "numpy_T", "mT", "movedim", "swapaxes", "expand"),
    *("slice", "select", "narrow", "roll", "flip", "repeat", "repeat_interleave", "tile"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"),
    *("split", "split_with_sizes", "chunk", "unbind", "tensor_split", "unsafe_split"),
    *("index_select", "broadcast_to", "diagonal", "tril", "triu"),
    *("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"),
    "unfold",
)
def _shape(c: _Context, x: _Table, *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(v, _Table) for v in _leaves((args, kwargs))):
        raise c.refuse("one of its arguments besides the first is made of paths")
    numbers = c.node.target(_numbers(x.shape), *args, **kwargs)  # type: ignore[operator]
    if isinstance(numbers, (list, tuple)):
        return [c.picked(x, n) for n in numbers]
    return c.picked(x, numbers)


@rule("pad", "constant_pad_nd")
def _pad(
    c: _Context, x: _Table, widths: Sequence[int], mode: Any = "constant", value: Any = None
) -> _Table:
    mode, value = (mode, value) if isinstance(mode, str) else ("constant", mode)
    padded = torch.nn.functional.pad(_numbers(x.shape), list(widths), mode=mode)
    out = c.picked(x, padded)
    if value and math.isfinite(value):  # -inf (in front of a max pool) starts no path
        return c.sum(out, _constant((padded == 0) * float(value)))
    return out


@rule("cat", "concat", "concatenate", "stack")
def _cat(c: _Context, tensors: Sequence[Any], dim: int = 0) -> _Table:
    tables = [c.table(t) for t in tensors]
    starts = np.cumsum([0, *(t.size for t in tables)]).tolist()
    numbers = [_numbers(t.shape) + s for t, s in zip(tables, starts[:-1], strict=True)]
    return c.picked(_stacked(tables), c.node.target(numbers, dim))  # type: ignore[operator]
