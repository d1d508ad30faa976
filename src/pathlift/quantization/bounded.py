"""ReLU6 with a bound per channel, which rescaling can move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from pathlift.capture.names import named_tensors
from pathlift.capture.program import Call, Graph, Program, Symbol

_BOUND = 6.0


class BoundedReLU(nn.Module):
    """``min(max(x, 0), bound)`` with a bound of its own for every channel.

    ``min(max(2^s x, 0), 2^s bound) = 2^s min(max(x, 0), bound)``: with its bound per channel, what
    pins ReLU6 is gone. The bound is a parameter (so that whatever rescales parameters moves it)
    that takes no gradient.

    Args:
        bound: of a shape that broadcasts to the activations; ``(C, 1, 1)`` for images.
    """

    def __init__(self, bound: Tensor) -> None:
        super().__init__()
        self.bound = nn.Parameter(bound.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """The activations, of the same shape."""
        return torch.minimum(x.relu(), self.bound)

    def extra_repr(self) -> str:
        """The bound's shape and range."""
        low, high = float(self.bound.min()), float(self.bound.max())
        return f"{tuple(self.bound.shape)}, bounds {low:.3g} to {high:.3g}"


def free_relu6_(model: nn.Module, program: Program, how: str) -> tuple[int, Program]:
    """Replace every ``nn.ReLU6`` (and ``nn.Hardtanh(0, 6)``) that one place of the model calls.

    Args:
        how: ``"per-channel"`` (:class:`BoundedReLU`, the same function) or ``"relu"`` (``nn.ReLU``:
            another function where activations exceed 6, as in the publication of cross-layer
            equalization).

    Returns:
        How many were replaced, and the program of the changed model.
    """
    found: dict[str, list[Call]] = {}
    for graph in program.graphs:
        for call in graph.calls:
            if call.name == "hardtanh" and call["min_val"] == 0 and call["max_val"] == _BOUND:
                found.setdefault(call.module, []).append(call)
    places = {
        place: calls[0]
        for place, calls in found.items()
        if isinstance(model.get_submodule(place), nn.Hardtanh)
        and len(calls) <= len(program.graphs)
        and len({c.shape[1:] for c in calls}) == 1
        and len(calls[0].shape) > 1
    }
    for place, call in places.items():
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, _module(call, how).to(program.device))
    parameters, buffers, aliases = named_tensors(model)
    graphs = tuple(_replaced(g, places, parameters, how) for g in program.graphs)
    named = replace(program, parameters=parameters, buffers=buffers, aliases=aliases)
    return len(places), replace(named, graphs=graphs)


def _module(call: Call, how: str) -> nn.Module:
    if how == "relu":
        return nn.ReLU()
    # Channels are the second dimension of images, the last one of vectors and tokens.
    rank, shape = len(call.shape), call.shape
    sizes = (shape[1], *(1,) * (rank - 2)) if rank >= 4 else (shape[-1],)
    return BoundedReLU(torch.full(sizes, _BOUND, dtype=call.output.dtype))


def _replaced(
    graph: Graph, places: Mapping[str, Call], tensors: Mapping[str, Tensor], how: str
) -> Graph:
    names, calls = dict(graph.tensors), []
    for call in graph.calls:
        if call.name != "hardtanh" or call.module not in places:
            calls.append(call)
            continue
        aten, x = torch.ops.aten, call["self"]
        if how == "relu":
            one = replace(call, target=aten.relu.default, name="relu", arguments={"self": x})
            calls.append(one)
            continue
        name = f"{call.module}.bound"
        bound = Symbol(tensors[name].shape, tensors[name].dtype)
        names[bound] = name
        positive = Symbol(call.shape, call.output.dtype)
        bounded = {"self": positive, "other": bound}
        calls += [
            Call(aten.relu.default, "relu", {"self": x}, (positive,), False, call.module),
            Call(aten.minimum.default, "minimum", bounded, call.outputs, False, call.module),
        ]
    return replace(graph, calls=tuple(calls), tensors=names)
