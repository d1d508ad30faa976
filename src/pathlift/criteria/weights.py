"""Criteria read off the weights alone: equal norms (ENorm) and equal ranges."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pathlift.capture.program import Program
from pathlift.criteria.protocol import Criterion, Sink
from pathlift.errors import ArgumentError


def weight_norm(q: float = 2, biases: bool = True) -> Criterion:
    """Minimise ``sum |theta'|^q`` (Stock, Graham, Gribonval, Jegou, ICLR 2019).

    At the minimum the entries that enter a channel and those that leave it have equal q-norms.

    Args:
        q: positive exponent, 2 by default.
        biases: count biases and other vectors too (the publication does in one variant).
    """
    if isinstance(q, bool) or not isinstance(q, (int, float)) or not 0 < q < math.inf:
        raise ArgumentError(f"q must be a positive finite number; found {q!r}.")

    def hand_on(program: Program, sink: Sink) -> dict[str, int]:
        device = program.device
        for name, parameter in program.parameters.items():
            if _counts(parameter, biases):
                sink(name, _size(program.value(name), device).pow_(q))
        return {}

    return Criterion(hand_on, rate=float(q), balanced=False)


def _hand_on_sizes(program: Program, sink: Sink) -> dict[str, int]:
    device = program.device
    for name, parameter in program.parameters.items():
        if _counts(parameter, biases=False):
            sink(name, _size(program.value(name), device))
    return {}


# Equal ranges ``max |w|`` on both sides of every channel: cross-layer equalization (Nagel et al.,
# ICCV 2019), the limit of weight_norm for large q. Biases do not count.
weight_range = Criterion(_hand_on_sizes, rate=1.0, balanced=False, reduction="max")


def _counts(parameter: Tensor, biases: bool) -> bool:
    return parameter.is_floating_point() and (biases or parameter.dim() > 1)


def _size(parameter: Tensor, device: torch.device) -> Tensor:
    # float64 throughout: a power of a small float32 underflows. A new tensor in any case.
    size = parameter.detach().to(device, torch.float64)
    return size.abs() if size.data_ptr() == parameter.data_ptr() else size.abs_()
