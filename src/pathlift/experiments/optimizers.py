"""Optimisers as pure functions on stacked parameters: R runs, each with its own learning rate.

Every rule takes and returns one parameter with a leading axis of runs and does to each slice what
its namesake in ``torch.optim`` does to one run's parameter (the tests compare them). The slots
carry torch's names, so that a run's state can be handed to a torch optimiser and taken back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pathlift.errors import ArgumentError

Slots = dict[str, Tensor]
Update = Callable[[Tensor, Tensor, Slots, Tensor, int], tuple[Tensor, Slots]]
MOMENTUM = 0.9
BETAS = (0.9, 0.999)
EPS = 1e-8
_MUON_MOMENTUM = 0.95
_MUON_COEFFICIENTS = (3.4445, -4.775, 2.0315)
_MUON_STEPS = 5
_MUON_EPS = 1e-7


@dataclass(frozen=True)
class Rule:
    """An optimiser.

    Attributes:
        update: ``(parameter, gradient, slots, rate, step) -> (parameter, slots)``; the tensors are
            (R, *shape), the rate is (R, 1, ...) and step counts from 1; nothing changes in place.
        slots: names of the state of a stacked parameter, all zero at first.
        torch: the same optimiser for one run, as a list since some rules need two.
    """

    update: Update
    slots: Callable[[Tensor], tuple[str, ...]]
    torch: Callable[[Sequence[nn.Parameter], float], list[torch.optim.Optimizer]]


def optimizer_named(name: str) -> Rule:
    """The rule of a name.

    Raises:
        ArgumentError: an unknown name; the message lists the known ones.
    """
    if name not in OPTIMIZERS:
        known = ", ".join(map(repr, OPTIMIZERS))
        raise ArgumentError(f"optimizer {name!r} is unknown. Supported: {known}.")
    return OPTIMIZERS[name]


def _sgd(p: Tensor, g: Tensor, slots: Slots, rate: Tensor, step: int) -> tuple[Tensor, Slots]:
    return p - rate * g, slots


def _momentum(p: Tensor, g: Tensor, slots: Slots, rate: Tensor, step: int) -> tuple[Tensor, Slots]:
    buffer = torch.add(g, slots["momentum_buffer"], alpha=MOMENTUM)
    return p - rate * buffer, {"momentum_buffer": buffer}


def _adam(p: Tensor, g: Tensor, slots: Slots, rate: Tensor, step: int) -> tuple[Tensor, Slots]:
    first = slots["exp_avg"].lerp(g, 1 - BETAS[0])
    second = torch.addcmul(slots["exp_avg_sq"] * BETAS[1], g, g, value=1 - BETAS[1])
    correction1, correction2 = 1 - BETAS[0] ** step, 1 - BETAS[1] ** step
    denominator = second.sqrt() / math.sqrt(correction2) + EPS
    moved = p - rate / correction1 * first / denominator
    return moved, {"exp_avg": first, "exp_avg_sq": second}


def _muon(p: Tensor, g: Tensor, slots: Slots, rate: Tensor, step: int) -> tuple[Tensor, Slots]:
    if not _is_matrix(p):
        return _adam(p, g, slots, rate, step)
    buffer = slots["momentum_buffer"].lerp(g, 1 - _MUON_MOMENTUM)
    direction = _orthogonal(g.lerp(buffer, _MUON_MOMENTUM))
    factor = math.sqrt(max(1.0, p.shape[1] / p.shape[2]))
    return p - rate * factor * direction, {"momentum_buffer": buffer}


def _orthogonal(matrices: Tensor) -> Tensor:
    """(R, m, n): singular values moved towards 1 by Newton-Schulz steps.

    torch's Muon does this in bfloat16; here it is done in the gradient's own dtype.
    """
    a, b, c = _MUON_COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp(min=_MUON_EPS)[:, None, None]
    for _ in range(_MUON_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def _is_matrix(stacked: Tensor) -> bool:
    return stacked.dim() == 3


def _no_slots(p: Tensor) -> tuple[str, ...]:
    return ()


def _momentum_slots(p: Tensor) -> tuple[str, ...]:
    return ("momentum_buffer",)


def _adam_slots(p: Tensor) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq")


def _muon_slots(p: Tensor) -> tuple[str, ...]:
    return _momentum_slots(p) if _is_matrix(p) else _adam_slots(p)


def _torch_sgd(parameters: Sequence[nn.Parameter], rate: float) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(parameters, lr=rate)]


def _torch_momentum(parameters: Sequence[nn.Parameter], rate: float) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(parameters, lr=rate, momentum=MOMENTUM)]


def _torch_adam(parameters: Sequence[nn.Parameter], rate: float) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam(parameters, lr=rate, betas=BETAS, eps=EPS)]


def _torch_muon(parameters: Sequence[nn.Parameter], rate: float) -> list[torch.optim.Optimizer]:
    if not hasattr(torch.optim, "Muon"):
        raise ArgumentError(f"torch.optim of torch {torch.__version__} has no Muon.")
    matrices = [p for p in parameters if p.dim() == 2]
    others = [p for p in parameters if p.dim() != 2]
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, momentum=_MUON_MOMENTUM))
    return found + (_torch_adam(others, rate) if others else [])


OPTIMIZERS: dict[str, Rule] = {
    "sgd": Rule(_sgd, _no_slots, _torch_sgd),
    "momentum": Rule(_momentum, _momentum_slots, _torch_momentum),
    "adam": Rule(_adam, _adam_slots, _torch_adam),
    # Matrices by Muon, everything else by Adam at the same rate.
    "muon": Rule(_muon, _muon_slots, _torch_muon),
}
