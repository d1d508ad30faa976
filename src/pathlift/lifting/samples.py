"""What batch norms divide by before the first step: the statistics of the example batch.

Running statistics start at 0 and 1, and in train mode a norm divides by the batch's own deviation.
A criterion that took the 1 for what the norm divides by would see gains that are not there (METHOD
section 1). The program is run on the example inputs; the model and its statistics stay as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathlift.capture.program import Call, Graph, Program, Symbol, call
from pathlift.capture.walk import walk
from pathlift.operations.moments import batch_moments
from pathlift.operations.normalization import epsilon, is_batch_norm
from pathlift.surroundings import plain_arithmetic

# A call of a batch norm -> mean and variance of each channel.
Statistics = dict[Call, tuple[Tensor, Tensor]]


def batch_statistics(program: Program, training: bool) -> Statistics:
    """Statistics of the example batch for every batch norm that has seen no batch yet.

    Returns:
        call -> ``(mean, variance)``, each ``(channels,)`` in float64. A channel that does not vary
        on the example batch keeps its running statistics. Empty if no norm is untouched.
    """
    graph = program.graph(training)
    untouched = [k for k, c in enumerate(graph.calls) if _untouched(program, graph, c)]
    if not untouched:
        return {}
    if program.statistics is not None and all(x is _varied(x) for x in _inputs(program)):
        return {graph.calls[k]: program.statistics[graph.calls[k]] for k in untouched}
    start = dataclasses.replace(
        graph, calls=graph.calls[: untouched[-1] + 1], outputs=(), leaving={}
    )
    found: Statistics = {}
    wanted = {graph.calls[k] for k in untouched}
    with torch.no_grad(), plain_arithmetic(), one_draw():
        walk(start, _Values(program, wanted, found))
    return found


def fewest_values(program: Program, enough: int) -> int:
    """Values per channel that :func:`batch_statistics` has at least, up to ``enough``."""
    graph = program.graph(program.training)
    norms = {c: c["input"].shape for c in graph.calls if is_batch_norm(c)}
    values = {c: math.prod(s) // max(s[1], 1) for c, s in norms.items()}
    # Shapes are known; whether a norm is untouched is read off its statistics.
    few = (n for c, n in values.items() if n < enough and _untouched(program, graph, c))
    return min(few, default=enough)


def variance_room(program: Program) -> dict[str, Tensor]:
    """By how many powers of two the variances of batch norms may shrink, per channel.

    Statistics that are rescaled along are exact up to ``eps`` only: with the smaller of the running
    variance and that of the example batch, ``2^(2s) var`` stays at or above ``1e4 eps`` (METHOD
    section 1).

    Returns:
        name of the running variance -> float64 ``(channels,)``, log2, negative where it is below.
    """
    graph = program.graph(program.training)
    norms = [c for c in graph.calls if is_batch_norm(c) and c["running_var"] in graph.tensors]
    if not norms:
        return {}
    measured: Statistics = {}
    with torch.no_grad(), plain_arithmetic(), one_draw():
        walk(graph, _Values(program, set(norms), measured))
    found: dict[str, Tensor] = {}
    for one in norms:
        name = graph.tensors[one["running_var"]]
        variance = torch.minimum(measured[one][1].cpu(), program.buffers[name].double().cpu())
        room = (variance / (1e4 * epsilon(one))).clamp_min(1e-300).log2()
        found[name] = torch.minimum(found[name], room) if name in found else room
    return found


@contextmanager
def one_draw() -> Iterator[None]:
    """The same random numbers every time (dropout), and the caller's generator left as it was."""
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        yield


def _untouched(program: Program, graph: Graph, one: Call) -> bool:
    if not is_batch_norm(one):
        return False
    names = [graph.tensors.get(one[k]) for k in ("running_mean", "running_var")]
    if any(n is None or n not in program.buffers for n in names):
        return False
    mean, variance = (program.buffers[str(n)] for n in names)
    counter = program.buffers.get(f"{str(names[0]).rpartition('.')[0]}.num_batches_tracked")
    if counter is not None and bool(counter):
        return False
    # With a counter at zero a variance other than 1 is one that a rescaling has moved.
    return not bool(mean.any()) and (counter is not None or bool((variance == 1).all()))


class _Values:
    """The reading of a graph as what it computes."""

    def __init__(self, program: Program, wanted: set[Call], found: Statistics) -> None:
        self.program, self.wanted, self.found = program, wanted, found
        self.inputs = [_varied(t) for t in _inputs(program)]

    def source(self, graph: Graph, symbol: Symbol) -> Any:
        """A parameter, buffer, input or constant."""
        name = graph.tensors.get(symbol, "")
        if name in self.program.parameters:
            return self.program.value(name)
        if symbol in graph.constants:
            return graph.constants[symbol]
        if name in self.program.buffers:
            return self.program.buffers[name]
        if symbol in graph.inputs:
            return self.inputs[graph.inputs.index(symbol)].detach()
        return torch.zeros(symbol.shape, dtype=symbol.dtype)  # state, before the first call

    def free(self, symbol: Symbol) -> None:
        """Values are let go by the walk."""

    def call(self, one: Call, arguments: dict[str, Any]) -> list[Any]:
        """The results of a call; statistics of a batch norm's input are noted."""
        averages = ("running_mean", "running_var")
        arguments = {
            k: v.clone() if k in averages and v is not None else v for k, v in arguments.items()
        }
        if one in self.wanted:
            self.found[one] = batch_moments(arguments)
        result = call(one.target, arguments)
        return list(result) if one.several else [result]


def _inputs(program: Program) -> list[Tensor]:
    leaves = pytree.tree_leaves((program.inputs.args, program.inputs.kwargs))
    return [t for t in leaves if isinstance(t, Tensor)]


def _varied(tensor: Tensor) -> Tensor:
    """An input; noise for one that is the same everywhere (zeros, to say a shape)."""
    if not tensor.is_floating_point() or tensor.numel() < 2 or tensor.layout != torch.strided:
        return tensor
    if bool((tensor != tensor.reshape(-1)[0]).any()):
        return tensor
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return noise.to(tensor.device, tensor.dtype)
