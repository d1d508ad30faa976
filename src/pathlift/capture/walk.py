"""The one walk over a program: binds arguments, dispatches every call, frees what is done with."""

from __future__ import annotations

from typing import Any, Protocol

from pathlift.capture.program import Call, Graph, Symbol, replaced, symbols_in


class Reading(Protocol):
    """What a program means to one part of the pipeline (scales, squares, paths)."""

    def source(self, graph: Graph, symbol: Symbol) -> Any:
        """The value of a parameter, buffer, input or constant when it is read first."""

    def call(self, call: Call, arguments: dict[str, Any]) -> list[Any]:
        """The values of what a call returns, in the layout of ``call.outputs``."""

    def free(self, symbol: Symbol) -> None:
        """No later call reads the symbol."""


def walk(graph: Graph, reading: Reading) -> dict[Symbol, Any]:
    """Run ``reading`` over all calls; the values of what leaves the model.

    A value is let go after the last call that reads it.
    """
    env: dict[Symbol, Any] = {}

    def value_of(symbol: Symbol) -> Any:
        if symbol not in env:
            env[symbol] = reading.source(graph, symbol)
        return env[symbol]

    for call, dead in zip(graph.calls, graph.last_reads, strict=True):
        arguments = replaced(call.arguments, value_of)
        results = reading.call(call, arguments)
        for output, result in zip(call.outputs, results, strict=True):
            if isinstance(output, Symbol):
                env[output] = result
            elif output is not None:
                env.update(zip(output, result, strict=True))
        for symbol in dead:
            env.pop(symbol, None)
            reading.free(symbol)
    for symbol in symbols_in([*graph.outputs, *graph.leaving]):
        value_of(symbol)
    return env
