"""One network that trains alone, as everybody writes it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pathlift.experiments.data import Data
from pathlift.experiments.optimizers import Rule
from pathlift.experiments.runs import Batches, Bench, Recondition, Runs, in_order, score


class Alone(Runs):
    """One network with its ``torch.optim`` optimisers: the loop everybody writes."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        rates: Sequence[float],
        schedules: Sequence[Recondition | None],
        data: Data,
        rule: Rule,
    ) -> None:
        super().__init__(1, data)
        self.model = copy.deepcopy(models[0]).to(data.inputs.device).train()
        self.optimizers = rule.torch(self.model, float(rates[0]), data.inputs[:2])
        self.bench = Bench(self.model, self.optimizers, data)
        self.schedule = schedules[0]

    def epoch_(self, epoch: int, batches: Batches) -> tuple[Tensor, Tensor]:
        """One pass over the data: mean loss and accuracy, each (1,)."""
        self.seconds = torch.zeros(1, dtype=torch.float64)
        self._recondition_("epoch", epoch)
        self.model.train()
        loss = accuracy = torch.zeros((), dtype=self.data.dtype, device=self.index.device)
        steps = 0
        for xs, ys in batches.epoch(self.index):
            self._recondition_("step", self.steps)
            value, correct = self.step_(xs[0], None if ys is None else ys[0])
            # No look at the value, for which a GPU would have to be waited for in every step.
            self.alive &= torch.isfinite(value)
            loss, accuracy, steps = loss + value, accuracy + correct, steps + 1
        return (loss / steps)[None], (accuracy / steps)[None]

    def step_(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """One step; its loss and its share of correct answers."""
        self.model.zero_grad()
        value, correct = score(self.data.kind, self.model(x), x, y)
        value.backward()
        for each in self.optimizers:
            each.step()
        self.steps += 1
        return value.detach(), correct

    def _recondition_(self, unit: str, count: int) -> None:
        if self.schedule is not None and self.schedule.due(unit, count):
            self.seconds[0] += self.bench.condition_(self.schedule)

    @torch.no_grad()
    def evaluate(self, test: Data) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy on the test set in eval mode, each (1,)."""
        self.model.eval()
        loss = accuracy = torch.zeros((), device=self.index.device)
        for x, y in in_order(test):
            value, correct = score(test.kind, self.model(x), x, y)
            loss, accuracy = loss + value * len(x), accuracy + correct * len(x)
        return (loss / len(test.inputs))[None], (accuracy / len(test.inputs))[None]

    def drop_diverged_(self) -> None:
        """No run is left if this one has diverged."""
        self.index, self.alive = self.index[self.alive], self.alive[self.alive]
