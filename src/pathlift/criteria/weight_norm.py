"""Equal norms on both sides of every channel (ENorm), read off the weights alone."""

from __future__ import annotations

import math
from collections.abc import Callable

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

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.fill_(2), model[2].weight.fill_(3)
    >>> x = torch.zeros(1, 1)
    >>> report = pathlift.condition_(
    ...     model, x, criterion=pathlift.criteria.weight_norm(q=1), exact=False)
    >>> [round(p.item(), 4) for p in model.parameters()]  # both the root of 6
    [2.4495, 2.4495]
    """
    if isinstance(q, bool) or not isinstance(q, (int, float)) or not 0 < q < math.inf:
        raise ArgumentError(f"q must be a positive finite number; found {q!r}.")

    def hand_on(program: Program, sink: Sink) -> dict[str, int]:
        hand_on_sizes(program, lambda name, size: sink(name, size.pow_(q)), biases)
        return {}

    return Criterion(hand_on, rate=float(q), balanced=False)


def hand_on_sizes(program: Program, sink: Callable[[str, Tensor], None], biases: bool) -> None:
    """``|theta|`` of every floating parameter, float64; of matrices alone without ``biases``."""
    for name, parameter in program.parameters.items():
        if parameter.is_floating_point() and (biases or parameter.dim() > 1):
            sink(name, _size(program.value(name), program.device))


def _size(parameter: Tensor, device: torch.device) -> Tensor:
    # float64 throughout: a power of a small float32 underflows. A new tensor in any case.
    size = parameter.detach().to(device, torch.float64)
    return size.abs() if size.data_ptr() == parameter.data_ptr() else size.abs_()
