"""What a captured model is: flat lists of ATen calls, arguments bound by schema name.

Everything later reads these calls, never the modules: what a module is called or how it is written
has no influence, only the operations it performs. Calls are functional: an in-place operation is
recorded as the operation it is named after, and every tensor that shares memory with what was
written is taken anew from it (see :mod:`pathlift.capture.aliases`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

# Name -> the values of a parameter, read when they are asked for.
Source = Callable[[str], Tensor]


@dataclass(frozen=True, eq=False)
class Symbol:
    """One tensor value of a program: what an operation returned, or a parameter, buffer, input."""

    shape: torch.Size
    dtype: torch.dtype

    def __repr__(self) -> str:
        return f"Symbol({tuple(self.shape)}, {str(self.dtype).removeprefix('torch.')})"


@dataclass(frozen=True, eq=False)
class Call:
    """One ATen call.

    Attributes:
        target: the operation, in its functional form where the model called it in place.
        name: its name without namespace and overload (``"relu"``).
        arguments: schema name -> value, defaults filled in; tensors are :class:`Symbol`.
        outputs: one entry per tensor or list of tensors that it returns; None for what is neither.
        several: whether the operation returns more than one value, or a list.
        module: path of the innermost module that made the call ("" for the model itself).
    """

    target: Any
    name: str
    arguments: dict[str, Any]
    outputs: tuple[Any, ...]
    several: bool
    module: str

    def __getitem__(self, argument: str) -> Any:
        return self.arguments[argument]

    @property
    def shape(self) -> torch.Size:
        """The shape of the first tensor returned."""
        return self.output.shape

    @property
    def output(self) -> Symbol:
        """The first tensor returned."""
        return next(iter(symbols_in(self.outputs)))

    @property
    def label(self) -> str:
        """The name as messages show it."""
        return self.name.strip("_")

    @property
    def place(self) -> str:
        """The operation and its module, for messages."""
        return f"{self.label} at '{self.module}'" if self.module else self.label

    def run(self, /, **replaced: Any) -> Any:
        """The operation itself, with some arguments replaced."""
        arguments = {**self.arguments, **replaced}
        return call(self.target, arguments)

    @cached_property
    def overridden(self) -> frozenset[str]:
        """Names of the arguments whose value is not the schema's default."""
        given = set()
        for argument in self.target._schema.arguments:
            value = self.arguments[argument.name]
            if not argument.has_default_value() or not _same(value, argument.default_value):
                given.add(argument.name)
        return frozenset(given)


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, Symbol) or any(True for _ in symbols_in(value)):
        return False
    return value is default or (type(value) is type(default) and bool(value == default))


def call(target: Any, arguments: Mapping[str, Any]) -> Any:
    """Call an operation with arguments by schema name."""
    args, kwargs = [], {}
    for argument in target._schema.arguments:
        if argument.kwarg_only:
            kwargs[argument.name] = arguments[argument.name]
        else:
            args.append(arguments[argument.name])
    return target(*args, **kwargs)


def symbols_in(nested: Any) -> Iterator[Symbol]:
    """All symbols inside nested lists, tuples and dicts, in order."""
    if isinstance(nested, Symbol):
        yield nested
    elif isinstance(nested, Mapping):
        for value in nested.values():
            yield from symbols_in(value)
    elif isinstance(nested, (list, tuple)):
        for value in nested:
            yield from symbols_in(value)


def replaced(nested: Any, value_of: Callable[[Symbol], Any]) -> Any:
    """Nested lists, tuples and dicts with every symbol replaced."""
    if isinstance(nested, Symbol):
        return value_of(nested)
    if isinstance(nested, dict):
        return {k: replaced(v, value_of) for k, v in nested.items()}
    if isinstance(nested, (list, tuple)):
        return [replaced(v, value_of) for v in nested]
    return nested


@dataclass(frozen=True)
class Graph:
    """One execution of the model.

    Attributes:
        calls: the operations, in order.
        training: the mode the model was in.
        tensors: symbol -> name of the parameter or buffer it stands for; tied tensors stand under
            the first of their names.
        inputs: the symbols of the example inputs.
        constants: symbol -> value, for what depends on neither inputs nor parameters nor state
            (buffers, masks, index tables, position ids).
        outputs: the floating-point tensors that the model returns, in order.
        leaving: symbol -> why, for everything that can be seen from outside the model after a call:
            outputs of any kind, and what was written into inputs, buffers, attributes and globals.
    """

    calls: tuple[Call, ...]
    training: bool
    tensors: dict[Symbol, str]
    inputs: tuple[Symbol, ...]
    constants: dict[Symbol, Tensor]
    outputs: tuple[Symbol, ...]
    leaving: dict[Symbol, str]

    @cached_property
    def last_reads(self) -> list[list[Symbol]]:
        """Per call, the symbols that no later call reads (and that are no output)."""
        kept = {*self.outputs, *self.leaving}
        last: dict[Symbol, int] = {}
        for k, one in enumerate(self.calls):
            for symbol in symbols_in(one.outputs):
                last[symbol] = k
            for symbol in symbols_in(one.arguments):
                last[symbol] = k
        found: list[list[Symbol]] = [[] for _ in self.calls]
        for symbol, k in last.items():
            if symbol not in kept:
                found[k].append(symbol)
        return found

    @cached_property
    def uses(self) -> dict[Symbol, list[Call]]:
        """Symbol -> the calls that read it."""
        found: dict[Symbol, list[Call]] = {}
        for one in self.calls:
            for symbol in dict.fromkeys(symbols_in(one.arguments)):
                found.setdefault(symbol, []).append(one)
        return found

    @cached_property
    def batch(self) -> int | None:
        """The leading size that all inputs and outputs share, each of at least two dimensions."""
        floats = [s for s in self.inputs if s.dtype.is_floating_point or s.dtype.is_complex]
        shapes = [s.shape for s in (*(floats or self.inputs), *self.outputs)]
        sizes = {s[0] if len(s) > 1 else -1 for s in shapes}
        return sizes.pop() if len(sizes) == 1 and not sizes & {-1, 0} else None


@dataclass(frozen=True)
class Inputs:
    """Example inputs in the one form used inside: positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Program:
    """What the rest of the pipeline knows of a model.

    Attributes:
        graphs: one graph per mode, the model's own mode first.
        parameters: name -> parameter, each tensor once, under its first name.
        buffers: name -> buffer, each tensor once.
        aliases: further name -> first name, of tensors registered more than once.
        inputs: the example inputs.
        source: name -> values, for a model whose parameters are on the meta device.
        examples: mode -> the inputs it was recorded on, where the example inputs did not do (a
            batch of one in train mode).
        derived: tensors in attributes that every call makes anew of parameters alone (weights of
            pruned layers): they follow the parameters.
        folded: buffers whose values went into the program: it was computed with them on the way, or
            Python looked at them.
        written: parameters that a call writes to.
        reads: whether a real run in the model's own mode reads values that its record does not (a
            library's checks), or can't be watched: then other values may make it do something else.
        statistics: mean and variance of the inputs of batch norms on the example inputs, for the
            weights that the model had when it was captured; None if they were not asked for.
        peaks: name -> ``n`` where the largest entry of a parameter lies in ``[2^(n-1), 2^n)``, for
            the values of this moment; without a name where it is not known.
    """

    graphs: tuple[Graph, ...]
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    aliases: dict[str, str]
    inputs: Inputs
    source: Source | None = None
    examples: dict[bool, Inputs] = field(default_factory=dict)
    derived: frozenset[str] = frozenset()
    folded: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()
    reads: bool = True
    statistics: Mapping[Call, tuple[Tensor, Tensor]] | None = None
    peaks: Mapping[str, int] | None = None

    def value(self, name: str) -> Tensor:
        """The values of a parameter, to be read and then let go; not to be written to."""
        if self.source is not None:
            return self.source(name)
        return self.parameters[name].detach()

    @property
    def device(self) -> torch.device:
        """Where the values are worked on: with the model if it lies on one device that computes
        in float64, else on the host."""
        tensors = [*self.parameters.values(), *self.buffers.values()]
        tensors += [t for t in (*self.inputs.args, *self.inputs.kwargs.values()) if _is_tensor(t)]
        found = {t.device for t in tensors if not t.is_meta}
        host = torch.device("cpu")
        device = found.pop() if len(found) == 1 else host
        return host if device.type == "mps" else device

    @property
    def training(self) -> bool:
        """The mode the model was in when it was captured."""
        return self.graphs[0].training

    def graph(self, training: bool) -> Graph:
        """The graph of the given mode."""
        return next((g for g in self.graphs if g.training == training), self.graphs[0])


def buffer_named(name: str) -> str:
    """How messages speak of a buffer."""
    return f"buffer '{name}'"


def written_into(what: str) -> str:
    """Why a value leaves the model that is written into something from outside."""
    return f"written into {what}"


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def floating(symbols: Sequence[Symbol]) -> list[Symbol]:
    """Those of floating-point or complex type."""
    return [s for s in symbols if s.dtype.is_floating_point or s.dtype.is_complex]
