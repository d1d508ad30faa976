"""What runs need that train: their batches in order, their scores, their conditioning."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from pathlift.conditioner import Conditioner
from pathlift.errors import RangeError
from pathlift.experiments.data import Data

_EVALUATE = 512  # test samples in one forward pass


@dataclass(frozen=True)
class Recondition:
    """Condition a run again before the epochs (or steps) ``every``, ``2 every``, ... from 0.

    Attributes:
        every: number of epochs or steps between two calls.
        unit: ``"epoch"`` or ``"step"``.
        keywords: of :meth:`pathlift.Conditioner.condition_`; the optimiser's state is carried
            along in any case.
    """

    every: int
    unit: str = "epoch"
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def due(self, unit: str, count: int) -> bool:
        """Whether to condition before epoch or step number ``count``."""
        return unit == self.unit and count > 0 and count % self.every == 0


class Bench:
    """One network with its optimisers, to condition again and again at the cost of the solve."""

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], data: Data):
        self.model, self.optimizers = model, optimizers
        self.example = data.inputs[:2]
        self.conditioners: dict[str, Conditioner] = {}

    def condition_(self, schedule: Recondition) -> float:
        """Seconds it took; a network that has left the finite numbers is let be."""
        start = time.perf_counter()
        if all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            keywords = {"verify": False, "optimizer": self.optimizers, **schedule.keywords}
            batch_norm = keywords.pop("batch_norm", "pinned")
            if batch_norm not in self.conditioners:
                self.conditioners[batch_norm] = Conditioner(
                    self.model, self.example, batch_norm=batch_norm
                )
            with suppress(RangeError):  # about to diverge
                self.conditioners[batch_norm].condition_(**keywords)
        return time.perf_counter() - start


class Runs:
    """What stacked runs and a run alone have in common.

    Attributes:
        data: what they learn.
        index: (count,) numbers of the runs that are left.
        alive: (count,) False where the loss has left the finite numbers in this epoch.
        seconds: (count,) spent on conditioning in this epoch.
        steps: taken so far.
    """

    def __init__(self, count: int, data: Data) -> None:
        device = data.inputs.device
        self.data = data
        self.device = device
        self.index = torch.arange(count, device=device)
        self.alive = torch.ones(count, dtype=torch.bool, device=device)
        self.seconds = torch.zeros(count, dtype=torch.float64)
        self.steps = 0

    @property
    def count(self) -> int:
        return len(self.index)


def in_order(data: Data) -> Iterator[tuple[Tensor, Tensor | None]]:
    targets = data.targets
    for start in range(0, len(data.inputs), _EVALUATE):
        part = slice(start, start + _EVALUATE)
        yield data.inputs[part], None if targets is None else targets[part]


class Batches:
    """Every seed's order of samples, epoch after epoch."""

    def __init__(self, seeds: Sequence[int], data: Data, size: int) -> None:
        distinct = sorted(set(seeds))
        self.data, self.size = data, size
        self.which = torch.tensor([distinct.index(s) for s in seeds], device=data.inputs.device)
        self.generators = [torch.Generator().manual_seed(s) for s in distinct]

    def epoch(self, index: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches (runs in ``index``, size, ...), with targets where there are any."""
        count = len(self.data.inputs)
        orders = torch.stack([torch.randperm(count, generator=g) for g in self.generators])
        orders = orders.to(index.device)
        which = self.which[index]
        for start in range(0, count - self.size + 1, self.size):
            chosen = orders[:, start : start + self.size][which]
            targets = self.data.targets
            yield self.data.inputs[chosen], None if targets is None else targets[chosen]


def _squares(out: Tensor, x: Tensor, y: Tensor | None) -> Tensor:
    """Squared errors, of the inputs' reconstruction where there are no targets."""
    return (out - (x if y is None else y)).square()


def scores(kind: str, out: Tensor, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss and share of correct answers (0 without classes) of every run, each (R,)."""
    if kind != "classification":
        loss = _squares(out, x, y).flatten(1).mean(1)
        return loss, torch.zeros_like(loss, requires_grad=False)
    assert y is not None
    # Classes in the middle: a softmax over ten neighbours in memory is several times slower.
    logs = log_softmax(out.movedim(2, 1).contiguous(), dim=1)
    loss = -logs.gather(1, y[:, None]).flatten(1).mean(1)
    return loss, (out.detach().argmax(2) == y).to(out.dtype).flatten(1).mean(1)


def score(kind: str, out: Tensor, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same for one run."""
    if kind != "classification":
        none = torch.zeros((), dtype=out.dtype, device=out.device)
        return _squares(out, x, y).mean(), none
    assert y is not None
    return cross_entropy(out, y), (out.detach().argmax(1) == y).to(out.dtype).mean()
