"""The solution within all the room there is.

The bounds of :mod:`pathlift.solve.bounds` hold whatever the other scales do: a tensor's headroom
is shared among the scales that multiply it, and each of twelve that add up gets a twelfth. Few
optima come near, and most that meet such a bound have room beyond. So scales are first solved for
without them, and those of what has left its range go back to their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pathlift.solve import solve
from pathlift.solve.assemble import Assembled
from pathlift.solve.bounds import WIDEST
from pathlift.solve.matrix import Array, BoolArray
from pathlift.solve.problem import Solution
from pathlift.symmetry.group import RescalingGroup
from pathlift.tensors.extents import Extent, exponent_limits

# How often scales of what left its range go back to their own bounds.
_TRIES = 3


def solve_in_range(
    group: RescalingGroup,
    known: Mapping[str, Extent],
    room_below: Mapping[str, Tensor],
    assembled: Assembled,
    solver: str,
    tol: float | None,
) -> tuple[Assembled, Solution]:
    """The solution, and the problem with the bounds that it was found within.

    Args:
        known: name -> magnitudes, of every tensor that moves.
        room_below: see :func:`pathlift.solve.bounds.extent_bounds`.
        assembled: the problem, with bounds that hold whatever the other scales do.
    """
    problem = assembled.problem
    tight = (problem.lower >= 0) | (problem.upper <= 0)
    for _ in range(_TRIES):
        lower = np.where(tight, problem.lower, -WIDEST)
        upper = np.where(tight, problem.upper, WIDEST)
        wider = replace(assembled, problem=replace(problem, lower=lower, upper=upper))
        found = solve(wider.operator, solver, tol)
        out = out_of_range(group, known, room_below, found.log2_scales)
        if not out.any():
            return wider, found
        tight = tight | out
    return assembled, solve(assembled.operator, solver, tol)


def out_of_range(
    group: RescalingGroup,
    known: Mapping[str, Extent],
    room_below: Mapping[str, Tensor],
    scales: Array,
) -> BoolArray:
    """``(H,)``: the scales of tensors and activations that leave their range (or nearly, so that
    there is room to round)."""
    values = np.asarray(group.basis @ scales)
    out = np.zeros(values.size, dtype=bool)
    for name, spec in group.parameters.items():
        if not spec.terms:
            continue
        extent = known[name]
        low, high = exponent_limits(extent.dtype)
        top = float(sum(abs(c) for c, _ in spec.terms))
        bottom = -top
        for coefficient, ids in spec.terms:
            variables = ids.numpy()
            shift = coefficient * values[variables]
            top, bottom = top + float(shift.max()), bottom + float(shift.min())
            own = room_below.get(name)
            beyond = np.abs(values[variables]) > high // 2
            if own is not None:
                beyond = beyond | (shift < -own.numpy())
            _mark(out, variables, beyond)
        if extent.exponents is None:
            continue
        if extent.exponents[1] + top >= high or extent.exponents[0] + bottom < low:
            for _, ids in spec.terms:
                _mark(out, ids.numpy(), np.ones((), dtype=bool))
    return np.asarray(abs(group.basis).T @ out.astype(np.float64) > 0)


def _mark(out: BoolArray, variables: NDArray[np.int64], where: BoolArray) -> None:
    """Set ``out`` for the variables that stand where ``where`` holds."""
    variables, where = np.broadcast_arrays(variables, where)
    out[variables[where]] = True
