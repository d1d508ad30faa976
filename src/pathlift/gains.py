"""Scales of learned gains, which stay where they are under an adaptive optimiser.

A gain multiplies channels one by one: a norm's weight (fused or by hand), a layer scale. Few
parameters with many paths each, so the criterion makes them large and the matrices behind them
small by as much. An adaptive optimiser moves every entry by about its rate, however small the entry
is, and small matrices are swept away: docs/truth.md has a Llama with and without. Gradient descent,
for which the criterion is made, moves both in proportion.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pathlift.symmetry.group import RescalingGroup
from pathlift.symmetry.rows import ParameterScales
from pathlift.tensors.state import Optimizers
from pathlift.verdict import optimizer_kind


def held_gains(group: RescalingGroup, optimizer: Optimizers) -> NDArray[np.bool_]:
    """``(H,)``: the scales that multiply a gain, where ``optimizer`` is an adaptive one."""
    held = np.zeros(group.num_scales, dtype=bool)
    if optimizer_kind(optimizer) != "adaptive":
        return held
    for spec in group.parameters.values():
        if spec.terms and _is_gain(spec):
            used = np.concatenate([ids.numpy().reshape(-1) for _, ids in spec.terms])
            held[group.basis[np.unique(used)].indices] = True
    return held


def _is_gain(spec: ParameterScales) -> bool:
    """Whether all uses of a parameter multiply channels one by one, or are those of a norm."""
    operations = [use.split(" at ")[0] for use in spec.uses]
    return bool(operations) and all("norm" in name or name == "mul" for name in operations)
