"""What is done to a network before and during training, by name."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import pathlift
from pathlift.criteria import Criterion, fisher
from pathlift.criteria.protocol import given
from pathlift.errors import ArgumentError, UnsupportedOperationError, unknown
from pathlift.experiments.architectures import mlp
from pathlift.experiments.data import Data
from pathlift.experiments.runs import Recondition

_FISHER_SAMPLES = 512
_BATCH = 128  # samples whose statistics stand for a batch's
SPECTRAL = "spectral"  # no criterion of the library, for a measure of its own is needed


@dataclass(frozen=True)
class Method:
    """A way to start and to train a network.

    Attributes:
        label: a few words for tables and legends.
        criterion: of :func:`pathlift.condition_` before the first step; None: nothing is done.
        exact: powers of two only (``condition_``'s ``exact``).
        unit: ``"epoch"`` or ``"step"``: conditions again every so many of them; None: never.
        batch_norm: put batch norm in front of every hidden ReLU.
        optimizer: trains with this one in place of the comparison's; only beside ``"sgd"``.
    """

    label: str
    criterion: str | None = None
    exact: bool = True
    unit: str | None = None
    batch_norm: bool = False
    optimizer: str | None = None

    def schedule(self, every: int) -> Recondition | None:
        """What happens during training; ``every`` counts epochs, a step schedule takes all."""
        if self.unit is None:
            return None
        keywords: Mapping[str, Any] = {"criterion": self.criterion, "exact": self.exact}
        return Recondition(every if self.unit == "epoch" else 1, self.unit, keywords)


METHODS: dict[str, Method] = {
    "baseline": Method("baseline"),
    "path": Method("path-conditioned", "path-kernel"),
    "path-continuous": Method("path-conditioned, continuous", "path-kernel", exact=False),
    "path-schedule": Method("path-conditioned, schedule", "path-kernel", unit="epoch"),
    "path-root": Method("path kernel, roots, continuous", "path-root", exact=False),
    "path-first": Method("path kernel, first powers, continuous", "path-first", exact=False),
    "enorm": Method("ENorm at the start", "weight-norm"),
    "enorm-continuous": Method("ENorm, continuous", "weight-norm", exact=False),
    "enorm-step": Method("ENorm every step", "weight-norm", exact=False, unit="step"),
    "spectral": Method("equal spectral norms", SPECTRAL, exact=False),
    "range": Method("equal ranges", "range"),
    "fisher": Method("Fisher", "fisher"),
    "batch-norm": Method("batch norm", batch_norm=True),
    "path-sgd": Method("Path-SGD", optimizer="path-sgd"),
}


@dataclass(frozen=True)
class Start:
    """A network before its first step.

    Attributes:
        model: conditioned, if the method does so.
        seconds: spent on conditioning, capture included.
        imbalance: of the path kernel's diagonal, per parameter; NaN where paths are not defined.
    """

    model: nn.Module
    seconds: float
    imbalance: float
    log2_scales: Tensor | None = field(default=None, repr=False)


def method_named(name: str) -> Method:
    """The method of a name.

    Raises:
        ArgumentError: an unknown name; the message lists the known ones.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def start(method: Method, model: nn.Module, data: Data) -> Start:
    """Condition ``model`` in place as the method does before training."""
    example = _example(model, data)
    seconds, scales = 0.0, None
    if method.criterion is not None:
        warm_up()
        begin = time.perf_counter()
        if method.criterion == SPECTRAL:
            equal_spectral_norms_(model)
        else:
            criterion = _criterion(method.criterion, model, data, example)
            report = pathlift.condition_(
                model, example, criterion=criterion, exact=method.exact, verify=False
            )
            scales = report.log2_scales
        seconds = time.perf_counter() - begin
    try:
        seen = _acquainted(model, example)
        imbalance = pathlift.imbalance(pathlift.path_kernel_diagonal(seen, example))
    except UnsupportedOperationError:
        imbalance = float("nan")
    return Start(model, seconds, imbalance, scales)


@torch.no_grad()
def equal_spectral_norms_(model: nn.Module) -> None:
    """Give all layers of an MLP their geometric mean of spectral norms, one factor per layer.

    Muon's steps have one spectral norm for all layers, whatever their gradients: this makes them
    equal shares of the weights.

    Raises:
        ArgumentError: something else than linear layers, ReLU and flattening.
    """
    odd = {type(m).__name__ for m in model.modules()} - {"Sequential", "Linear", "ReLU", "Flatten"}
    if odd:
        raise ArgumentError(
            f"equal spectral norms are made for linear layers and ReLU only; found "
            f"{', '.join(sorted(odd))}."
        )
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    norms = torch.stack([torch.linalg.matrix_norm(m.weight.double(), 2) for m in layers])
    factors = norms.log().mean().exp() / norms
    for layer, factor, above in zip(layers, factors, factors.cumprod(0), strict=True):
        layer.weight.mul_(factor.to(layer.weight.dtype))
        if layer.bias is not None:
            layer.bias.mul_(above.to(layer.bias.dtype))


def _example(model: nn.Module, data: Data) -> Tensor:
    """Two samples will do for shapes; batch norms are read with the statistics of a batch."""
    return data.inputs[: _BATCH if _batch_norms(model) else 2]


def _batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def _acquainted(model: nn.Module, example: Tensor) -> nn.Module:
    """The model, or a copy whose batch norms have the example's statistics, as condition_ reads."""
    if not _batch_norms(model):
        return model
    model = copy.deepcopy(model).train()
    for norm in _batch_norms(model):
        norm.momentum = 1.0
    model(example)
    return model


def _criterion(name: str, model: nn.Module, data: Data, example: Tensor) -> str | Criterion:
    """What :func:`pathlift.condition_` takes for the criterion of a method."""
    if name == "fisher":
        first = data.first(_FISHER_SAMPLES)
        return fisher(model, [(first.inputs, first.wanted)], loss_of(data))
    if name == "path-root":
        diagonal = pathlift.path_kernel_diagonal(model, example)
        return _first_power({n: g.sqrt() for n, g in diagonal.items()})
    if name == "path-first":
        return _first_power(first_powers(model, example))
    return name


def _first_power(values: Mapping[str, Tensor]) -> Criterion:
    """Coefficients that move as a gradient does, not as its square."""
    return replace(given(values), rate=-1.0)


@torch.no_grad()
def first_powers(model: nn.Module, example: Tensor) -> dict[str, Tensor]:
    """``sum_p |dPhi_p / dtheta_i|`` of a network without norms, by parameter name.

    The squared network of ``sqrt |theta|`` is the network of ``|theta|``, so the pass that gives
    the path kernel's diagonal for the one gives first powers for the other.
    """
    rooted = copy.deepcopy(model)
    for parameter in rooted.parameters():
        parameter.copy_(parameter.abs().sqrt())
    return pathlift.path_kernel_diagonal(rooted, example)


def loss_of(data: Data) -> Callable[[Any, Any], Tensor]:
    """The training loss of the data's task."""
    return cross_entropy if data.kind == "classification" else mse_loss


@functools.cache
def warm_up() -> None:
    """Import and compile what a process's first capture does, which is no cost of the method."""
    with torch.random.fork_rng(devices=[]):
        pathlift.condition_(mlp((2, 2, 2)), torch.zeros(2, 2))
