"""The bounds that the magnitudes of tensors put on scales."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pathlift.symmetry.group import RescalingGroup
from pathlift.tensors.extents import Extent, exponent_limits


def extent_bounds(
    group: RescalingGroup, known: Mapping[str, Extent]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds ``(H,)`` on the free log2 scales within which no parameter leaves its dtype's range.

    A tensor's headroom is shared equally among the scales that multiply it; activations keep half
    of the dtype's exponent range.
    """
    touched: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    rooms: list[tuple[int, int]] = []
    for name, spec in group.parameters.items():
        if not spec.terms:
            continue
        low, high = exponent_limits(known[name].dtype)
        found = known[name].exponents
        above = high // 2 if found is None else max(min(high - 1 - found[1], high // 2), 0)
        below = high // 2 if found is None else max(min(found[0] - low, high // 2), 0)
        share = sum(abs(c) for c, _ in spec.terms)
        for coefficient, ids in spec.terms:
            rise, fall = (above, below) if coefficient > 0 else (below, above)
            touched.append(ids.numpy().reshape(-1))
            rooms.append((rise // share, fall // share))
    variables = np.concatenate(touched)
    room = np.asarray(rooms, dtype=np.float64).reshape(-1, 2)
    room = np.repeat(room, [len(ids) for ids in touched[1:]], axis=0)
    up = np.full(group.basis.shape[0], np.inf)
    down = np.full(group.basis.shape[0], np.inf)
    np.minimum.at(up, variables, room[:, 0])
    np.minimum.at(down, variables, room[:, 1])
    # Through the basis: |s_h| is held to the tighter side where several scales add up.
    h = group.num_scales
    upper, lower = np.full(h, 60.0), np.full(h, -60.0)
    basis = group.basis.tocoo()
    weight = np.asarray(abs(group.basis).sum(axis=1)).ravel()
    row, col, c = basis.row, basis.col, basis.data
    both = np.minimum(up, down)
    simple = (weight[row] == 1) & (c == 1)
    high_side = np.where(simple, up[row], np.floor(both[row] / np.maximum(weight[row], 1)))
    low_side = np.where(simple, down[row], np.floor(both[row] / np.maximum(weight[row], 1)))
    np.minimum.at(upper, col, high_side)
    np.maximum.at(lower, col, -low_side)
    return lower, upper
