"""Optimisers as functions on stacked parameters: R runs, each with its own learning rate.

Every rule changes one parameter with a leading axis of runs, in place, and does to each slice what
its namesake in ``torch.optim`` does to one run's parameter (the tests compare them). The slots
carry torch's names, so that a run's state can be handed to a torch optimiser and taken back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pathlift.errors import ArgumentError, unknown
from pathlift.lifting.metrics import path_kernel_diagonal
from pathlift.training.path_sgd import PathSGD

Slots = dict[str, Tensor]
Update = Callable[[Tensor, Tensor, Slots, Tensor, int], None]
MOMENTUM = 0.9
BETAS = (0.9, 0.999)
EPS = 1e-8
WEIGHT_DECAY = 0.01  # of AdamW, as in torch
_MUON_MOMENTUM = 0.95
_MUON_COEFFICIENTS = (3.4445, -4.775, 2.0315)
_MUON_STEPS = 5
_MUON_EPS = 1e-7


@dataclass(frozen=True)
class Rule:
    """An optimiser.

    Attributes:
        torch: ``(model, rate, example inputs) -> optimisers`` for one run that trains alone; a
            list, since some rules need two.
        update: ``(parameter, gradient, slots, rate, step)``; the tensors are (R, *shape), the
            rate is (R, 1, ...) and step counts from 1; parameter and slots change in place. None:
            the rule trains runs one at a time only.
        slots: names of the state of a stacked parameter, all zero at first.
    """

    torch: Callable[[nn.Module, float, Tensor], list[torch.optim.Optimizer]]
    update: Update | None
    slots: Callable[[Tensor], tuple[str, ...]]


def optimizer_named(name: str) -> Rule:
    """The rule of a name.

    Raises:
        ArgumentError: an unknown name; the message lists the known ones.
    """
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    return OPTIMIZERS[name]


def _sgd(p: Tensor, g: Tensor, slots: Slots, rate: Tensor, step: int) -> None:
    p.addcmul_(rate, g, value=-1)


def _momentum(p: Tensor, g: Tensor, slots: Slots, rate: Tensor, step: int) -> None:
    buffer = slots["momentum_buffer"].mul_(MOMENTUM).add_(g)
    p.addcmul_(rate, buffer, value=-1)


def _adam(p: Tensor, g: Tensor, slots: Slots, rate: Tensor, step: int) -> None:
    first = slots["exp_avg"].lerp_(g, 1 - BETAS[0])
    second = slots["exp_avg_sq"].mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
    correction1, correction2 = 1 - BETAS[0] ** step, 1 - BETAS[1] ** step
    denominator = second.sqrt().div_(math.sqrt(correction2)).add_(EPS)
    p.addcmul_(rate, first / denominator, value=-1 / correction1)


def _adamw(p: Tensor, g: Tensor, slots: Slots, rate: Tensor, step: int) -> None:
    p.mul_(1 - rate * WEIGHT_DECAY)
    _adam(p, g, slots, rate, step)


def _muon(p: Tensor, g: Tensor, slots: Slots, rate: Tensor, step: int) -> None:
    if not _is_matrix(p):
        _adam(p, g, slots, rate, step)
        return
    buffer = slots["momentum_buffer"].lerp_(g, 1 - _MUON_MOMENTUM)
    direction = _orthogonal(g.lerp(buffer, _MUON_MOMENTUM))
    factor = math.sqrt(max(1.0, p.shape[1] / p.shape[2]))
    p.addcmul_(rate, direction, value=-factor)


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


def _learnt(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _torch_sgd(model: nn.Module, rate: float, example: Tensor) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(_learnt(model), lr=rate)]


def _torch_momentum(model: nn.Module, rate: float, example: Tensor) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(_learnt(model), lr=rate, momentum=MOMENTUM)]


def _adam_of(parameters: Sequence[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=rate, betas=BETAS, eps=EPS)


def _torch_adam(model: nn.Module, rate: float, example: Tensor) -> list[torch.optim.Optimizer]:
    return [_adam_of(_learnt(model), rate)]


def _torch_adamw(model: nn.Module, rate: float, example: Tensor) -> list[torch.optim.Optimizer]:
    learnt = _learnt(model)
    return [torch.optim.AdamW(learnt, rate, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)]


def _torch_muon(model: nn.Module, rate: float, example: Tensor) -> list[torch.optim.Optimizer]:
    muon: Any = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise ArgumentError(
            f"torch.optim of torch {torch.__version__} has no Muon. Use torch 2.9 or newer, or "
            f"train the runs stacked."
        )
    matrices = [p for p in _learnt(model) if p.dim() == 2]
    others = [p for p in _learnt(model) if p.dim() != 2]
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(muon(matrices, lr=rate, weight_decay=0.0, momentum=_MUON_MOMENTUM))
    return found + ([_adam_of(others, rate)] if others else [])


def _torch_path_sgd(model: nn.Module, rate: float, example: Tensor) -> list[torch.optim.Optimizer]:
    # In units of the mean g at the start, so that rates mean about the same as for SGD.
    g = torch.cat([v.flatten() for v in path_kernel_diagonal(model, example).values()])
    return [PathSGD(model, example, lr=rate * float(g.mean()), eps=PATH_SGD_EPS)]


# Relative to the mean of g: entries that few or weak paths pass would take steps without bound.
PATH_SGD_EPS = 1e-2

OPTIMIZERS: dict[str, Rule] = {
    "sgd": Rule(_torch_sgd, _sgd, _no_slots),
    "momentum": Rule(_torch_momentum, _momentum, _momentum_slots),
    "adam": Rule(_torch_adam, _adam, _adam_slots),
    "adamw": Rule(_torch_adamw, _adamw, _adam_slots),
    # Matrices by Muon, everything else by Adam at the same rate.
    "muon": Rule(_torch_muon, _muon, _muon_slots),
    "path-sgd": Rule(_torch_path_sgd, None, _no_slots),
}
