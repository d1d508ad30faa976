"""Which scales change outputs that should keep their bits, and what they pass through."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from pathlift.capture.program import Call, Program, symbols_in
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
        made_by = {s: c for c in graph.calls for s in symbols_in(c.outputs)}
        readers = [
            c
            for c in graph.calls
            if any(graph.tensors.get(s) in names for s in symbols_in(c.arguments))
        ]

        def users(call: Call) -> list[Call]:
            return [u for s in symbols_in(call.outputs) for u in graph.uses.get(s, ())]  # noqa: B023

        def makers(call: Call) -> list[Call]:
            return [made_by[s] for s in symbols_in(call.arguments) if s in made_by]  # noqa: B023

        after, before = _reached(readers, users), _reached(readers, makers)
        found.update((c.place, None) for c in graph.calls if c in after and c in before)
    return list(found)


def _reached(start: Sequence[Call], step: Callable[[Call], Sequence[Call]]) -> set[Call]:
    """Every call that some step from the start leads to."""
    seen: set[Call] = set()
    waiting = [c for call in start for c in step(call)]
    while waiting:
        call = waiting.pop()
        if call not in seen:
            seen.add(call)
            waiting += step(call)
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
