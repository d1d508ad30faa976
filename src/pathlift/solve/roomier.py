"""Scales that stopped at a bound, solved for again within all the room there is.

The bounds of :mod:`pathlift.solve.bounds` hold whatever the other scales do: a tensor's headroom
is shared among the scales that multiply it, and each of twelve that add up gets a twelfth. Where
an optimum meets them, they are given up for what is known only afterwards: whether any tensor or
activation left its range.
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


def roomier(
    group: RescalingGroup,
    known: Mapping[str, Extent],
    room_below: Mapping[str, Tensor],
    assembled: Assembled,
    solution: Solution,
    solver: str,
    tol: float | None,
) -> tuple[Assembled, Solution]:
    """The problem with wider bounds and its solution, where ``solution`` is held by bounds.

    As given if no scale is held, or if no wider bounds are found that keep every tensor in range.
    """
    problem = assembled.problem
    tight = (problem.lower >= 0) | (problem.upper <= 0)
    for _ in range(_TRIES if len(solution.at_bounds) else 0):
        lower = np.where(tight, problem.lower, -WIDEST)
        upper = np.where(tight, problem.upper, WIDEST)
        wider = replace(assembled, problem=replace(problem, lower=lower, upper=upper))
        found = solve(wider.operator, solver, tol)
        out = out_of_range(group, known, room_below, found.log2_scales)
        if not out.any():
            return (wider, found) if found.objective < solution.objective else (assembled, solution)
        tight = tight | out
    return assembled, solution


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
        top, bottom = 1.0, -1.0
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
