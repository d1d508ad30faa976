"""Which scales change outputs that should keep their bits, and what they pass through."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
from torch import fx

from pathlift.capture import Program, module_path, operation
from pathlift.symmetry.group import RescalingGroup

# Runs of the model that may be spent on finding the scales to blame.
TRIALS = 60
# Names that a message lists.
_LISTED = 4


def smallest(
    candidates: Sequence[int], fails: Callable[[list[int]], bool], trials: int = TRIALS
) -> list[int]:
    """A set of candidates that fails and of which no half does alone: delta debugging.

    All of ``candidates`` together must fail. About ``2 log2`` of their number trials if one of them
    is to blame; what is left when ``trials`` are spent is returned.
    """
    left = trials

    def tried(some: list[int]) -> bool:
        nonlocal left
        left -= 1
        return left >= 0 and fails(sorted(some))

    def reduced(some: list[int], others: list[int]) -> list[int]:
        if len(some) < 2 or left <= 0:
            return some
        half = len(some) // 2
        first, second = some[:half], some[half:]
        if tried(first + others):
            return reduced(first, others)
        if tried(second + others):
            return reduced(second, others)
        kept = reduced(first, others + second)
        return kept + reduced(second, others + kept)

    return sorted(reduced(list(candidates), []))


def carriers(group: RescalingGroup, scales: Collection[int]) -> list[str]:
    """The parameters that any of these scales multiplies."""
    touched = abs(group.basis[:, list(scales)]).sum(axis=1)
    variables = np.flatnonzero(np.asarray(touched).ravel())
    return [
        name
        for name, spec in group.parameters.items()
        if any(bool(np.isin(ids.numpy(), variables).any()) for _, ids in spec.terms)
    ]


def between(program: Program, names: Collection[str]) -> list[str]:
    """The operations that values pass between those that read these parameters, first to last."""
    found: dict[str, None] = {}
    for graph in program.graphs:
        readers = [
            node
            for node in graph.nodes
            if any(graph.tensors.get(n.name) in names for n in node.all_input_nodes)
        ]
        after = _reached(readers, lambda node: list(node.users))
        before = _reached(readers, lambda node: node.all_input_nodes)
        for node in graph.nodes:
            if node in after and node in before and node.op == "call_function":
                found[f"{operation(node)} at '{module_path(node)}'"] = None
    return list(found)


def _reached(
    start: Sequence[fx.Node], step: Callable[[fx.Node], Sequence[fx.Node]]
) -> set[fx.Node]:
    """Every node that some step from the start leads to."""
    seen: set[fx.Node] = set()
    waiting = [n for node in start for n in step(node)]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += step(node)
    return seen


def explained(group: RescalingGroup, program: Program, scales: Sequence[int]) -> str:
    """A sentence that names the parameters of these scales and the operations between them."""
    names = carriers(group, scales)
    found = between(program, set(names))
    one = f"scale {scales[0]} alone does" if len(scales) == 1 else f"{len(scales)} scales do"
    passed = f", which pass through {_listed(found)}" if found else ""
    return f"Of all scales {one}: of {_listed([repr(n) for n in names])}{passed}."


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
