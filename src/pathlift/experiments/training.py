"""Vectorised training: all runs of one architecture train at once.

The parameters of R networks are stacked along a new first axis and the forward pass is mapped over
it, so one step of all runs is one batched matrix product per layer. The runs do not interact: the
gradient of the sum of their losses is each run's own gradient. Networks so large that their matrix
products keep the machine busy train one at a time, with ``torch.optim``, through the same function.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pathlift.errors import ArgumentError
from pathlift.experiments.alone import Alone
from pathlift.experiments.data import Data
from pathlift.experiments.optimizers import optimizer_named
from pathlift.experiments.runs import Batches, Recondition
from pathlift.experiments.stacked import Stack

# Above so many parameters a step on a CPU is arithmetic, and stacking gains nothing.
STACK_PARAMETERS = 100_000
# Runs of one stack on a CPU: few enough for a step's activations to stay in the cache.
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
    size = 1
    if vectorised:
        size = STACK_RUNS if data.inputs.device.type == "cpu" else len(models)
    for first in range(0, len(models), size):
        part = slice(first, first + size)
        runs = (Stack if vectorised else Alone)(
            models[part], rates[part], schedules[part], data, rule
        )
        batches = Batches(seeds[part], data, batch)
        with _cudnn(_convolves(models[0])):
            for epoch in range(epochs):
                record.add(first, epoch, runs, *runs.epoch_(epoch, batches))
                runs.drop_diverged_()
                if not runs.count:
                    break
    return record.curves()


@contextmanager
def _cudnn(enabled: bool) -> Iterator[None]:
    """With or without cuDNN, which without convolutions is only asked for batch norms.

    Those of stacked runs have tens of thousands of channels; torch's own kernel takes any number.
    """
    before = torch._C._get_cudnn_enabled()
    # Not by torch.backends.cudnn, which may be frozen.
    torch._C._set_cudnn_enabled(before and enabled)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(before)


def _convolves(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())


def stacks(model: nn.Module, data: Data) -> bool:
    """Whether runs of this network gain from being stacked, and can be.

    No convolution (its batched form is a grouped convolution, which is slower than one after the
    other); on a CPU at most :data:`STACK_PARAMETERS` parameters; ``vmap`` has a rule for every
    operation, and forward does not look at values.
    """
    on_cpu = data.inputs.device.type == "cpu"
    if on_cpu and sum(p.numel() for p in model.parameters()) > STACK_PARAMETERS:
        return False
    if _convolves(model):
        return False
    runs = Stack([model], [0.0], [None], data, optimizer_named("sgd"))
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
        self, first: int, epoch: int, runs: Stack | Alone, loss: Tensor, accuracy: Tensor
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
    run = Alone([model], [rate], [None], data, optimizer_named(optimizer))
    batch = min(batch, len(data.inputs))
    x = data.inputs[:batch]
    y = None if data.targets is None else data.targets[:batch]
    times = []
    for _ in range(steps + 1):  # the first one warms up
        start = time.perf_counter()
        run.step_(x, y)[0].item()
        times.append(time.perf_counter() - start)
    return min(times[1:]) * (len(data.inputs) // batch)
