"""L-BFGS within bounds: many iterations on vectors of thousands of entries, at little cost each.

Nocedal, "Updating quasi-Newton matrices with limited storage" (Mathematics of Computation 35,
1980). Steps are shortened until the value falls far enough (Armijo's rule, by interpolation);
trial points are clipped to the bounds, which the scales of a model in float32 hardly ever reach.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pathlift.solve.matrix import Array

Function = Callable[[Array], tuple[float, Array]]

_MEMORY = 10
# The longest step of one coordinate (a power of two of a scale), and of the very first.
_LONGEST, _FIRST = 1.0, 0.5
_ENOUGH, _SHORTER = 1e-4, 8
# It ends where the value falls by less than this part in three steps.
_FLAT = 1e-6


def dot(one: Array, other: Array) -> float:
    """The product of two vectors, on one thread.

    From ten thousand entries on BLAS wakes another, which takes more time than it saves.
    """
    return float(np.einsum("i,i->", one, other))


@dataclass
class Curvature:
    """What past steps say of the second derivative; goes on from one function to one alike."""

    pairs: deque[tuple[Array, Array, float]] = field(default_factory=lambda: deque(maxlen=_MEMORY))

    def note(self, step: Array, bend: Array) -> None:
        """A step, and by what it changed the gradient."""
        product = dot(step, bend)
        if product > 1e-10 * dot(bend, bend):
            self.pairs.append((step, bend, 1.0 / product))

    def direction(self, gradient: Array) -> Array:
        """Minus the inverse second derivative times the gradient (two loops)."""
        found, factors = gradient.copy(), []
        for step, bend, inverse in reversed(self.pairs):
            factors.append(inverse * dot(step, found))
            found -= factors[-1] * bend
        if self.pairs:
            _, bend, inverse = self.pairs[-1]
            found /= inverse * dot(bend, bend)
        for (step, bend, inverse), factor in zip(self.pairs, reversed(factors), strict=True):
            found += (factor - inverse * dot(bend, found)) * step
        return np.asarray(-found)


def descend(
    function: Function,
    point: Array,
    lower: Array,
    upper: Array,
    iterations: int,
    curvature: Curvature,
) -> tuple[Array, int]:
    """A point within the bounds at which ``function`` is lower, and the evaluations it took.

    Args:
        function: a point ``(n,)`` -> value and gradient ``(n,)``.
        point: within the bounds.
        iterations: at most.
        curvature: what is known; what is learnt is added.
    """
    value, gradient = function(point)
    evaluations, flat = 1, 0
    for _ in range(iterations):
        way = curvature.direction(gradient)
        slope = dot(way, gradient)
        longest = float(np.abs(way).max(initial=0.0))
        if slope >= 0.0 or not longest:
            break
        length = min(1.0, _LONGEST / longest) if curvature.pairs else _FIRST / longest
        for _ in range(_SHORTER):
            trial = np.clip(point + length * way, lower, upper)
            now, bent = function(trial)
            evaluations += 1
            if now <= value + _ENOUGH * length * slope:
                break
            # Least of the parabola through both values and the slope.
            least = -slope * length**2 / (2.0 * (now - value - slope * length))
            length = max(0.1 * length, min(0.5 * length, least))
        else:
            break
        curvature.note(trial - point, bent - gradient)
        flat = flat + 1 if value - now < _FLAT * max(1.0, abs(value)) else 0
        point, value, gradient = trial, now, bent
        if flat == 3:
            break
    return point, evaluations
