"""The lifted network: path norms and diag(G) in one forward and one backward pass.

Every parameter is replaced by ``|theta|^p``, every fixed coefficient ``a`` by ``|a|^p``, max
pooling by a sum over its window and ReLU by the identity. Fed with ones, the sum of the outputs
is ``||Phi||_p^p``; for p = 2 its gradient in the squared parameters is
``g_i = sum_p (dPhi_p / dtheta_i)^2`` (METHOD section 2; Gonon et al., ICLR 2024).

Range: an activation is kept as ``tensor * 2**shift`` with the tensor's largest entry near 1, so no
depth and no initial scale leaves float64. Powers of two are exact, so this costs no accuracy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pathlift import operations
from pathlift.capture.program import Call, Graph, Program, Symbol, call, symbols_in
from pathlift.capture.walk import walk
from pathlift.collector import uncollected
from pathlift.errors import UnsupportedOperationError
from pathlift.lifting.parameters import DroppedParameters, KeptParameters, rescaled
from pathlift.lifting.samples import Statistics
from pathlift.lifting.values import Lifted, Squares, at_most_one
from pathlift.operations.table import TABLE, NoPaths, Operation, Undescribed, described
from pathlift.surroundings import plain_arithmetic
from pathlift.tensors.product import Product, dense

assert operations  # importing the package fills the table


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


@plain_arithmetic()
@uncollected
def lifted_pass(
    program: Program,
    training: bool,
    p: float = 2,
    strict: bool = True,
    dtype: torch.dtype = torch.float64,
    differentiable: bool = False,
    store: KeptParameters | DroppedParameters | None = None,
    statistics: Statistics | None = None,
) -> LiftedPass:
    """Run the lifted network of exponent ``p`` on ones.

    The value is per sample: where every input and every output has at least two dimensions and
    one common leading size, that dimension is taken as the batch and divided out.

    Every parameter is divided by a power of two that brings its largest entry near 1 before it is
    raised to ``p``, so the range of ``dtype`` bounds ratios within one tensor only.

    With ``differentiable`` the result is a function of the model's own parameters, else of the
    leaf tensors in :attr:`LiftedPass.parameters`. ``statistics`` replaces the running statistics of
    some batch norms (:func:`pathlift.lifting.samples.batch_statistics`). ``store`` says where
    lifted parameters come from and how long they stay; by default they are all kept.

    Raises:
        UnsupportedOperationError: ``strict`` and the graph has an operation without paths.
    """
    graph = program.graph(training)
    if store is None:
        store = KeptParameters(program, p, dtype, differentiable)
    reading = _SquaredReading(program, graph, store, Squares(p, strict, dtype, program.device))
    reading.statistics = statistics or {}
    env = walk(graph, reading)
    outputs = [env[s] for s in graph.outputs if isinstance(env.get(s), Lifted)]
    if not outputs:
        raise UnsupportedOperationError(
            "no output of the model depends on its inputs or parameters through supported "
            "operations; there are no paths. Check that forward returns floating-point tensors."
        )
    top = max(o.shift for o in outputs)
    values = [o.tensor * 2.0 ** max(o.shift - top, -1000) for o in outputs]
    total = torch.stack([v.sum() for v in values]).sum()
    if graph.batch is not None:
        total = total / graph.batch
        values = [v[0] for v in values]
    return LiftedPass(total, values, top, store.leaves, store.units, reading.context.approximated)


class _SquaredReading:
    """The reading of a graph as the lifted network."""

    def __init__(
        self,
        program: Program,
        graph: Graph,
        store: KeptParameters | DroppedParameters,
        context: Squares,
    ) -> None:
        self.program, self.store, self.context = program, store, context
        self.by_rows = _weights(graph)
        context.known = graph.constants.__contains__
        context.weighs = lambda call: _weighs(graph, call)
        self.opened: dict[Symbol, str] = {}
        # A parameter and what is made of it alone (views) -> the parameter; how many there are.
        self.views: dict[Symbol, Symbol] = {}
        self.alive: dict[Symbol, int] = {}
        self.statistics: Statistics = {}

    def source(self, graph: Graph, symbol: Symbol) -> Any:
        """A parameter, buffer, input or constant."""
        name = graph.tensors.get(symbol, "")
        if self.store.has(name):
            self.opened[symbol] = name
            self.views[symbol], self.alive[symbol] = symbol, 1
            opened: Any = self.store.open(name, symbol in self.by_rows)
            return Lifted(opened, self.context.p * self.store.unit(name))
        if symbol in graph.constants:
            return self.context.placed(graph.constants[symbol])
        if name in self.program.buffers:
            return self.context.placed(self.program.buffers[name].detach())
        return Lifted(self.context.ones().expand(symbol.shape))

    def free(self, symbol: Symbol) -> None:
        """A parameter is closed once it, and the last view of it, has been read."""
        root = self.views.pop(symbol, None)
        if root is not None:
            self.alive[root] -= 1
            if not self.alive[root]:
                self.store.close(self.opened.pop(root))

    def call(self, call: Call, arguments: dict[str, Any]) -> list[Any]:
        """The values of a call's results."""
        context = self.context
        context.node = call
        self._note_views(call)
        if call in self.statistics:
            mean, variance = self.statistics[call]
            arguments = {**arguments, "running_mean": mean, "running_var": variance}
        if call.name in EXPECTATION:
            filled = EXPECTATION[call.name](call) * context.ones(call.shape)
            return [filled, *[None] * (len(call.outputs) - 1)]
        if not any(isinstance(v, Lifted) for v in _leaves(arguments)):
            return _constants(context, call, arguments)
        entry = TABLE.get(call.name)
        try:
            if entry is None or isinstance(entry.squares, NoPaths):
                raise Undescribed
            out = _per_sample(entry, context, call, described(entry.squares, call, arguments))
        except Undescribed:
            out = self._stand_in(call, arguments)
        found = list(out) if isinstance(out, (list, tuple)) else [out]
        return found + [None] * (len(call.outputs) - len(found))

    def _note_views(self, call: Call) -> None:
        read = list(symbols_in(call.arguments))
        root = self.views.get(read[0]) if len(read) == 1 else None
        if root is not None:
            views = list(symbols_in(call.outputs))
            self.views.update((s, root) for s in views)
            self.alive[root] += len(views)

    def _stand_in(self, call: Call, arguments: dict[str, Any]) -> list[Any]:
        """An operation without paths: its first activation where shapes agree, else its mean.

        What it returns besides numbers (masks, indices) keeps every path.
        """
        context = self.context
        outputs: list[Any] = []
        noted = False
        for output in call.outputs:
            several = output if isinstance(output, list) else [output]
            made: list[Any] = []
            for symbol in several:
                if symbol is None or not symbol.shape.numel():
                    made.append(None)
                elif not symbol.dtype.is_floating_point:
                    made.append(context.ones(symbol.shape).to(symbol.dtype))
                else:
                    if not noted:
                        context.approximate()
                        noted = True
                    similar = _similar(context, arguments, symbol.shape)
                    if call.name in GATES:
                        similar = context.gate(similar)
                    elif call.name in BOUNDED:
                        similar = at_most_one(similar)
                    made.append(similar)
            outputs.append(made if isinstance(output, list) else made[0])
        return outputs


# Functions whose values are at most about 1, however large their input.
BOUNDED = frozenset({"tanh", "softsign", "erf", "sin"})
# Those of them that are one half at 0.
GATES = frozenset({"sigmoid", "hardsigmoid"})


def _similar(context: Squares, arguments: dict[str, Any], shape: torch.Size) -> Lifted:
    activations = (v for v in _leaves(arguments) if isinstance(v, Lifted))
    source = next((v for v in activations if isinstance(v.tensor, Tensor)), None)
    if source is None:  # weights alone, applied to what is not known: paths start here
        return Lifted(context.ones().expand(shape))
    if source.tensor.shape == shape:
        return Lifted(source.tensor, source.shift)
    return source.map(lambda t: t.mean().expand(shape))


def _leaves(nested: Any) -> list[Any]:
    if isinstance(nested, (Lifted, Tensor)):
        return [nested]
    if isinstance(nested, dict):
        return [v for x in nested.values() for v in _leaves(x)]
    if isinstance(nested, (list, tuple)):
        return [v for x in nested for v in _leaves(x)]
    return []


def _constants(context: Squares, one: Call, arguments: dict[str, Any]) -> list[Any]:
    """Operations on constants are run as they are."""
    try:
        with torch.no_grad():
            found = call(one.target, arguments)
    except Exception:  # inputs of the graph that are not tensors
        return [None] * len(one.outputs)
    values = list(found) if one.several else [found]
    return [context.placed(v) for v in values]


def _per_sample(entry: Operation, context: Squares, call: Call, arguments: dict[str, Any]) -> Any:
    """Run on one sample where all samples are equal by construction (stride 0)."""
    reading: Any = entry.squares
    shape = call.shape
    rank, size = len(shape), shape[0] if shape else 0
    if rank < 2 or size < 2:
        return reading(context, call, **arguments)
    names = [n for n in entry.samples(call) if n in arguments]
    full = [
        v.tensor if isinstance(v, Lifted) else v for n in names for v in _leaves([arguments[n]])
    ]
    full = [t for t in full if t.dim() == rank and t.shape[0] == size]
    if not full or any(t.stride(0) != 0 for t in full):
        return reading(context, call, **arguments)

    def first(tensor: Tensor) -> Tensor:
        return tensor[:1] if tensor.dim() == rank and tensor.shape[0] == size else tensor

    def cut(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [cut(v) for v in value]
        return first(value) if isinstance(value, Tensor) else _both(value, first)

    def widen(value: Any) -> Any:
        return _both(value, lambda t: t.expand(size, *t.shape[1:]))

    out = reading(context, call, **{**arguments, **{n: cut(arguments[n]) for n in names}})
    return [widen(v) for v in out] if isinstance(out, (list, tuple)) else widen(out)


def _both(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A view of an activation and of its gain."""
    if not isinstance(value, Lifted):
        return value
    gain = None if value.gain is None else function(value.gain)
    return Lifted(function(value.tensor), value.shift, gain)


_PRODUCTS = frozenset({"matmul", "mm", "bmm", "mv", "mul", "einsum", "baddbmm", "addmm"})


def _weighs(graph: Graph, call: Call) -> bool:
    """Whether what a call returns goes into a product, perhaps after a change of shape or type."""
    waiting = [call.output]
    while waiting:
        for user in graph.uses.get(waiting.pop(), ()):
            if user.name in _PRODUCTS:
                return True
            if len(list(symbols_in(user.arguments))) == 1:
                waiting += symbols_in(user.outputs)
    return False


# Random draws and memory without values: their expectation.
EXPECTATION: dict[str, Callable[[Call], float]] = {
    "bernoulli": lambda call: _number(call.arguments.get("p"), 1.0),
    "uniform": lambda call: (abs(_number(call["from"], 0)) + abs(_number(call["to"], 1))) / 2,
    "exponential": lambda call: 1.0,
    "normal": lambda call: abs(_number(call.arguments.get("mean"), 0.0)),
    "normal_functional": lambda call: abs(_number(call.arguments.get("mean"), 0.0)),
    "rand": lambda call: 0.5,
    "rand_like": lambda call: 0.5,
    "randn": lambda call: 0.0,
    "randn_like": lambda call: 0.0,
    "empty": lambda call: 0.0,
    "new_empty": lambda call: 0.0,
    "empty_like": lambda call: 0.0,
    "empty_strided": lambda call: 0.0,
}


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) else default


def _weights(graph: Graph) -> set[Symbol]:
    """Parameters whose one use is as the weight of a linear map."""
    names = Counter(graph.tensors.values())
    return {
        symbol
        for symbol, name in graph.tensors.items()
        if names[name] == 1
        and len(symbol.shape) == 2
        and symbol not in graph.leaving
        and [c.name for c in graph.uses.get(symbol, ())] == ["linear"]
        and graph.uses[symbol][0]["weight"] is symbol
        and graph.uses[symbol][0]["input"] is not symbol
    }


def stream_diagonal(
    program: Program,
    training: bool,
    sink: Callable[[str, Tensor | Product], None],
    strict: bool = True,
    dtype: torch.dtype = torch.float64,
    statistics: Statistics | None = None,
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
            result = lifted_pass(
                program, training, 2, strict, dtype, store=store, statistics=statistics
            )
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
    chain = [s for s, n in graph.tensors.items() if n == name]
    while chain:
        calls = graph.uses.get(chain.pop(), [])
        if len(calls) > 1:
            return True
        chain += [
            s
            for c in calls
            if len(list(symbols_in(c.arguments))) == 1
            for s in symbols_in(c.outputs)
        ]
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
