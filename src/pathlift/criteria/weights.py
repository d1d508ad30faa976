"""Criteria read off the weights alone: equal norms (ENorm) and equal ranges."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pathlift.capture import Program
from pathlift.criteria.protocol import Coefficients, Criterion
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

    def criterion(program: Program) -> Coefficients:
        values = {n: _size(p) ** q for n, p in program.parameters.items() if _counts(p, biases)}
        return Coefficients(values, rate=float(q), balanced=False)

    return criterion


def weight_range(program: Program) -> Coefficients:
    """Equal ranges ``max |w|`` on both sides of every channel (Nagel et al., ICCV 2019).

    Cross-layer equalization, the limit of :func:`weight_norm` for large q; biases do not count.
    """
    values = {n: _size(p) for n, p in program.parameters.items() if _counts(p, biases=False)}
    return Coefficients(values, rate=1.0, balanced=False, reduction="max")


def _counts(parameter: Tensor, biases: bool) -> bool:
    return parameter.is_floating_point() and (biases or parameter.dim() > 1)


def _size(parameter: Tensor) -> Tensor:
    # float64 throughout: a power of a small float32 underflows.
    return parameter.detach().to("cpu", torch.float64).abs()
