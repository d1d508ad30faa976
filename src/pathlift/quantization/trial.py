"""Trying scales out: what rounding really does to the outputs on the example inputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from pathlift.capture.program import Inputs, Program
from pathlift.quantization.formats import Format
from pathlift.quantization.layers import Weight, rounded_weights
from pathlift.quantization.measure import layers_of, run, squared_error, watched
from pathlift.quantization.search import Asked
from pathlift.solve.matrix import Array
from pathlift.symmetry.group import RescalingGroup
from pathlift.tensors.rescale import Undo, rescale_

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


def rounding_error(
    model: nn.Module,
    found: Sequence[Weight],
    inputs: Inputs,
    exact: Sequence[Tensor],
    asked: Asked,
    activations: bool,
) -> float:
    """Squared error of the outputs with the weights (and layers' inputs) rounded."""
    rounded = rounded_weights(found, asked.format, asked.per)
    layers = layers_of(found) if activations else []
    with watched(layers, lambda _, x: rounded_range(x, asked.format)) if layers else nullcontext():
        return squared_error(exact, run(model, inputs, rounded))


class Trials:
    """A model whose weights are multiplied by scales, to be rounded and run.

    Args:
        model, program, group: captured.
        found: its weights.
        exact: the outputs on the example inputs.
        asked: the format, and per what.
        activations: whether layers' inputs are rounded, too.
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
        self._error = partial(
            rounding_error, model, found, program.inputs, exact, asked, activations
        )
        self._tensors = {**program.buffers, **program.parameters}
        self._group = group
        self.spread = _SPREAD / asked.format.steps**0.5
        self._undo: Undo | None = None
        self.scales = np.zeros(group.num_scales)
        self.error = self._error()
        self.errors = [self.error]
        self._applied = self.scales

    def put_(self, scales: Array) -> None:
        """Have the model multiplied by these scales."""
        if scales is self._applied:
            return
        if self._undo is not None:
            self._undo()
            self._undo = None
        if scales.any():
            self._undo = rescale_(self._tensors, self._group.factors(scales))
        self._applied = scales

    def try_(self, scales: Array) -> None:
        """Measure; the best so far are kept in ``scales`` and ``error``."""
        self.put_(scales)
        self.errors.append(self._error())
        if self.errors[-1] < self.error:
            self.scales, self.error = scales, self.errors[-1]


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
    trials.put_(trials.scales)
