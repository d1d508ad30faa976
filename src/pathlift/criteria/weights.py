"""Criteria read off the weights alone: equal norms (ENorm) and equal ranges."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pathlift.capture import Program
from pathlift.criteria.protocol import Coefficients, Criterion, Sink, Stream, collected
from pathlift.errors import ArgumentError


def weight_norm(q: float = 2, biases: bool = True) -> Criterion:
    """Minimise ``sum |theta'|^q`` (Stock, Graham, Gribonval, Jegou, ICLR 2019).

    At the minimum the entries that enter a channel and those that leave it have equal q-norms.

    Args:
        q: positive exponent, 2 by default.
        biases: count biases and other vectors too (the publication does in one variant).
    """
    return collected(stream_weight_norm(q, biases))


def stream_weight_norm(q: float = 2, biases: bool = True) -> Stream:
    """:func:`weight_norm`, one parameter at a time."""
    if isinstance(q, bool) or not isinstance(q, (int, float)) or not 0 < q < math.inf:
        raise ArgumentError(f"q must be a positive finite number; found {q!r}.")

    def stream(program: Program, sink: Sink) -> Coefficients:
        for name, parameter in program.parameters.items():
            if _counts(parameter, biases):
                sink(name, _size(program.value(name)).pow_(q))
        return Coefficients({}, rate=float(q), balanced=False)

    return stream


def stream_weight_range(program: Program, sink: Sink) -> Coefficients:
    """Equal ranges ``max |w|`` on both sides of every channel (Nagel et al., ICCV 2019).

    Cross-layer equalization, the limit of :func:`weight_norm` for large q; biases do not count.
    """
    for name, parameter in program.parameters.items():
        if _counts(parameter, biases=False):
            sink(name, _size(program.value(name)))
    return Coefficients({}, rate=1.0, balanced=False, reduction="max")


weight_range = collected(stream_weight_range)


def _counts(parameter: Tensor, biases: bool) -> bool:
    return parameter.is_floating_point() and (biases or parameter.dim() > 1)


def _size(parameter: Tensor) -> Tensor:
    # float64 throughout: a power of a small float32 underflows. A new tensor in any case.
    return parameter.detach().cpu().abs().to(torch.float64)
