"""What a report has to warn of, in words."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from pathlift.capture.program import Call, Program, Symbol, symbols_in
from pathlift.errors import ArgumentError
from pathlift.lifting.samples import fewest_values
from pathlift.solve import Solution
from pathlift.solve.assemble import Assembled
from pathlift.symmetry.group import RescalingGroup

# A span of log2 scales above which one learning rate hardly fits all layers.
_SPAN = 12
# A share of the counted parameters behind stand-ins from which the criterion is a guess.
_MUCH = 0.5
# Values per channel that a deviation takes to be known to a fifth or so.
_VALUES = 16


class NothingToDo(UserWarning):
    """A call of :func:`pathlift.condition_` that can change nothing."""


def behind_stand_ins(program: Program, approximated: Mapping[str, int]) -> int:
    """How many trainable parameter entries have all they do pass through a stand-in.

    ``approximated``: names of the operations that one was used for.
    """
    graph = program.graph(program.training)
    made_by: dict[Symbol, Call] = {s: c for c in graph.calls for s in symbols_in(c.outputs)}
    waiting = [s for c in graph.calls if c.label in approximated for s in symbols_in(c.arguments)]
    seen = set(waiting)
    while waiting:
        one = waiting.pop()
        if one in made_by:
            new = set(symbols_in(made_by[one].arguments)) - seen
            seen |= new
            waiting += new
    names = {graph.tensors.get(s) for s in seen} & program.parameters.keys()
    return sum(p.numel() for n, p in program.parameters.items() if n in names and p.requires_grad)


def nothing(group: RescalingGroup, assembled: Assembled) -> str | None:
    """Why nothing can change, if so."""
    if not group.num_scales:
        by = ", ".join(list(group.unsupported)[:4]) or "the model's inputs and outputs"
        return f"nothing can move: no scale of the model is free (pinned by {by})"
    if not assembled.problem.count:
        return "nothing counts: no trainable parameter lies on a path that the criterion sees"
    if len(assembled.dead) == group.num_scales:
        return (
            f"nothing can move: all {group.num_scales:,} scales are dead (a layer initialised to "
            f"zero hides what is in front of it); condition after the first steps, or initialise it"
        )
    return None


def few_values(program: Program) -> str:
    """A sentence if batch norms that have seen no data were read with the statistics of little."""
    values = fewest_values(program, _VALUES)
    if values >= _VALUES:
        return ""
    return (
        f"batch norms that have seen no data were read with the statistics of the example batch, "
        f"in which a channel has {values:,} values: too few to say what they divide by. Give a "
        f"batch as you train with"
    )


def announce(what: str | None, on_nothing: str) -> None:
    """Warn, raise or say nothing where a call can change nothing.

    Raises:
        ArgumentError: ``on_nothing`` is ``"error"``.
    """
    if what is None or on_nothing == "ignore":
        return
    if on_nothing == "error":
        raise ArgumentError(f"{what}. Nothing was changed.")
    warnings.warn(f"{what}. The model is as before.", NothingToDo, stacklevel=_callers_level())


def _callers_level() -> int:
    """How many frames above the one that warns the code lies that has called the library."""
    inside = (os.path.dirname(os.path.abspath(__file__)), os.path.dirname(torch.__file__))
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level


def cautions(
    group: RescalingGroup,
    program: Program,
    assembled: Assembled,
    solution: Solution,
    scales: NDArray[np.generic],
    behind: int,
    held: int = 0,
    canonical: bool = False,
    few: str = "",
) -> list[str]:
    """Sentences for the report, the gravest first.

    ``held``: scales of gains that stay. ``few``: see :func:`few_values`. ``canonical``: dead scales
    were given a place of their own.
    """
    found = []
    dead = len(assembled.dead)
    why = None if canonical and dead else nothing(group, assembled)
    if why is not None:
        found.append(why)
    if not solution.converged:
        found.append(f"the solver stopped short: {solution.reason or 'tolerance not reached'}")
    if len(solution.at_bounds):
        names = list(assembled.where(solution.at_bounds))
        found.append(
            f"{len(solution.at_bounds):,} scales are held at the bounds of what their dtype or "
            f"norm allows ({_listed(names)}): another call would gain more"
        )
    if few:
        found.append(few)
    if held:
        found.append(
            f"{held:,} of {group.num_scales:,} scales stay, those of norms' gains and layer "
            f"scales: moved, they make an adaptive optimiser train worse"
        )
    if canonical and dead:
        found.append(
            f"{dead:,} scales are dead: the path kernel says nothing of them, and they were placed "
            f"by the least logarithms of weights"
        )
    elif why is None and 2 * dead > group.num_scales:
        found.append(
            f"{dead:,} of {group.num_scales:,} scales are dead: a layer of zeros hides what is in "
            f"front of it"
        )
    unused = [n for n, s in group.parameters.items() if not s.uses and n in program.parameters]
    if unused:
        found.append(f"{len(unused):,} parameters were not used by forward ({_listed(unused)})")
    count = max(assembled.problem.count, 1)
    if behind > _MUCH * count:
        found.append(
            f"{min(behind / count, 1):.0%} of the counted parameters lie in front of operations "
            f"without paths, for which stand-ins were used: the imbalance is an estimate"
        )
    span = float(np.ptp(scales)) if len(scales) else 0.0
    if span > _SPAN:
        found.append(
            f"scales span 2^{span:.0f}: one learning rate for all layers may no longer fit; "
            f"compare training with and without"
        )
    return found


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(n) for n in names[:3]) + more
