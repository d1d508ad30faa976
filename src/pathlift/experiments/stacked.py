"""Networks that train stacked: their parameters along a new first axis, the forward pass mapped."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from pathlift.experiments.data import Data
from pathlift.experiments.optimizers import Rule, Slots
from pathlift.experiments.runs import Batches, Bench, Recondition, Runs, in_order, scores

Tensors = dict[str, Tensor]


def _stack(entries: Sequence[dict[str, Tensor]], device: torch.device) -> Tensors:
    """One tensor (R, *shape) per name; copies."""
    return {n: torch.stack([entry[n].detach() for entry in entries]).to(device) for n in entries[0]}


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(R,) -> (R, 1, ...) with as many axes as ``like``."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


class Stack(Runs):
    """Stacked networks and their optimisers' state."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        rates: Sequence[float],
        schedules: Sequence[Recondition | None],
        data: Data,
        rule: Rule,
    ) -> None:
        super().__init__(len(models), data)
        device = data.inputs.device
        named = [dict(m.named_parameters()) for m in models]
        learnt = {n for n, p in named[0].items() if p.requires_grad}
        self.parameters = _stack(
            [{n: p for n, p in d.items() if n in learnt} for d in named], device
        )
        self.frozen = _stack(
            [{n: p for n, p in d.items() if n not in learnt} for d in named], device
        )
        self.buffers = _stack([dict(m.named_buffers()) for m in models], device)
        self.slots: dict[str, Slots] = {
            n: {slot: torch.zeros_like(t) for slot in rule.slots(t)}
            for n, t in self.parameters.items()
        }
        self.skeleton = copy.deepcopy(models[0]).to(device).train()
        self.rule, self.schedules = rule, schedules
        self.rates = torch.tensor(rates, dtype=data.dtype, device=device)
        self._bench: Bench | None = None

    def epoch_(self, epoch: int, batches: Batches) -> tuple[Tensor, Tensor]:
        """One pass over the data: mean loss and accuracy, each (count,)."""
        self.seconds = torch.zeros(self.count, dtype=torch.float64)
        self._recondition_("epoch", epoch)
        self.skeleton.train()
        loss, accuracy = torch.zeros_like(self.rates), torch.zeros_like(self.rates)
        steps = 0
        for x, y in batches.epoch(self.index):
            self._recondition_("step", self.steps)
            value, correct = self._step_(x, y)
            loss += value
            accuracy += correct
            steps += 1
        return loss / steps, accuracy / steps

    def _step_(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self.rule.update is not None
        leaves = {n: t.requires_grad_() for n, t in self.parameters.items()}
        with torch.enable_grad():
            out, self.buffers = self.forward(leaves, x, 0)
            value, correct = scores(self.data.kind, out, x, y)
            gradients = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
        value = value.detach()
        self.buffers = {n: b.detach() for n, b in self.buffers.items()}
        # A run that has diverged goes on with NaNs, which touch nobody, to the epoch's end.
        self.alive &= torch.isfinite(value)
        self.steps += 1
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            self.parameters[name] = parameter = leaf.detach()
            if gradient is not None:  # torch's optimisers skip None, too
                rate = _column(self.rates, parameter)
                self.rule.update(parameter, gradient, self.slots[name], rate, self.steps)
        return value, correct

    def forward(self, parameters: Tensors, x: Tensor, dim: int | None) -> tuple[Tensor, Tensors]:
        """Outputs (count, batch, ...) and new buffers; ``dim`` None: all runs see the same x."""
        mapped = vmap(self._one, in_dims=(0, 0, 0, dim), randomness="different")
        return mapped(parameters, self.frozen, self.buffers, x)

    def _one(
        self, parameters: Tensors, frozen: Tensors, buffers: Tensors, x: Tensor
    ) -> tuple[Tensor, Tensors]:
        # Batch norm updates its statistics in place: in copies, handed back.
        buffers = {n: b.clone() for n, b in buffers.items()}
        out = functional_call(self.skeleton, (parameters, frozen, buffers), (x,))
        return out, buffers

    @torch.no_grad()
    def evaluate(self, test: Data) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy on the test set in eval mode, each (count,)."""
        self.skeleton.eval()
        loss, accuracy = torch.zeros_like(self.rates), torch.zeros_like(self.rates)
        for x, y in in_order(test):
            out, _ = self.forward(self.parameters, x, None)
            y = None if y is None else y.expand(self.count, *y.shape)
            value, correct = scores(test.kind, out, x.expand(self.count, *x.shape), y)
            loss += value * len(x)
            accuracy += correct * len(x)
        return loss / len(test.inputs), accuracy / len(test.inputs)

    def drop_diverged_(self) -> None:
        """Go on with the finite runs alone."""
        if bool(self.alive.all()):
            return
        kept = self.alive
        self.parameters = {n: t.detach()[kept] for n, t in self.parameters.items()}
        self.frozen = {n: t[kept] for n, t in self.frozen.items()}
        self.buffers = {n: t[kept] for n, t in self.buffers.items()}
        self.slots = {
            n: {slot: t[kept] for slot, t in slots.items()} for n, slots in self.slots.items()
        }
        self.rates, self.index, self.alive = self.rates[kept], self.index[kept], kept[kept]

    def _recondition_(self, unit: str, count: int) -> None:
        if not any(self.schedules):  # asking for the runs that are left waits for a GPU
            return
        for place, run in enumerate(self.index.tolist()):
            schedule = self.schedules[run]
            if schedule is not None and schedule.due(unit, count) and bool(self.alive[place]):
                self.seconds[place] += self._recondition_one_(place, schedule)

    @torch.no_grad()
    def _recondition_one_(self, place: int, schedule: Recondition) -> float:
        """Lift one run out of the stack with its optimiser's state, and put it back."""
        if self._bench is None:
            model = copy.deepcopy(self.skeleton).train()
            self._bench = Bench(model, self.rule.torch(model, 1.0, self.data.inputs[:2]), self.data)
        bench = self._bench
        named = dict(bench.model.named_parameters())
        tensors = {**named, **dict(bench.model.named_buffers())}
        stacks = {**self.parameters, **self.frozen, **self.buffers}
        for name, tensor in tensors.items():
            tensor.copy_(stacks[name][place])
        holder = {p: o for o in bench.optimizers for g in o.param_groups for p in g["params"]}
        for name in self.parameters:
            parameter = named[name]
            # Without a step the state is empty, as torch's; with one it is dense and counted.
            state = {slot: t[place].clone() for slot, t in self.slots[name].items()}
            if "exp_avg" in state:
                state["step"] = torch.tensor(float(self.steps))
            holder[parameter].state[parameter] = state
        with torch.enable_grad():
            seconds = bench.condition_(schedule)
        self.parameters = {n: t.detach() for n, t in self.parameters.items()}
        for name in self.parameters:
            self.parameters[name][place] = named[name]
            for slot, t in self.slots[name].items():
                t[place] = holder[named[name]].state[named[name]][slot]
        for name in self.frozen:
            self.frozen[name][place] = named[name]
        for name in self.buffers:
            self.buffers[name][place] = tensors[name]
        return seconds
