"""The lifted network: path norms and diag(G) in one forward and one backward pass.

Every parameter is replaced by ``|theta|^p``, every fixed coefficient ``a`` by ``|a|^p``, max
pooling by a sum over its window and ReLU by the identity. Fed with ones, the sum of the outputs
is ``||Phi||_p^p``; for p = 2 its gradient in the squared parameters is
``g_i = sum_p (dPhi_p / dtheta_i)^2`` (METHOD section 2; Gonon et al., ICLR 2024).

Range: an activation is kept as ``tensor * 2**shift`` with the tensor's largest entry near 1, so no
depth and no initial scale leaves float64. Powers of two are exact, so this costs no accuracy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from pathlift.capture import Graph, Program, in_place, module_path, operation, shape_of
from pathlift.errors import UnsupportedOperationError
from pathlift.lifting.parameters import (
    DroppedParameters,
    KeptParameters,
    SquaredRows,
    rescaled,
)
from pathlift.lifting.product import Product, dense


@dataclass(frozen=True)
class Lifted:
    """A non-negative activation of the lifted network: ``tensor * 2**shift`` (float64)."""

    tensor: Tensor
    shift: float = 0

    def map(self, function: Callable[[Tensor], Tensor]) -> Lifted:
        """Apply a map that is homogeneous of degree 1."""
        return Lifted(function(self.tensor), self.shift)

    def normalised(self) -> Lifted:
        """The same values with the largest entry in [1/2, 1)."""
        peak = float(self.tensor.detach().amax()) if self.tensor.numel() else 0.0
        if peak == 0.0 or not math.isfinite(peak):
            return self
        exponent = math.frexp(peak)[1]
        if abs(exponent) < 16:
            return self
        return Lifted(self.tensor * 2.0**-exponent, self.shift + exponent)


LIFTS: dict[str, Callable[..., Any]] = {}
Value = Lifted | Tensor  # a plain Tensor is a known constant


def lift(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register how an ATen operation acts in the lifted network."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            LIFTS[name] = function
        return function

    return register


@dataclass
class LiftedPass:
    """One run of the lifted network.

    Attributes:
        total: ``sum of outputs * 2**-shift``, per sample, differentiable in ``parameters``.
        outputs: every output ``* 2**-shift`` of one sample.
        shift: the common power of two taken out of ``total``.
        parameters: name -> ``|theta * 2**-unit|^p`` (requires grad).
        units: name -> the power of two taken out of the parameter.
        approximated: operations where paths are not defined and a stand-in was used, with counts.
    """

    total: Tensor
    outputs: list[Tensor]
    shift: float
    parameters: dict[str, Tensor]
    units: dict[str, int]
    approximated: dict[str, int]


class _Context:
    """What the rules see: the exponent and the node at hand."""

    def __init__(self, p: float, strict: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.p = p
        self.dtype = dtype
        self.device = device
        self.strict = strict
        self.node: fx.Node = None  # type: ignore[assignment]
        self.approximated: dict[str, int] = {}

    def coefficient(self, value: Any) -> Any:
        """``|a|^p`` of a fixed coefficient."""
        if isinstance(value, Tensor):
            return value.to(self.device, self.dtype).abs() ** self.p
        return abs(float(value)) ** self.p

    def lifted(self, value: Any) -> Lifted:
        """A constant as an activation that starts paths of its own (like a bias)."""
        if isinstance(value, Lifted):
            return value
        coefficient = self.coefficient(value)
        return Lifted(torch.as_tensor(coefficient, dtype=self.dtype, device=self.device))

    def ones(self, shape: Sequence[int] = ()) -> Tensor:
        """A tensor of ones."""
        return torch.ones(tuple(shape), dtype=self.dtype, device=self.device)

    def placed(self, value: Any) -> Any:
        """A constant, where the activations are."""
        return value.to(self.device) if isinstance(value, Tensor) else value

    def approximate(self) -> None:
        """Note the use of a stand-in, or refuse it."""
        name = operation(self.node)
        if self.strict:
            raise UnsupportedOperationError(
                f"the path lifting is not defined for '{name}' "
                f"(in module '{module_path(self.node)}'): it is not piecewise linear in the "
                f"network's input. Supported: linear maps, convolutions, ReLU and its kin, "
                f"pooling, batch norm with running statistics, sums and products. Use "
                f"criterion='weight-norm', or condition_, which uses a stand-in and says so."
            )
        self.approximated[name] = self.approximated.get(name, 0) + 1


def lifted_pass(
    program: Program,
    training: bool,
    p: float = 2,
    strict: bool = True,
    dtype: torch.dtype = torch.float64,
    differentiable: bool = False,
    store: KeptParameters | DroppedParameters | None = None,
) -> LiftedPass:
    """Run the lifted network of exponent ``p`` on ones.

    The value is per sample: where every input and every output has at least two dimensions and
    one common leading size, that dimension is taken as the batch and divided out.

    Every parameter is divided by a power of two that brings its largest entry near 1 before it is
    raised to ``p``, so the range of ``dtype`` bounds ratios within one tensor only.

    With ``differentiable`` the result is a function of the model's own parameters, else of the
    leaf tensors in :attr:`LiftedPass.parameters`. ``store`` says where lifted parameters come from
    and how long they stay; by default they are all kept.

    Raises:
        UnsupportedOperationError: ``strict`` and the graph has an operation without paths.
    """
    graph = program.graph(training)
    if store is None:
        store = KeptParameters(program, p, dtype, differentiable)
    context = _Context(p, strict, dtype, program.device)
    env: dict[fx.Node, Any] = {}
    batch: set[int] = set()
    owners = {n: graph.tensors.get(n.name, "") for n in graph.nodes if n.op == "placeholder"}
    weights = _weights(graph, owners)
    last = _last_reads(graph, {n for n, name in owners.items() if store.has(name)})
    for node in graph.nodes:
        context.node = node
        for source in node.all_input_nodes:
            name = owners.get(source, "")
            if source not in env and store.has(name):
                opened: Any = store.open(name, source in weights)
                env[source] = Lifted(opened, p * store.unit(name))
        if node in graph.constants:
            env[node] = context.placed(graph.constants[node])
        elif node.op == "placeholder":
            if not store.has(owners[node]) and isinstance(node.meta.get("val"), Tensor):
                shape = shape_of(node)
                batch.add(shape[0] if len(shape) > 1 else -1)
                env[node] = Lifted(context.ones().expand(shape))
        elif node.op == "call_function":
            env[node] = _call(context, node, env)
            if in_place(node) and isinstance(node.args[0], fx.Node):
                env[node.args[0]] = env[node]
        if node.op != "output":
            for source in last.get(node, ()):
                env.pop(source, None)
                store.close(owners.get(source, ""))
    outputs = [env[n] for n in graph.outputs() if isinstance(env.get(n), Lifted)]
    if not outputs:
        raise UnsupportedOperationError(
            "no output of the model depends on its inputs or parameters through supported "
            "operations; there are no paths. Check that forward returns floating-point tensors."
        )
    top = max(o.shift for o in outputs)
    values = [o.tensor * 2.0 ** max(o.shift - top, -1000) for o in outputs]
    total = torch.stack([v.sum() for v in values]).sum()
    for value in values:
        batch.add(value.shape[0] if value.dim() > 1 else -1)
    if len(batch) == 1 and -1 not in batch:
        total = total / batch.pop()
        values = [v[0] for v in values]
    return LiftedPass(total, values, top, store.leaves, store.units, context.approximated)


def _weights(graph: Graph, owners: dict[fx.Node, str]) -> set[fx.Node]:
    """The placeholders of parameters whose one use is as the weight of a linear map."""
    placeholders = Counter(owners.values())
    return {
        node
        for node, name in owners.items()
        if placeholders[name] == 1
        and len(node.users) == 1
        and all(n.op == "call_function" and operation(n) == "linear" for n in node.users)
        and all(n.args[0] is not node and n.args[1] is node for n in node.users)
        and len(shape_of(node)) == 2
    }


def _last_reads(graph: Graph, parameters: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the values that are read there for the last time.

    A parameter lives until the views taken of it alone (a transpose, a chunk) have been read too.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    reach: dict[fx.Node, int] = {}
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        plain = max((order[u] for u in node.users if u in order), default=order[node])
        views = [reach[u] for u in node.users if u in order and len(u.all_input_nodes) == 1]
        reach[node] = max([plain, *views])
        end = reach[node] if node in parameters else plain
        found.setdefault(graph.nodes[end], []).append(node)
    return found


def stream_diagonal(
    program: Program,
    training: bool,
    sink: Callable[[str, Tensor | Product], None],
    strict: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[float, dict[str, int]]:
    """``diag(G)`` up to one power of two, parameter by parameter, each handed on once complete.

    A parameter that one path passes m times counts m times. Memory: the activations of one sample
    and a few tensors of the size of the largest parameter.

    Args:
        sink: called with every name and ``g * 2**-shift`` of the parameter's shape, in the order
            of the backward pass (expanded zeros for a parameter on no path; a product for the
            weight of a linear map that is applied to few rows).

    Returns:
        The shift, and the operations a stand-in was used for.
    """
    store = DroppedParameters(program, dtype, sink)
    with torch.enable_grad():
        with store.saved():
            result = lifted_pass(program, training, 2, strict, dtype, store=store)
        if result.total.requires_grad:
            torch.autograd.grad(result.total, store.token, allow_unused=True)
    store.finish()
    return result.shift, result.approximated


def diagonal(
    program: Program,
    training: bool,
    strict: bool = True,
    dtype: torch.dtype = torch.float64,
    repeats: bool = False,
) -> tuple[dict[str, Tensor], float, dict[str, int]]:
    """``diag(G)`` up to one power of two.

    Args:
        repeats: count a parameter that one path passes m times m^2 times, as the definition says.
            Otherwise the gradient's m is taken, which costs one pass; both transform alike under
            rescaling, and they agree wherever no path meets a parameter twice.

    Returns:
        name -> float64 tensor ``g * 2**-shift`` of the parameter's shape (zeros for a parameter
        on no path), the shift, and the operations a stand-in was used for.
    """
    found: dict[str, Tensor] = {}
    if not repeats:
        shift, approximated = stream_diagonal(
            program, training, lambda n, g: found.update({n: dense(g)}), strict, dtype
        )
        ordered = {n: found[n] for n in program.parameters if n in found}
        return ordered, shift, approximated
    with torch.enable_grad():
        result = lifted_pass(program, training, 2, strict, dtype)
        names = list(result.parameters)
        grads: Sequence[Tensor | None] = [None] * len(names)
        if result.total.requires_grad:
            grads = torch.autograd.grad(
                result.total,
                [result.parameters[n] for n in names],
                allow_unused=True,
                create_graph=True,
            )
        for name, gradient in zip(names, grads, strict=True):
            u = result.parameters[name]
            g = torch.zeros_like(u) if gradient is None else gradient.detach()
            if gradient is not None and _reused(program, training, name):
                g = g + u.detach() * _second_derivatives(gradient, u)
            found[name] = dense(rescaled(g, result.units[name]))
    return found, result.shift, result.approximated


def _reused(program: Program, training: bool, name: str) -> bool:
    """Whether the graph reads the parameter, or a view of it, more than once."""
    graph = program.graph(training)
    chain = [n for n in graph.nodes if n.op == "placeholder" and graph.tensors.get(n.name) == name]
    while chain:
        node = chain.pop()
        if len(node.users) > 1:
            return True
        chain += [user for user in node.users if len(user.all_input_nodes) == 1]
    return False


def _second_derivatives(gradient: Tensor, u: Tensor) -> Tensor:
    """``d2F / du_i^2`` for every entry: ``u^m c`` has ``m(m-1) u^(m-2) c``, so that
    ``F_u + u F_uu = m^2 u^(m-1) c``."""
    if not gradient.requires_grad:
        return torch.zeros_like(u)
    # The whole tensor at once tells whether any path meets it twice.
    (along,) = torch.autograd.grad(gradient, u, u.detach(), retain_graph=True, allow_unused=True)
    if along is None or not bool(along.any()):
        return torch.zeros_like(u)
    flat = gradient.reshape(-1)
    entries = [
        torch.autograd.grad(flat[k], u, retain_graph=True)[0].reshape(-1)[k]
        for k in range(u.numel())
    ]
    return torch.stack(entries).reshape(u.shape)


def _call(context: _Context, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    args: Any = fx.node.map_arg(node.args, lambda n: env.get(n))
    kwargs = fx.node.map_arg(node.kwargs, lambda n: env.get(n))
    name = operation(node)
    if name == "getitem":
        return args[0][args[1]] if isinstance(args[0], (list, tuple)) else None
    values = _leaves((args, kwargs))
    if name in _EXPECTATION:
        return _EXPECTATION[name](args) * context.ones(shape_of(node))
    if not any(isinstance(v, Lifted) for v in values):
        return context.placed(_constant(node, args, kwargs))
    function = LIFTS.get(name)
    if function is None:
        if not isinstance(node.meta.get("val"), Tensor) or not shape_of(node).numel():
            return None
        if not node.meta["val"].is_floating_point():
            return _mask(context, node)
        context.approximate()
        return _stand_in(context, node, values)
    return _per_sample(function, context, node, args, kwargs)


def _per_sample(
    function: Callable[..., Any],
    context: _Context,
    node: fx.Node,
    args: Any,
    kwargs: Any,
) -> Any:
    """Run on one sample where all samples are equal by construction (stride 0)."""
    meta = node.meta.get("val")
    first = meta[0] if isinstance(meta, (list, tuple)) else meta
    rank, size = (first.dim(), len(first)) if isinstance(first, Tensor) and first.dim() else (0, 0)
    sampled = _sampled_arguments(operation(node), args, rank)
    leaves = _leaves(args[:sampled])
    full = [v.tensor if isinstance(v, Lifted) else v for v in leaves]
    full = [t for t in full if t.dim() == rank and t.shape[0] == size]
    if rank < 2 or size < 2 or not full or any(t.stride(0) != 0 for t in full):
        return function(context, *args, **kwargs)

    def cut(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [cut(v) for v in value]
        if isinstance(value, Lifted):
            return value.map(lambda t: t[:1] if t.dim() == rank and t.shape[0] == size else t)
        return value

    one = [cut(a) for a in args[:sampled]]
    out = function(context, *one, *args[sampled:], **kwargs)

    def widen(value: Any) -> Any:
        if isinstance(value, Lifted):
            return value.map(lambda t: t.expand(size, *t.shape[1:]))
        return value

    return [widen(v) for v in out] if isinstance(out, (list, tuple)) else widen(out)


def _sampled_arguments(name: str, args: Sequence[Any], rank: int) -> int:
    """How many leading arguments have samples along dimension 0, each of which gives its own."""
    if name in ("cat", "concat", "concatenate"):
        return int((args[1] if len(args) > 1 else 0) not in (0, -rank))
    least, number = _SAMPLEWISE.get(name, (0, 0))
    return number if rank >= least else 0


# Operation -> the least rank of its result where that has samples, and the number of arguments.
_SAMPLEWISE = {
    "linear": (2, 1),
    "batch_norm": (2, 1),
    **dict.fromkeys(("add", "sub", "mul"), (2, 2)),
    **{
        f"{name}{n}d": (n + 2, 1)
        for name in ("conv", "max_pool", "avg_pool", "adaptive_avg_pool")
        for n in (1, 2, 3)
    },
}

_EXPECTATION: dict[str, Callable[[Any], float]] = {
    "bernoulli": lambda args: float(args[1]) if len(args) > 1 and args[1] is not None else 1.0,
    "rand": lambda args: 0.5,
    "rand_like": lambda args: 0.5,
    "randn": lambda args: 0.0,
    "randn_like": lambda args: 0.0,
    "empty": lambda args: 0.0,
    "new_empty": lambda args: 0.0,
    "empty_like": lambda args: 0.0,
}


def _leaves(nested: Any) -> list[Any]:
    if isinstance(nested, (Lifted, Tensor)):
        return [nested]
    if isinstance(nested, dict):
        return [v for x in nested.values() for v in _leaves(x)]
    if isinstance(nested, (list, tuple)):
        return [v for x in nested for v in _leaves(x)]
    return []


def _constant(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Operations on constants are run as they are (in place: on a copy)."""
    if in_place(node):
        args = (args[0].clone(), *args[1:])
    try:
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # inputs of the graph that are not tensors, symbolic sizes
        return None


def _mask(context: _Context, node: fx.Node) -> Tensor:
    """A comparison of activations: every path is kept."""
    return context.ones(shape_of(node)).to(node.meta["val"].dtype)


def _stand_in(context: _Context, node: fx.Node, values: list[Any]) -> Lifted:
    """Unknown operation: its first activation where shapes agree, else its mean, broadcast."""
    shape = shape_of(node)
    source = next(v for v in values if isinstance(v, Lifted))
    if source.tensor.shape == shape:
        return source
    return source.map(lambda t: t.mean().expand(shape))


def _aligned(context: _Context, values: Sequence[Any]) -> tuple[list[Tensor], float]:
    """Tensors over one common shift."""
    lifted = [context.lifted(v) for v in values]
    shifts = sorted({v.shift for v in lifted}, reverse=True)
    top = shifts[0]
    if len(shifts) > 1:  # the shift of zeros says nothing
        live = (s for s in shifts if any(v.shift == s and bool(v.tensor.any()) for v in lifted))
        top = next(live, 0)
    return [
        v.tensor if v.shift == top else v.tensor * 2.0 ** max(min(v.shift - top, 0), -1000)
        for v in lifted
    ], top


# --------------------------------------------------------------------------- linear maps


@lift("linear")
def _linear(c: _Context, x: Any, w: Any, b: Any = None) -> Lifted:
    x, w = c.lifted(x), c.lifted(w)
    by_rows = isinstance(w.tensor, SquaredRows)
    product = w.tensor.linear(x.tensor) if by_rows else F.linear(x.tensor, w.tensor)
    out = Lifted(product, x.shift + w.shift)
    return _plus(c, out, b).normalised()


def _plus(c: _Context, x: Lifted, b: Any, shape: Sequence[int] | None = None) -> Lifted:
    if b is None:
        return x
    (left, right), shift = _aligned(c, (x, b))
    return Lifted(left + (right if shape is None else right.reshape(tuple(shape))), shift)


def _conv(function: Callable[..., Tensor], spatial: int) -> Callable[..., Lifted]:
    def run(c: _Context, x: Any, w: Any, b: Any = None, *args: Any, **kwargs: Any) -> Lifted:
        x, w = c.lifted(x), c.lifted(w)
        out = Lifted(function(x.tensor, w.tensor, None, *args, **kwargs), x.shift + w.shift)
        return _plus(c, out, b, (-1,) + (1,) * spatial).normalised()

    return run


for _d in (1, 2, 3):
    LIFTS[f"conv{_d}d"] = _conv(getattr(F, f"conv{_d}d"), _d)
    LIFTS[f"conv_transpose{_d}d"] = _conv(getattr(F, f"conv_transpose{_d}d"), _d)


@lift("convolution", "_convolution")
def _convolution(
    c: _Context,
    x: Any,
    w: Any,
    b: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    *_: Any,
) -> Lifted:
    x, w = c.lifted(x), c.lifted(w)
    out = torch.ops.aten.convolution.default(
        x.tensor,
        w.tensor,
        None,
        stride,
        padding,
        dilation,
        transposed,
        output_padding,
        groups,
    )
    spatial = w.tensor.dim() - 2
    return _plus(c, Lifted(out, x.shift + w.shift), b, (-1,) + (1,) * spatial).normalised()


@lift("embedding")
def _embedding(c: _Context, w: Any, index: Any, *_: Any, **__: Any) -> Lifted:
    w = c.lifted(w)
    if isinstance(index, Tensor):  # constant positions: the rows themselves
        return w.map(lambda t: F.embedding(index, t))
    shape = shape_of(c.node)
    return w.map(lambda t: t.sum(0).expand(shape))


@lift("matmul", "mm", "bmm")
def _matmul(c: _Context, x: Any, y: Any) -> Lifted:
    x, y = c.lifted(x), c.lifted(y)
    return Lifted(torch.matmul(x.tensor, y.tensor), x.shift + y.shift).normalised()


@lift("addmm", "baddbmm")
def _addmm(c: _Context, b: Any, x: Any, y: Any, beta: float = 1, alpha: float = 1) -> Lifted:
    out = _matmul(c, x, y).map(lambda t: t * c.coefficient(alpha))
    return _plus(c, out, c.lifted(b).map(lambda t: t * c.coefficient(beta)))


# --------------------------------------------------------------------------- pointwise


@lift(
    "relu",
    "leaky_relu",
    "rrelu",
    "abs",
    "neg",
    "dropout",
    "feature_dropout",
    "clone",
    "contiguous",
    "to",
    "_to_copy",
    "alias",
    "detach",
    "_prelu_kernel",
    "prelu",
    "threshold",
    "lift_fresh_copy",
    "lift_fresh",
    "type_as",
    "positive",
    "native_dropout",
    "float",
    "double",
    "cumsum",
)
def _identity(c: _Context, x: Lifted, *_: Any, **__: Any) -> Any:
    if operation(c.node) == "cumsum":
        return x.map(lambda t: t.cumsum(_[0]))
    if isinstance(c.node.meta.get("val"), (list, tuple)):
        return [x, None]
    return x


@lift("clamp_min", "clamp")
def _clamp(c: _Context, x: Lifted, low: Any = None, high: Any = None) -> Lifted:
    if isinstance(low, (Lifted, Tensor)) or low not in (None, 0) or high is not None:
        c.approximate()
    return x


@lift("add", "sub", "rsub", "maximum")
def _add(c: _Context, x: Any, y: Any, alpha: Any = 1) -> Lifted:
    x, y = c.lifted(x), c.lifted(y)
    if alpha != 1:
        scaled = "y" if operation(c.node) != "rsub" else "x"
        factor = c.coefficient(alpha)
        if scaled == "y":
            y = y.map(lambda t: t * factor)
        else:
            x = x.map(lambda t: t * factor)
    (left, right), shift = _aligned(c, (x, y))
    return Lifted(left + right, shift).normalised()


@lift("mul", "multiply")
def _mul(c: _Context, x: Any, y: Any) -> Lifted:
    x, y = c.lifted(x), c.lifted(y)
    return Lifted(x.tensor * y.tensor, x.shift + y.shift).normalised()


@lift("div", "divide", "true_divide")
def _div(c: _Context, x: Any, y: Any, **_: Any) -> Lifted:
    if isinstance(y, Lifted):
        c.approximate()
        return c.lifted(x)
    return c.lifted(x).map(lambda t: t / c.coefficient(y))


@lift("pow")
def _pow(c: _Context, x: Any, n: Any) -> Lifted:
    if not isinstance(x, Lifted) or isinstance(n, (Lifted, Tensor)) or n != int(n) or n < 1:
        c.approximate()
        return c.lifted(x)
    return Lifted(x.tensor ** int(n), x.shift * int(n)).normalised()


@lift("copy")
def _copy(c: _Context, x: Any, source: Any, *_: Any) -> Lifted:
    return c.lifted(source).map(lambda t: t.expand(shape_of(c.node)))


# --------------------------------------------------------------------------- normalization


@lift(
    "batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "native_batch_norm",
    "_native_batch_norm_legit_functional",
    "instance_norm",
)
def _batch_norm(
    c: _Context,
    x: Lifted,
    w: Any,
    b: Any,
    mean: Any = None,
    var: Any = None,
    *rest: Any,
) -> Any:
    several = isinstance(c.node.meta.get("val"), (list, tuple))
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        c.approximate()
        out = _rescaled_to_one(x, tuple(range(2, x.tensor.dim())))
        out = _affine(c, out, w, b, 1)
    else:
        eps = float(rest[-2] if operation(c.node) in ("batch_norm", "instance_norm") else rest[-1])
        view = (-1,) + (1,) * (x.tensor.dim() - 2)
        sigma = (var.to(c.device, torch.float64) + eps).sqrt().to(c.dtype)
        (left, right), shift = _aligned(c, (x, mean))
        out = Lifted((left + right.reshape(view)) / (sigma**c.p).reshape(view), shift)
        out = _affine(c, out, w, b, 1)
    out = out.normalised()
    return [out, None, None] if several else out


def _affine(c: _Context, x: Lifted, w: Any, b: Any, axis: int) -> Lifted:
    view = (-1,) + (1,) * (x.tensor.dim() - 1 - axis)
    if w is not None:
        w = c.lifted(w)
        shape = view if w.tensor.dim() == 1 and axis == 1 else w.tensor.shape
        x = Lifted(x.tensor * w.tensor.reshape(shape), x.shift + w.shift)
    if b is not None:
        x = _plus(c, x, b, view if axis == 1 else None)
    return x


def _rescaled_to_one(x: Lifted, dims: tuple[int, ...]) -> Lifted:
    """Statistics from the lifted activations themselves (stand-in for data)."""
    scale = x.tensor.detach().mean(dims, keepdim=True) if dims else x.tensor.detach()
    return Lifted(x.tensor / torch.where(scale > 0, scale, torch.ones_like(scale)))


@lift("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(
    c: _Context, x: Lifted, shape: Sequence[int], w: Any = None, b: Any = None, *_: Any
) -> Any:
    c.approximate()
    bias = b if isinstance(b, (Lifted, Tensor)) else None
    dims = tuple(range(x.tensor.dim() - len(shape), x.tensor.dim()))
    out = _affine(c, _rescaled_to_one(x, dims), w, bias, 0).normalised()
    return [out, None, None] if isinstance(c.node.meta.get("val"), (list, tuple)) else out


@lift("group_norm")
def _group_norm(
    c: _Context, x: Lifted, groups: int, w: Any = None, b: Any = None, *_: Any
) -> Lifted:
    c.approximate()
    dims = tuple(range(1, x.tensor.dim()))
    return _affine(c, _rescaled_to_one(x, dims), w, b, 1).normalised()


# --------------------------------------------------------------------------- pooling, reductions


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * n if len(values) == 1 else values


def _window_sum(
    x: Tensor,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    target: Sequence[int],
) -> Tensor:
    """Sum over each window, by a convolution with ones (any dilation, ceil mode by padding)."""
    n = len(size)
    if n == 2 and set(dilation) == {1}:
        out = F.avg_pool2d(x, size, stride, padding, True, True, divisor_override=1)
        if out.shape[-2:] == tuple(target):
            return out
    lead = x.shape[: x.dim() - n]
    flat = x.reshape(-1, 1, *x.shape[-n:])
    pads: list[int] = []
    for d in range(n):
        reach = (target[d] - 1) * stride[d] + dilation[d] * (size[d] - 1) + 1
        pads = [padding[d], max(reach - flat.shape[2 + d] - padding[d], 0)] + pads
    flat = F.pad(flat, pads)
    ones = x.new_ones((1, 1, *size))
    out = getattr(F, f"conv{n}d")(flat, ones, stride=stride, dilation=dilation)
    out = out[(..., *(slice(0, t) for t in target))]
    return out.reshape(*lead, *target)


def _target(c: _Context, n: int) -> tuple[int, ...]:
    meta = c.node.meta["val"]
    shape = meta[0].shape if isinstance(meta, (list, tuple)) else meta.shape
    return tuple(shape[-n:])


def _pools(n: int) -> None:
    def max_pool(
        c: _Context,
        x: Lifted,
        size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> Any:
        size = _tuple(size, n)
        stride = _tuple(stride, n) if stride else size
        out = x.map(
            lambda t: _window_sum(
                t, size, stride, _tuple(padding, n), _tuple(dilation, n), _target(c, n)
            )
        ).normalised()
        return [out, None] if isinstance(c.node.meta["val"], (list, tuple)) else out

    def avg_pool(
        c: _Context,
        x: Lifted,
        size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: Any = None,
    ) -> Lifted:
        size = _tuple(size, n)
        stride = _tuple(stride, n) if stride else size
        padding = _tuple(padding, n)
        total = x.map(lambda t: _window_sum(t, size, stride, padding, (1,) * n, _target(c, n)))
        ones = c.ones((1, 1, *x.tensor.shape[-n:]))
        # Each output position has one coefficient 1 / divisor; read it off the operation itself.
        extra = [divisor_override] if divisor_override is not None else []
        pool = getattr(F, f"avg_pool{n}d")
        mean = pool(ones, size, stride, padding, ceil_mode, count_include_pad, *extra)
        count = _window_sum(ones, size, stride, padding, (1,) * n, _target(c, n))
        # A window of padding alone (count 0) holds no path.
        weight = torch.where(count > 0, mean / count.clamp_min(1), 0.0).reshape(_target(c, n))
        return total.map(lambda t: t * weight**c.p).normalised()

    def adaptive(averaged: bool) -> Callable[..., Any]:
        def run(c: _Context, x: Lifted, size: Any) -> Any:
            target = _target(c, n)
            inside = x.tensor.shape[-n:]
            count = c.ones(target)
            for d in range(n):
                widths = [
                    -(-(i + 1) * inside[d] // target[d]) - i * inside[d] // target[d]
                    for i in range(target[d])
                ]
                view = [1] * n
                view[d] = -1
                count = count * torch.tensor(widths, dtype=c.dtype).to(c.device).reshape(view)
            pool = getattr(F, f"adaptive_avg_pool{n}d")
            weight = count ** (1 - c.p) if averaged else count
            out = x.map(lambda t: pool(t, target) * weight).normalised()
            return [out, None] if isinstance(c.node.meta["val"], (list, tuple)) else out

        return run

    LIFTS[f"max_pool{n}d"] = LIFTS[f"max_pool{n}d_with_indices"] = max_pool
    LIFTS[f"avg_pool{n}d"] = avg_pool
    LIFTS[f"adaptive_avg_pool{n}d"] = LIFTS[f"_adaptive_avg_pool{n}d"] = adaptive(True)
    LIFTS[f"adaptive_max_pool{n}d"] = adaptive(False)


for _d in (1, 2, 3):
    _pools(_d)


@lift(
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
    "reflection_pad1d",
    "reflection_pad2d",
    "replication_pad1d",
    "replication_pad2d",
)
def _resample_unit(c: _Context, x: Lifted, *args: Any, **kwargs: Any) -> Lifted:
    return x.map(lambda t: c.node.target(t, *args, **kwargs))  # type: ignore[operator]


@lift("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d")
def _resample_linear(c: _Context, x: Lifted, size: Any, align: bool, *scales: Any) -> Lifted:
    """Separable interpolation: one matrix of coefficients per dimension, raised to p."""
    n = {"1d": 1, "2d": 2, "3d": 3}[operation(c.node)[-2:]]
    target = _target(c, n)
    factors = list(scales[0]) if scales and isinstance(scales[0], (list, tuple)) else list(scales)
    factors += [None] * (n - len(factors))
    out = x.tensor
    for d in range(n):
        axis = out.dim() - n + d
        eye = torch.eye(out.shape[axis], dtype=c.dtype, device=c.device)[None]
        matrix = torch.ops.aten.upsample_linear1d(eye, [target[d]], align, factors[d])[0] ** c.p
        out = torch.movedim(torch.movedim(out, axis, -1) @ matrix, -1, axis)
    return Lifted(out, x.shift)


@lift("mean", "sum", "amax", "max")
def _reduce(c: _Context, x: Lifted, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
    if isinstance(dim, (Lifted, Tensor)):
        return _add(c, x, dim)
    dims = list(range(x.tensor.dim())) if dim is None or dim == [] else dim
    dims = [dims] if isinstance(dims, int) else list(dims)
    count = math.prod(x.tensor.shape[d] for d in dims)
    factor = float(count) ** -c.p if operation(c.node) == "mean" else 1.0
    out = x.map(lambda t: t.sum(dims, keepdim=keepdim) * factor).normalised()
    return [out, None] if isinstance(c.node.meta["val"], (list, tuple)) else out


# --------------------------------------------------------------------------- shapes


@lift(
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "view_as",
    "reshape_as",
    "_reshape_alias",
    "view_copy",
    "_reshape_copy",
)
def _reshape(c: _Context, x: Lifted, *_: Any, **__: Any) -> Lifted:
    shape = shape_of(c.node)
    return x.map(lambda t: t.reshape(shape))


@lift(
    "permute",
    "transpose",
    "t",
    "numpy_T",
    "mT",
    "expand",
    "slice",
    "select",
    "narrow",
    "roll",
    "flip",
    "pixel_shuffle",
    "pixel_unshuffle",
    "repeat",
    "repeat_interleave",
    "unfold",
    "movedim",
    "channel_shuffle",
    "native_channel_shuffle",
    "index_select",
    "tile",
    "swapaxes",
    "diagonal",
    "tril",
    "triu",
    "broadcast_to",
    "expand_as",
)
def _same(c: _Context, x: Lifted, *args: Any, **kwargs: Any) -> Lifted:
    plain = [a.tensor if isinstance(a, Lifted) else a for a in args]
    return x.map(lambda t: c.node.target(t, *plain, **kwargs))  # type: ignore[operator]


@lift("index", "_unsafe_index")
def _index(c: _Context, x: Lifted, indices: Sequence[Any]) -> Lifted:
    known = [i.tensor.long() * 0 if isinstance(i, Lifted) else i for i in indices]
    return x.map(lambda t: torch.ops.aten.index.Tensor(t, known))


@lift("pad", "constant_pad_nd")
def _pad(
    c: _Context,
    x: Lifted,
    widths: Sequence[int],
    mode: Any = "constant",
    value: Any = None,
) -> Lifted:
    mode, value = (mode, value) if isinstance(mode, str) else ("constant", mode)
    if value and math.isfinite(value):  # -inf (in front of a max pool) starts no path
        ones = torch.ones_like(x.tensor)
        border = 1 - F.pad(ones, list(widths))
        return _plus(c, x.map(lambda t: F.pad(t, list(widths))), border * abs(value))
    return x.map(lambda t: F.pad(t, list(widths), mode=mode))


@lift("split", "split_with_sizes", "chunk", "unbind", "tensor_split", "unsafe_split")
def _split(c: _Context, x: Lifted, *args: Any, **kwargs: Any) -> list[Lifted]:
    return [Lifted(t, x.shift) for t in c.node.target(x.tensor, *args, **kwargs)]  # type: ignore[operator]


@lift("cat", "concat", "stack", "concatenate")
def _cat(c: _Context, tensors: Sequence[Any], dim: int = 0) -> Lifted:
    parts, shift = _aligned(c, tensors)
    return Lifted(c.node.target(parts, dim), shift)  # type: ignore[operator]


@lift("masked_fill")
def _masked_fill(c: _Context, x: Any, mask: Any, value: Any) -> Lifted:
    keep = mask if isinstance(mask, Tensor) else c.ones(shape_of(c.node)) == 0
    return c.lifted(x).map(lambda t: t.masked_fill(keep, 0.0))


@lift("where")
def _where(c: _Context, mask: Any, x: Any, y: Any) -> Lifted:
    (left, right), shift = _aligned(c, (x, y))
    keep = mask if isinstance(mask, Tensor) else c.ones() == 1
    return Lifted(torch.where(keep, left, right).expand(shape_of(c.node)), shift)


@lift("scaled_dot_product_attention")
def _attention(c: _Context, q: Lifted, k: Lifted, v: Lifted, *_: Any, **__: Any) -> Lifted:
    """Stand-in: uniform attention weights times the products that enter the softmax."""
    c.approximate()
    q, k, v = (c.lifted(t) for t in (q, k, v))
    if q.tensor.shape[:-2] != k.tensor.shape[:-2]:
        return v.map(lambda t: t.mean().expand(shape_of(c.node)))
    d, tokens = q.tensor.shape[-1], k.tensor.shape[-2]
    scores = torch.matmul(q.tensor, k.tensor.transpose(-1, -2)) * d ** (-c.p / 2)
    out = torch.matmul(scores, v.tensor) * float(tokens) ** -c.p
    return Lifted(out, q.shift + k.shift + v.shift).normalised()
