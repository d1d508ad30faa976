"""The bounds that the magnitudes of tensors put on scales."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathlift.symmetry.group import RescalingGroup
from pathlift.tensors.extents import Extent, exponent_limits

# No scale moves by more bits.
WIDEST = 60.0


def extent_bounds(
    group: RescalingGroup,
    known: Mapping[str, Extent],
    room_below: Mapping[str, Tensor] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds ``(H,)`` on the free log2 scales within which no parameter leaves its dtype's range.

    A tensor's headroom is shared equally among the scales that multiply it; activations keep half
    of the dtype's exponent range.

    Args:
        known: name -> magnitudes, of every tensor that moves.
        room_below: name -> by how many powers of two each entry may shrink (variances that must
            stay far above the eps of their norm).
    """
    touched: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    rooms: list[NDArray[np.float64]] = []
    for name, spec in group.parameters.items():
        if not spec.terms:
            continue
        low, high = exponent_limits(known[name].dtype)
        found = known[name].exponents
        above = high // 2 if found is None else max(min(high - 1 - found[1], high // 2), 0)
        below = high // 2 if found is None else max(min(found[0] - low, high // 2), 0)
        share = sum(abs(c) for c, _ in spec.terms)
        own = (room_below or {}).get(name)
        for coefficient, ids in spec.terms:
            down = torch.full(ids.shape, float(below))
            if own is not None:
                ids = ids.expand(own.shape)
                down = own.floor().clamp(0, below)
            up = torch.full(ids.shape, float(above))
            sides = (up, down) if coefficient > 0 else (down, up)
            touched.append(ids.numpy().reshape(-1))
            rooms.append(
                np.stack([np.floor(side.numpy().reshape(-1) / share) for side in sides], 1)
            )
    variables = np.concatenate(touched)
    room = np.concatenate([np.zeros((0, 2)), *rooms])
    rise = np.full(group.basis.shape[0], np.inf)
    fall = np.full(group.basis.shape[0], np.inf)
    np.minimum.at(rise, variables, room[:, 0])
    np.minimum.at(fall, variables, room[:, 1])
    # Through the basis: |s_h| is held to the tighter side where several scales add up.
    h = group.num_scales
    upper, lower = np.full(h, WIDEST), np.full(h, -WIDEST)
    basis = group.basis.tocoo()
    weight = np.asarray(abs(group.basis).sum(axis=1)).ravel()
    row, col, c = basis.row, basis.col, basis.data
    both = np.minimum(rise, fall)
    simple = (weight[row] == 1) & (c == 1)
    high_side = np.where(simple, rise[row], np.floor(both[row] / np.maximum(weight[row], 1)))
    low_side = np.where(simple, fall[row], np.floor(both[row] / np.maximum(weight[row], 1)))
    np.minimum.at(upper, col, high_side)
    np.maximum.at(lower, col, -low_side)
    return lower, upper
