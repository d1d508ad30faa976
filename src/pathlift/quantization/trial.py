"""Trying scales out: what rounding really does to the outputs on the example inputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from pathlift.capture.program import Inputs, Program
from pathlift.quantization.formats import Format
from pathlift.quantization.layers import Weight, rounded_weights
from pathlift.quantization.measure import layers_of, run, squared_error, watched
from pathlift.quantization.search import Asked
from pathlift.solve.matrix import Array
from pathlift.symmetry.group import RescalingGroup
from pathlift.tensors.rescale import rescale_


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


def apply_best_(
    model: nn.Module,
    found: Sequence[Weight],
    program: Program,
    group: RescalingGroup,
    candidates: Sequence[Array],
    exact: Sequence[Tensor],
    asked: Asked,
    activations: bool,
) -> tuple[Array, list[float]]:
    """Rescale by those of the candidates whose error is least, in place.

    Args:
        candidates: the first are the scales that the model has (zeros).
        exact: the outputs on the example inputs.

    Returns:
        The scales, and the error of every candidate.
    """
    tensors = {**program.buffers, **program.parameters}

    def error() -> float:
        return rounding_error(model, found, program.inputs, exact, asked, activations)

    errors = [error()]
    best, applied = 0, 0
    for k, scales in enumerate(candidates[1:], start=1):
        undo = rescale_(tensors, group.factors(scales))
        errors.append(error())
        if errors[k] < errors[best]:
            best = k
        if k == len(candidates) - 1 and best == k:
            applied = k
        else:
            undo()
    if best != applied:
        rescale_(tensors, group.factors(candidates[best]))
    return candidates[best], errors
