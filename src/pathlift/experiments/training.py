"""Vectorised training: all runs of one architecture train at once.

The parameters of R networks are stacked along a new first axis and the forward pass is mapped over
it, so one step of all runs is one batched matrix product per layer. The runs do not interact: the
gradient of the sum of their losses is each run's own gradient.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

from pathlift.errors import ArgumentError
from pathlift.experiments.data import Data
from pathlift.experiments.optimizers import Rule, Slots, optimizer_named

Tensors = dict[str, Tensor]
_EVALUATE = 512  # test samples in one forward pass


@dataclass(frozen=True)
class Curves:
    """What the runs recorded, one entry per epoch. Infinite losses: the run has diverged.

    Attributes:
        loss: (runs, epochs), mean training loss over the epoch's batches.
        accuracy: (runs, epochs), the same for the share of correct answers; None where there are
            no classes. 0 once a run has diverged, as for the test set's.
        test_loss: (runs, epochs), after the epoch and in eval mode; None without a test set.
        test_accuracy: (runs, epochs), or None.
        conditioning_seconds: (runs, epochs), spent on conditioning before the epoch; None where
            nothing was conditioned.
    """

    loss: Tensor
    accuracy: Tensor | None = None
    test_loss: Tensor | None = None
    test_accuracy: Tensor | None = None
    conditioning_seconds: Tensor | None = None

    def epochs_to(self, target: float) -> Tensor:
        """(runs,) first epoch (from 1) with loss at most ``target``; infinite if never."""
        reached = self.loss <= target
        first = reached.to(torch.int64).argmax(1) + 1.0
        return torch.where(reached.any(1), first, torch.inf)


@dataclass(frozen=True)
class Recondition:
    """Condition a run again before the epochs ``every``, ``2 every``, ... (counted from 0).

    Attributes:
        every: number of epochs between two calls.
        condition: ``(model, optimizers) -> anything``; changes both in place.
    """

    every: int
    condition: Callable[[nn.Module, list[torch.optim.Optimizer]], object]

    def due(self, epoch: int) -> bool:
        """Whether to condition before this epoch."""
        return epoch > 0 and epoch % self.every == 0


def train(
    models: Sequence[nn.Module],
    seeds: Sequence[int],
    rates: Sequence[float],
    data: Data,
    *,
    epochs: int,
    batch: int = 128,
    optimizer: str = "sgd",
    test: Data | None = None,
    recondition: Sequence[Recondition | None] | None = None,
    vectorised: bool = True,
) -> Curves:
    """Train R networks of one architecture side by side.

    Args:
        models: R networks with equal parameter names and shapes; not changed.
        seeds: R seeds of the order of samples; equal seeds see equal batches (paired runs).
        rates: R learning rates.
        data: what to learn; the kind decides between cross entropy and mean squared error.
        epochs: passes over the data.
        batch: samples per step; an incomplete last batch is left out.
        optimizer: ``"sgd"``, ``"momentum"``, ``"adam"`` or ``"muon"``.
        test: held-out data, evaluated after every epoch.
        recondition: R schedules (or Nones) for conditioning during training.
        vectorised: False trains the runs one after the other inside each step; so does a network
            that ``vmap`` refuses.

    A run whose loss is no longer finite is frozen where it is, and dropped at the epoch's end.
    Random layers (dropout) draw from torch's global generator, differently for every run.

    Raises:
        ArgumentError: the lists' lengths or the networks' parameters differ, or a number is not
            positive.
    """
    rule = optimizer_named(optimizer)
    _check(models, seeds, rates, recondition, epochs, batch)
    runs = _Runs(models, rates, data, rule, vectorised)
    batches = _Batches(seeds, data, min(batch, len(data.inputs)))
    record = _Record(len(models), epochs, data, test)
    for epoch in range(epochs):
        if recondition is not None:
            record.conditioning[:, epoch] = runs.recondition_(recondition, epoch)
        loss, accuracy = runs.epoch_(batches)
        record.add(epoch, runs, loss, accuracy)
        runs.drop_diverged_()
        if runs.count == 0:
            break
    return record.curves(recondition is not None)


def _check(
    models: Sequence[nn.Module],
    seeds: Sequence[int],
    rates: Sequence[float],
    recondition: Sequence[Recondition | None] | None,
    epochs: int,
    batch: int,
) -> None:
    lengths = {len(models), len(seeds), len(rates), len(recondition or models)}
    if len(lengths) > 1 or not models:
        raise ArgumentError(
            f"models, seeds, rates and recondition must have one entry per run; found "
            f"{len(models)}, {len(seeds)}, {len(rates)} and "
            f"{'None' if recondition is None else len(recondition)}."
        )
    for name, value in (("epochs", epochs), ("batch", batch)):
        if value < 1:
            raise ArgumentError(f"{name} must be at least 1; found {value}.")


def _stack(entries: Sequence[dict[str, Tensor]]) -> Tensors:
    """One tensor (R, *shape) per name; copies."""
    shapes = [{n: t.shape for n, t in entry.items()} for entry in entries]
    for k, found in enumerate(shapes):
        if found != shapes[0]:
            odd = sorted(n for n in {**found, **shapes[0]} if found.get(n) != shapes[0].get(n))
            raise ArgumentError(
                f"the networks must share one architecture; number {k} differs from number 0 in "
                f"'{odd[0]}'."
            )
    return {n: torch.stack([entry[n].detach() for entry in entries]) for n in entries[0]}


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(R,) -> (R, 1, ...) with as many axes as ``like``."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


class _Runs:
    """The stacked networks, their optimisers' state, and which runs are still finite.

    Attributes:
        index: (count,) numbers of the runs that are left.
        alive: (count,) False where the loss has left the finite numbers in this epoch.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        rates: Sequence[float],
        data: Data,
        rule: Rule,
        vectorised: bool,
    ) -> None:
        named = [dict(m.named_parameters()) for m in models]
        learnt = {n for n, p in named[0].items() if p.requires_grad}
        self.parameters = _stack([{n: p for n, p in d.items() if n in learnt} for d in named])
        self.frozen = _stack([{n: p for n, p in d.items() if n not in learnt} for d in named])
        self.buffers = _stack([dict(m.named_buffers()) for m in models])
        self.slots: dict[str, Slots] = {
            n: {slot: torch.zeros_like(t) for slot in rule.slots(t)}
            for n, t in self.parameters.items()
        }
        self.skeleton = copy.deepcopy(models[0])
        self.rule, self.data, self.vectorised = rule, data, vectorised
        device = data.inputs.device
        self.rates = torch.tensor(rates, dtype=data.inputs.dtype, device=device)
        self.index = torch.arange(len(models), device=device)
        self.alive = torch.ones(len(models), dtype=torch.bool, device=device)
        self.steps = 0

    @property
    def count(self) -> int:
        return len(self.index)

    def epoch_(self, batches: _Batches) -> tuple[Tensor, Tensor]:
        """One pass over the data: mean loss and accuracy, each (count,)."""
        self.skeleton.train()
        loss = torch.zeros_like(self.rates)
        accuracy = torch.zeros_like(self.rates)
        steps = 0
        for x, y in batches.epoch(self.index):
            value, correct = self._step_(x, y)
            loss += value
            accuracy += correct
            steps += 1
        return loss / steps, accuracy / steps

    def _step_(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        leaves = {n: t.requires_grad_() for n, t in self.parameters.items()}
        with torch.enable_grad():
            out, buffers = self.forward(leaves, x, 0)
            value, correct = _score(self.data.kind, out, x, y)
            gradients = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
        value = value.detach()
        self.alive &= torch.isfinite(value)
        self.steps += 1
        whole = bool(self.alive.all())
        for (name, old), gradient in zip(leaves.items(), gradients, strict=True):
            if gradient is None:  # torch's optimisers skip these, too
                continue
            old = old.detach()
            rate = _column(self.rates, old)
            new, slots = self.rule.update(old, gradient, self.slots[name], rate, self.steps)
            self.parameters[name] = new if whole else self._where_alive(new, old)
            self.slots[name] = slots
        self.buffers = (
            buffers
            if whole
            else {n: self._where_alive(b, self.buffers[n]) for n, b in buffers.items()}
        )
        return value, correct

    def _where_alive(self, new: Tensor, old: Tensor) -> Tensor:
        return torch.where(_column(self.alive, old), new, old)

    def forward(self, parameters: Tensors, x: Tensor, dim: int | None) -> tuple[Tensor, Tensors]:
        """Outputs (count, batch, ...) and new buffers; ``dim`` None: all runs see the same x."""
        if self.vectorised:
            try:
                mapped = vmap(self._one, in_dims=(0, 0, 0, dim), randomness="different")
                return mapped(parameters, self.frozen, self.buffers, x)
            except RuntimeError:  # no batching rule, or forward looks at values: one by one
                self.vectorised = False
        found = []
        for k in range(self.count):
            single = [
                {n: t[k] for n, t in stack.items()}
                for stack in (parameters, self.frozen, self.buffers)
            ]
            found.append(self._one(single[0], single[1], single[2], x if dim is None else x[k]))
        buffers = {n: torch.stack([f[1][n] for f in found]) for n in self.buffers}
        return torch.stack([f[0] for f in found]), buffers

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
        for start in range(0, len(test.inputs), _EVALUATE):
            x = test.inputs[start : start + _EVALUATE]
            y = None if test.targets is None else test.targets[start : start + _EVALUATE]
            out, _ = self.forward(self.parameters, x, None)
            shared = x.expand(self.count, *x.shape)
            y = None if y is None else y.expand(self.count, -1)
            value, correct = _score(test.kind, out, shared, y)
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

    def recondition_(self, schedules: Sequence[Recondition | None], epoch: int) -> Tensor:
        """Condition the runs that are due; (all runs,) seconds each took."""
        seconds = torch.zeros(len(schedules), dtype=torch.float64)
        for place, run in enumerate(self.index.tolist()):
            schedule = schedules[run]
            if schedule is not None and schedule.due(epoch):
                start = time.perf_counter()
                self._recondition_one_(place, schedule)
                seconds[run] = time.perf_counter() - start
        return seconds

    @torch.no_grad()
    def _recondition_one_(self, place: int, schedule: Recondition) -> None:
        """Lift one run out of the stack with its optimiser's state, and put it back."""
        model = copy.deepcopy(self.skeleton).train()
        named = dict(model.named_parameters())
        stacks = {**self.parameters, **self.frozen, **self.buffers}
        for name, tensor in {**named, **dict(model.named_buffers())}.items():
            tensor.copy_(stacks[name][place])
        learnt = {n: named[n] for n in self.parameters}
        optimizers = self.rule.torch(list(learnt.values()), float(self.rates[place]))
        holder = {p: o for o in optimizers for g in o.param_groups for p in g["params"]}
        for name, parameter in learnt.items():
            state = {slot: t[place].clone() for slot, t in self.slots[name].items()}
            holder[parameter].state[parameter].update(state)
        with torch.enable_grad():
            schedule.condition(model, optimizers)
        self.parameters = {n: t.detach() for n, t in self.parameters.items()}
        for name, parameter in learnt.items():
            self.parameters[name][place] = parameter
            for slot, t in self.slots[name].items():
                t[place] = holder[parameter].state[parameter][slot]
        for name, tensor in model.named_buffers():
            self.buffers[name][place] = tensor


class _Batches:
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
            chosen = orders[:, start : start + self.size]
            targets = self.data.targets
            yield (
                self.data.inputs[chosen][which],
                None if targets is None else targets[chosen][which],
            )


def _score(kind: str, out: Tensor, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss and share of correct answers (0 without classes) of every run, each (R,)."""
    if kind == "reconstruction":
        loss = (out - x).square().flatten(1).mean(1)
        return loss, torch.zeros_like(loss, requires_grad=False)
    assert y is not None
    loss = cross_entropy(out.flatten(0, 1), y.flatten(), reduction="none")
    correct = (out.argmax(-1) == y).to(out.dtype).mean(1)
    return loss.reshape(y.shape).mean(1), correct


class _Record:
    """Curves under construction; entries a run never reaches stay infinite (accuracies 0)."""

    def __init__(self, runs: int, epochs: int, data: Data, test: Data | None) -> None:
        shape, dtype = (runs, epochs), data.inputs.dtype
        self.data, self.test = data, test
        self.loss = torch.full(shape, torch.inf, dtype=dtype)
        self.test_loss = self.loss.clone()
        self.accuracy = torch.zeros(shape, dtype=dtype)
        self.test_accuracy = self.accuracy.clone()
        self.conditioning = torch.zeros(shape, dtype=torch.float64)

    def add(self, epoch: int, runs: _Runs, loss: Tensor, accuracy: Tensor) -> None:
        rows, alive = runs.index.cpu(), runs.alive
        self.loss[rows, epoch] = torch.where(alive, loss, torch.inf).cpu()
        self.accuracy[rows, epoch] = torch.where(alive, accuracy, 0.0).cpu()
        if self.test is None:
            return
        loss, accuracy = runs.evaluate(self.test)
        alive = alive & torch.isfinite(loss)
        self.test_loss[rows, epoch] = torch.where(alive, loss, torch.inf).cpu()
        self.test_accuracy[rows, epoch] = torch.where(alive, accuracy, 0.0).cpu()

    def curves(self, conditioned: bool) -> Curves:
        classes = self.data.kind == "classification"
        tested = self.test is not None
        return Curves(
            loss=self.loss,
            accuracy=self.accuracy if classes else None,
            test_loss=self.test_loss if tested else None,
            test_accuracy=self.test_accuracy if tested and classes else None,
            conditioning_seconds=self.conditioning if conditioned else None,
        )


def train_autoencoders(
    models: Sequence[nn.Module],
    seeds: Sequence[int],
    rates: Sequence[float],
    data: Tensor,
    *,
    epochs: int,
    batch: int = 128,
) -> Curves:
    """Plain SGD on the mean squared reconstruction error of ``data`` (N, features).

    See :func:`train`.
    """
    return train(models, seeds, rates, Data("given", data, None), epochs=epochs, batch=batch)


def epoch_seconds(
    model: nn.Module,
    data: Data,
    *,
    rate: float,
    batch: int = 128,
    optimizer: str = "sgd",
    steps: int = 5,
) -> float:
    """Seconds of one epoch of one run that trains alone with ``torch.optim``.

    The median of a few steps times the steps of an epoch: what a user of one network pays, which a
    step of the stacked runs does not show. The model is not changed.
    """
    twin = copy.deepcopy(model).train()
    optimizers = optimizer_named(optimizer).torch(list(twin.parameters()), rate)
    batch = min(batch, len(data.inputs))
    x = data.inputs[None, :batch]
    y = None if data.targets is None else data.targets[None, :batch]
    times = []
    for _ in range(steps + 1):  # the first one warms up
        start = time.perf_counter()
        twin.zero_grad()
        loss, _ = _score(data.kind, twin(x[0])[None], x, y)
        loss.sum().backward()
        for each in optimizers:
            each.step()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[steps // 2] * (len(data.inputs) // batch)
