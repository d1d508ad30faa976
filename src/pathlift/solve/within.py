"""A step to the minimum of a quadratic model within the bounds."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from pathlift.solve.matrix import Array, BoolArray


class Quadratic(Protocol):
    """The Hessian ``H`` of a model."""

    def solve(self, residual: Array, free: BoolArray) -> Array:
        """``d`` with ``H d = residual`` on the free scales, 0 on the others."""
        ...

    def times(self, direction: Array) -> Array:
        """``H d``."""
        ...


def within(
    step: Array,
    gradient: Array,
    free: BoolArray,
    room: tuple[Array, Array],
    model: Quadratic,
    rounds: int,
) -> Array:
    """A step towards the minimum of ``gradient . d + d H d / 2`` within the bounds, by active sets.

    A step that is cut off at a bound in one of its entries is wrong in all that moved along with
    it, and a search along it finds next to no progress. So what goes too far is put on its bound,
    and the others are solved for again.

    Args:
        step: the minimiser on the ``free`` scales, ``(H,)``.
        room: the least and the largest step, ``(H,)`` each.
        rounds: how often scales are put on their bounds.
    """
    low, high = room
    for _ in range(rounds):
        beyond = free & ((step < low) | (step > high))
        if not beyond.any():
            break
        free = free & ~beyond
        fixed = np.where(free, 0.0, np.clip(step, low, high))
        step = fixed + model.solve(np.where(free, -gradient - model.times(fixed), 0.0), free)
    return np.clip(step, low, high)
