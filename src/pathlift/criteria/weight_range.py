"""Equal ranges ``max |w|`` on both sides of every channel: cross-layer equalization.

Nagel, van Baalen, Blankevoort, Welling, ICCV 2019; the limit of the weight norm for large q. Biases
do not count.
"""

from __future__ import annotations

from pathlift.capture.program import Program
from pathlift.criteria.protocol import Criterion, Sink
from pathlift.criteria.weight_norm import hand_on_sizes
from pathlift.solve.ranges import RANGES


def _hand_on(program: Program, sink: Sink) -> dict[str, int]:
    hand_on_sizes(program, sink, biases=False)
    return {}


weight_range = Criterion(_hand_on, rate=1.0, balanced=False, objective=RANGES)
