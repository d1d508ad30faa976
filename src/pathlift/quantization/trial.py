"""Trying scales out: what rounding really does to the outputs on the example inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pathlift.capture.program import Program
from pathlift.quantization.formats import Format
from pathlift.quantization.layers import Weight
from pathlift.quantization.measure import layers_of, run, squared_error, watched
from pathlift.quantization.search import Asked
from pathlift.solve.matrix import Array
from pathlift.symmetry.group import RescalingGroup
from pathlift.tensors.rescale import check_memory, multiply_into_

# Deviation of scales that are drawn close by, for one step; it falls with the root of the steps.
_SPREAD = 0.1


def rounded_range(x: Tensor, format: Format) -> Tensor:
    """Values in steps of their range (zero included), of which whole numbers have 2 steps + 1."""
    if format.relative:
        return format.rounded(x)
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    most = 2 * format.steps + 1
    step = ((high - low) / most).clamp(min=torch.finfo(x.dtype).tiny)
    zero = (-low / step).round()
    found = ((x / step).round() + zero).clamp(0, most) - zero
    return found * step


class Trials:
    """A model whose weights are multiplied by scales, rounded in place, and run.

    In place, because a model may reach a weight by other ways than its name. The model's tensors
    are left rounded; :meth:`apply_` leaves them multiplied alone.

    Args:
        model, program, group: captured.
        found: its weights.
        exact: the outputs on the example inputs.
        asked: the format, and per what.
        activations: whether layers' inputs are rounded, too.

    Raises:
        ArgumentError: a weight's entries share their memory.
    """

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        group: RescalingGroup,
        found: Sequence[Weight],
        exact: Sequence[Tensor],
        asked: Asked,
        activations: bool,
    ) -> None:
        self._model, self._inputs, self._exact = model, program.inputs, exact
        self._group, self._found, self._asked = group, found, asked
        self._layers = layers_of(found) if activations else []
        tensors = {**program.buffers, **program.parameters}
        moved = {n: tensors[n].data for n, spec in group.parameters.items() if spec.terms}
        still = {w.name: w.parameter.data for w in found if w.name not in moved}
        # What moves last: a weight that stays may be another name for its memory.
        self._tensors = still | moved
        for name, tensor in self._tensors.items():
            check_memory(name, tensor)
        self._kept = {n: t.clone() for n, t in self._tensors.items()}
        self.spread = _SPREAD / asked.format.steps**0.5
        self.scales = np.zeros(group.num_scales)
        self.errors: list[float] = []
        self.error = math.inf
        self._measure_(self.scales)

    def _put_(self, scales: Array) -> None:
        """Have the model multiplied by these scales, and nothing else."""
        factors = self._group.factors(scales) if scales.any() else {}
        multiply_into_(self._tensors, self._kept, factors)

    def try_(self, scales: Array) -> None:
        """Measure; the best so far are kept in ``scales`` and ``error``."""
        self._put_(scales)
        self._measure_(scales)

    def _measure_(self, scales: Array) -> None:
        """Round the model, which is multiplied by these scales, and run it."""
        format = self._asked.format
        for one in self._found:
            values = one.parameter.data
            format.rounded(values, one.axis(self._asked.per), out=values)
        with watched(self._layers, lambda _, x: rounded_range(x, format)):
            self.errors.append(squared_error(self._exact, run(self._model, self._inputs)))
        if self.errors[-1] < self.error:
            self.scales, self.error = scales, self.errors[-1]

    def apply_(self) -> None:
        """Multiply the model by the best scales so far."""
        self._put_(self.scales)


def apply_best_(
    trials: Trials, candidates: Sequence[Array], limits: tuple[Array, Array], draws: int
) -> None:
    """Try these scales, then some close to the best so far, and leave the best in place.

    Close by, the predicted error is much the same; what rounding makes of it is another draw.
    """
    for scales in candidates:
        trials.try_(scales)
    generator = np.random.default_rng(0)
    for _ in range(draws):
        moved = trials.scales + trials.spread * generator.standard_normal(len(trials.scales))
        trials.try_(np.clip(moved, *limits))
    trials.apply_()
