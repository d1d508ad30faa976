"""Vectorised training: all runs of one architecture train at once.

The parameters of R networks are stacked along a new first axis and the forward pass is mapped over
it, so one step of all runs is one batched matrix product per layer. The runs do not interact: the
gradient of the sum of their losses is each run's own gradient. Networks so large that their matrix
products keep the machine busy train one at a time, with ``torch.optim``, through the same function.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy, log_softmax

from pathlift.conditioner import Conditioner
from pathlift.errors import ArgumentError, RangeError
from pathlift.experiments.data import Data
from pathlift.experiments.optimizers import Rule, Slots, optimizer_named

Tensors = dict[str, Tensor]
_EVALUATE = 512  # test samples in one forward pass
# Above so many parameters a step on a CPU is arithmetic, and stacking gains nothing.
STACK_PARAMETERS = 100_000
# Runs of one stack: few enough for a step's activations to stay in the cache.
STACK_RUNS = 128


@dataclass(frozen=True)
class Curves:
    """What the runs recorded, one entry per epoch. Infinite losses: the run has diverged.

    Attributes:
        loss: (runs, epochs), mean training loss over the epoch's batches.
        accuracy: (runs, epochs), the same for the share of correct answers; None where there are
            no classes. 0 once a run has diverged, as for the test set's.
        test_loss: (runs, epochs), after the epoch and in eval mode; None without a test set.
        test_accuracy: (runs, epochs), or None.
        conditioning_seconds: (runs, epochs), spent on conditioning during the epoch; None where
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
    vectorised: bool | None = None,
) -> Curves:
    """Train R networks of one architecture side by side.

    Args:
        models: R networks with equal parameter names and shapes; not changed.
        seeds: R seeds of the order of samples; equal seeds see equal batches (paired runs).
        rates: R learning rates.
        data: what to learn; the kind decides between cross entropy and mean squared error. Runs
            train on the device of its tensors.
        epochs: passes over the data.
        batch: samples per step; an incomplete last batch is left out.
        optimizer: ``"sgd"``, ``"momentum"``, ``"adam"``, ``"muon"``, or ``"path-sgd"``, which
            trains one run at a time and takes its rate in units of the mean of g at the start.
        test: held-out data, evaluated after every epoch.
        recondition: R schedules (or Nones) for conditioning during training.
        vectorised: True stacks the runs, False trains one at a time with ``torch.optim``. None
            stacks small networks that ``vmap`` can map over, see :func:`stacks`.

    A run whose loss is no longer finite is dropped at the epoch's end. Random layers (dropout)
    draw from torch's global generator, differently for every run.

    Raises:
        ArgumentError: the lists' lengths or the networks' parameters differ, a number is not
            positive, or ``vectorised=True`` with an optimiser that can't be stacked.
    """
    rule = optimizer_named(optimizer)
    _check(models, seeds, rates, recondition, epochs, batch)
    if vectorised and rule.update is None:
        raise ArgumentError(
            f"{optimizer!r} trains one run at a time; use vectorised=False or None."
        )
    if vectorised is None:
        vectorised = rule.update is not None and stacks(models[0], data)
    schedules = recondition or [None] * len(models)
    batch = min(batch, len(data.inputs))
    record = _Record(len(models), epochs, data, test)
    record.conditioned = recondition is not None
    size = STACK_RUNS if vectorised else 1
    for first in range(0, len(models), size):
        part = slice(first, first + size)
        runs = (_Stack if vectorised else _Alone)(
            models[part], rates[part], schedules[part], data, rule
        )
        batches = _Batches(seeds[part], data, batch)
        for epoch in range(epochs):
            record.add(first, epoch, runs, *runs.epoch_(epoch, batches))
            runs.drop_diverged_()
            if not runs.count:
                break
    return record.curves()


def stacks(model: nn.Module, data: Data) -> bool:
    """Whether runs of this network gain from being stacked, and can be.

    On a CPU: at most :data:`STACK_PARAMETERS` parameters and no convolution (its batched form is
    a grouped convolution, which is slower than one after the other); anywhere: ``vmap`` has a rule
    for every operation, and forward does not look at values.
    """
    on_cpu = data.inputs.device.type == "cpu"
    if on_cpu and sum(p.numel() for p in model.parameters()) > STACK_PARAMETERS:
        return False
    if on_cpu and any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules()):
        return False
    runs = _Stack([model], [0.0], [None], data, optimizer_named("sgd"))
    try:
        with torch.random.fork_rng(devices=[]):
            runs.forward(runs.parameters, data.inputs[None, :2], 0)
    except RuntimeError:
        return False
    return True


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
    shapes = [{n: p.shape for n, p in model.state_dict().items()} for model in models]
    for k, found in enumerate(shapes):
        if found != shapes[0]:
            odd = sorted(n for n in {**found, **shapes[0]} if found.get(n) != shapes[0].get(n))
            raise ArgumentError(
                f"the networks must share one architecture; number {k} differs from number 0 in "
                f"'{odd[0]}'."
            )


def _stack(entries: Sequence[dict[str, Tensor]], device: torch.device) -> Tensors:
    """One tensor (R, *shape) per name; copies."""
    return {n: torch.stack([entry[n].detach() for entry in entries]).to(device) for n in entries[0]}


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(R,) -> (R, 1, ...) with as many axes as ``like``."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


class _Bench:
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


class _Runs:
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
        self.index = torch.arange(count, device=device)
        self.alive = torch.ones(count, dtype=torch.bool, device=device)
        self.seconds = torch.zeros(count, dtype=torch.float64)
        self.steps = 0

    @property
    def count(self) -> int:
        return len(self.index)


class _Stack(_Runs):
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
        self._bench: _Bench | None = None

    def epoch_(self, epoch: int, batches: _Batches) -> tuple[Tensor, Tensor]:
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
            value, correct = _scores(self.data.kind, out, x, y)
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
        for x, y in _in_order(test):
            out, _ = self.forward(self.parameters, x, None)
            y = None if y is None else y.expand(self.count, *y.shape)
            value, correct = _scores(test.kind, out, x.expand(self.count, *x.shape), y)
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
        for place, run in enumerate(self.index.tolist()):
            schedule = self.schedules[run]
            if schedule is not None and schedule.due(unit, count) and bool(self.alive[place]):
                self.seconds[place] += self._recondition_one_(place, schedule)

    @torch.no_grad()
    def _recondition_one_(self, place: int, schedule: Recondition) -> float:
        """Lift one run out of the stack with its optimiser's state, and put it back."""
        if self._bench is None:
            model = copy.deepcopy(self.skeleton).train()
            self._bench = _Bench(
                model, self.rule.torch(model, 1.0, self.data.inputs[:2]), self.data
            )
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


class _Alone(_Runs):
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
        self.bench = _Bench(self.model, self.optimizers, data)
        self.schedule = schedules[0]

    def epoch_(self, epoch: int, batches: _Batches) -> tuple[Tensor, Tensor]:
        """One pass over the data: mean loss and accuracy, each (1,)."""
        self.seconds = torch.zeros(1, dtype=torch.float64)
        self._recondition_("epoch", epoch)
        self.model.train()
        loss = accuracy = torch.zeros((), dtype=self.data.dtype, device=self.index.device)
        steps = 0
        for xs, ys in batches.epoch(self.index):
            self._recondition_("step", self.steps)
            value, correct = self.step_(xs[0], None if ys is None else ys[0])
            if not math.isfinite(value.item()):
                self.alive = torch.zeros_like(self.alive)
                break
            loss, accuracy, steps = loss + value, accuracy + correct, steps + 1
        return (loss / max(steps, 1))[None], (accuracy / max(steps, 1))[None]

    def step_(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """One step; its loss and its share of correct answers."""
        self.model.zero_grad()
        value, correct = _score(self.data.kind, self.model(x), x, y)
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
        for x, y in _in_order(test):
            value, correct = _score(test.kind, self.model(x), x, y)
            loss, accuracy = loss + value * len(x), accuracy + correct * len(x)
        return (loss / len(test.inputs))[None], (accuracy / len(test.inputs))[None]

    def drop_diverged_(self) -> None:
        """No run is left if this one has diverged."""
        self.index, self.alive = self.index[self.alive], self.alive[self.alive]


def _in_order(data: Data) -> Iterator[tuple[Tensor, Tensor | None]]:
    targets = data.targets
    for start in range(0, len(data.inputs), _EVALUATE):
        part = slice(start, start + _EVALUATE)
        yield data.inputs[part], None if targets is None else targets[part]


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
            chosen = orders[:, start : start + self.size][which]
            targets = self.data.targets
            yield self.data.inputs[chosen], None if targets is None else targets[chosen]


def _scores(kind: str, out: Tensor, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss and share of correct answers (0 without classes) of every run, each (R,)."""
    if kind == "reconstruction":
        loss = (out - x).square().flatten(1).mean(1)
        return loss, torch.zeros_like(loss, requires_grad=False)
    assert y is not None
    # Classes in the middle: a softmax over ten neighbours in memory is several times slower.
    logs = log_softmax(out.movedim(2, 1).contiguous(), dim=1)
    loss = -logs.gather(1, y[:, None]).flatten(1).mean(1)
    return loss, (out.detach().argmax(2) == y).to(out.dtype).flatten(1).mean(1)


def _score(kind: str, out: Tensor, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same for one run."""
    if kind == "reconstruction":
        return (out - x).square().mean(), torch.zeros((), dtype=out.dtype, device=out.device)
    assert y is not None
    return cross_entropy(out, y), (out.detach().argmax(1) == y).to(out.dtype).mean()


class _Record:
    """Curves under construction; entries a run never reaches stay infinite (accuracies 0)."""

    def __init__(self, runs: int, epochs: int, data: Data, test: Data | None) -> None:
        shape, dtype = (runs, epochs), data.dtype
        self.data, self.test = data, test
        self.loss = torch.full(shape, torch.inf, dtype=dtype)
        self.test_loss = self.loss.clone()
        self.accuracy = torch.zeros(shape, dtype=dtype)
        self.test_accuracy = self.accuracy.clone()
        self.conditioning = torch.zeros(shape, dtype=torch.float64)
        self.conditioned = False

    def add(
        self, first: int, epoch: int, runs: _Stack | _Alone, loss: Tensor, accuracy: Tensor
    ) -> None:
        rows, alive = first + runs.index.cpu(), runs.alive
        self.conditioning[rows, epoch] = runs.seconds
        self.loss[rows, epoch] = torch.where(alive, loss, torch.inf).cpu()
        self.accuracy[rows, epoch] = torch.where(alive, accuracy, 0.0).cpu()
        if self.test is None:
            return
        loss, accuracy = runs.evaluate(self.test)
        alive = alive & torch.isfinite(loss)
        self.test_loss[rows, epoch] = torch.where(alive, loss, torch.inf).cpu()
        self.test_accuracy[rows, epoch] = torch.where(alive, accuracy, 0.0).cpu()

    def curves(self) -> Curves:
        classes = self.data.kind == "classification"
        tested = self.test is not None
        return Curves(
            loss=self.loss,
            accuracy=self.accuracy if classes else None,
            test_loss=self.test_loss if tested else None,
            test_accuracy=self.test_accuracy if tested and classes else None,
            conditioning_seconds=self.conditioning if self.conditioned else None,
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

    The quickest of a few steps (other load on the machine only adds) times the steps of an epoch:
    what a user of one network pays, which a step of the stacked runs does not show. The model is
    not changed.
    """
    run = _Alone([model], [rate], [None], data, optimizer_named(optimizer))
    batch = min(batch, len(data.inputs))
    x = data.inputs[:batch]
    y = None if data.targets is None else data.targets[:batch]
    times = []
    for _ in range(steps + 1):  # the first one warms up
        start = time.perf_counter()
        run.step_(x, y)[0].item()
        times.append(time.perf_counter() - start)
    return min(times[1:]) * (len(data.inputs) // batch)
