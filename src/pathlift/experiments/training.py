"""Vectorised training: all runs of one architecture train at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap


@dataclass(frozen=True)
class Curves:
    """Training losses.

    Attributes:
        loss: (runs, epochs), mean over the epoch's batches; infinite once a run has diverged.
    """

    loss: Tensor

    def epochs_to(self, target: float) -> Tensor:
        """(runs,) first epoch (from 1) with loss at most ``target``; infinite if never."""
        reached = self.loss <= target
        first = reached.to(torch.int64).argmax(1) + 1.0
        return torch.where(reached.any(1), first, torch.inf)


def train_autoencoders(
    models: Sequence[nn.Module],
    seeds: Sequence[int],
    rates: Sequence[float],
    data: Tensor,
    *,
    epochs: int,
    batch: int = 128,
) -> Curves:
    """Plain SGD on the mean squared reconstruction error, one run per model.

    Args:
        models: R networks of one architecture; not changed.
        seeds: R seeds of the order of samples; equal seeds see equal batches (paired runs).
        rates: R learning rates.
        data: (N, features).

    The parameters are stacked and the gradient is mapped over the runs. A run whose loss is no
    longer finite is frozen.
    """
    stacked = {
        name: torch.stack([dict(m.named_parameters())[name].detach() for m in models])
        for name, _ in models[0].named_parameters()
    }
    skeleton = models[0]

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return (functional_call(skeleton, parameters, (x,)) - x).square().mean()

    step = vmap(grad_and_value(loss))
    rate = torch.tensor(rates, dtype=data.dtype)
    distinct = sorted(set(seeds))
    which = torch.tensor([distinct.index(s) for s in seeds])
    generators = [torch.Generator().manual_seed(s) for s in distinct]
    alive = torch.ones(len(models), dtype=torch.bool)
    history = []
    for _ in range(epochs):
        orders = torch.stack([torch.randperm(len(data), generator=g) for g in generators])
        total = torch.zeros(len(models), dtype=data.dtype)
        steps = 0
        for start in range(0, len(data) - batch + 1, batch):
            x = data[orders[:, start : start + batch]][which]
            gradients, value = step(stacked, x)
            alive &= torch.isfinite(value)
            move = torch.where(alive, rate, 0.0)
            for name, tensor in stacked.items():
                shape = (-1,) + (1,) * (tensor.dim() - 1)
                tensor -= move.reshape(shape) * gradients[name].nan_to_num(0.0, 0.0, 0.0)
            total += value
            steps += 1
        history.append(torch.where(alive, total / steps, torch.inf))
    return Curves(torch.stack(history, 1))
