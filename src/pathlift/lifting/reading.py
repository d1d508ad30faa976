"""The squared pass's reading of one call: by its entry, by a stand-in, or on one sample of many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pathlift.capture.program import Call, Graph, Program, Symbol, call, symbols_in
from pathlift.lifting.parameters import KeptParameters, PassingParameters
from pathlift.lifting.samples import Statistics, one_draw
from pathlift.lifting.values import Lifted, Squares, at_most_one
from pathlift.operations.table import TABLE, NoPaths, Operation, Undescribed, described


class SquaredReading:
    """The reading of a graph as the lifted network."""

    def __init__(
        self,
        program: Program,
        graph: Graph,
        store: KeptParameters | PassingParameters,
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
    """Operations on constants are run as they are; no draw makes one call differ from the next."""
    if "train" in arguments:  # dropout: what it keeps on average
        arguments = {**arguments, "train": False}
    try:
        with torch.no_grad(), one_draw():
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
