"""Bad input: a worded error, and a model that is exactly as before."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.homes.module import ModuleHome
from pathlift.tensors import rescale

X = torch.randn(2, 4)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))


def nan_net() -> nn.Module:
    model = net()
    model[2].weight.data[0, 0] = float("nan")
    return model


def overlapping() -> nn.Module:
    model = net()
    model.extra = nn.Parameter(model[0].weight.data.view(-1)[:4])
    return model


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.sum()) > 0 else -self.layer(x)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + G.random()


G = random.Random(0)
C, E = pathlift.condition_, pathlift.ArgumentError
CASES: list[tuple[str, Callable[[], nn.Module], Callable[[Any], Any], type, str]] = [
    (
        "state dict",
        net,
        lambda m: C(m.state_dict(), X),
        E,
        "model must be a torch.nn.Module; found OrderedDict. Pass the module itself, not its state "
        "dict or its output.",
    ),
    (
        "none",
        net,
        lambda m: C(None, X),
        E,
        "model must be a torch.nn.Module; found NoneType. Pass the module itself, not its state dict "
        "or its output.",
    ),
    (
        "script",
        net,
        lambda m: C(torch.jit.trace(m, X), X),
        pathlift.CaptureError,
        "the model is a TopLevelTracedModule; TorchScript modules can't be exported. Pass the eager "
        "module it was made from.",
    ),
    (
        "lazy",
        lambda: nn.Sequential(nn.LazyLinear(3)),
        lambda m: C(m, X),
        pathlift.CaptureError,
        "'0.weight' is not initialised: its module is lazy. Run the model once on an example batch, "
        "then call again.",
    ),
    (
        "meta",
        lambda: nn.Linear(4, 2, device="meta"),
        lambda m: C(m, X),
        pathlift.CaptureError,
        "'weight' is on the meta device and holds no values. Materialise the model "
        "(model.to_empty(device=...) and load or initialise weights), then call again.",
    ),
    (
        "overlap",
        overlapping,
        lambda m: C(m, X),
        pathlift.CaptureError,
        "parameters '0.weight' and 'extra' are different tensors over the same memory; rescaling one "
        "would change the other. Register the same Parameter under both names (that is supported), "
        "or give each its own storage.",
    ),
    (
        "nan",
        nan_net,
        lambda m: C(m, X),
        E,
        "parameter '2.weight' has entries that are NaN or infinite; its path kernel is not defined. "
        "Restore the weights or initialise them again.",
    ),
    (
        "no inputs",
        net,
        lambda m: C(m, None),
        E,
        "example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments; found "
        "NoneType. Pass one batch as the model's forward takes it.",
    ),
    (
        "integer inputs",
        net,
        lambda m: C(m, 3),
        E,
        "example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments; found "
        "int. Pass one batch as the model's forward takes it.",
    ),
    (
        "keys",
        net,
        lambda m: C(m, {1: X}),
        E,
        "example_inputs is a dict whose keys are not all strings; a dict is passed as keyword "
        "arguments. Wrap it in a tuple to pass it as one positional argument.",
    ),
    (
        "criterion",
        net,
        lambda m: C(m, X, criterion="hessian"),
        E,
        "criterion 'hessian' is unknown. Supported: 'path-kernel', 'weight-norm', 'range', "
        "pathlift.criteria.fisher(...), or a mapping of parameter name to coefficients.",
    ),
    (
        "solver",
        net,
        lambda m: C(m, X, solver="adam"),
        E,
        "Unknown solver 'adam'; supported: 'newton', 'coordinate'. Use solver='newton' unless you "
        "want the published algorithm.",
    ),
    ("exact", net, lambda m: C(m, X, exact=1), E, "exact must be True or False; found 1."),
    ("verify", net, lambda m: C(m, X, verify="no"), E, "verify must be True or False; found 'no'."),
    (
        "tol zero",
        net,
        lambda m: C(m, X, tol=0),
        E,
        "tol must be a number between 0 and 1; found 0.",
    ),
    (
        "tol text",
        net,
        lambda m: C(m, X, tol="x"),
        E,
        "tol must be a number between 0 and 1; found 'x'.",
    ),
    (
        "tol nan",
        net,
        lambda m: C(m, X, tol=float("nan")),
        E,
        "tol must be a number between 0 and 1; found nan.",
    ),
    (
        "optimizer",
        net,
        lambda m: C(m, X, optimizer="sgd"),
        E,
        "optimizer must be a torch.optim.Optimizer, a list of them or None; found str.",
    ),
    (
        "scales shape",
        net,
        lambda m: pathlift.rescaling_group(m, X).rescale_(m, torch.ones(3)),
        E,
        "log2_scales has shape (3,); this group has 8 scales. Pass a tensor of shape (8,), one log2 "
        "scale each.",
    ),
    (
        "scales nan",
        net,
        lambda m: pathlift.rescaling_group(m, X).rescale_(m, torch.full((8,), float("nan"))),
        E,
        "log2_scales has 8 entries that are not finite. Pass finite log2 scales (integers for "
        "bit-exact rescaling).",
    ),
    (
        "other model",
        net,
        lambda m: pathlift.rescaling_group(m, X).rescale_(nn.Linear(4, 2), torch.ones(8)),
        E,
        "the model has no parameter '0.weight', which the group rescales. Pass the model the group "
        "was computed for.",
    ),
    (
        "other shape",
        net,
        lambda m: pathlift.rescaling_group(m, X).rescale_(
            nn.Sequential(nn.Linear(4, 6)), torch.ones(8)
        ),
        E,
        "parameter '0.weight' has shape (6, 4); the group was computed for (5, 4). Pass the model "
        "the group was computed for.",
    ),
    (
        "exponents",
        net,
        lambda m: pathlift.rescaling_group(m, X).exponents("x"),
        E,
        "'x' is not a parameter of this group; it has '0.weight', '0.bias', '2.weight', '2.bias', "
        "'4.weight', …. Tied parameters stand under their first name.",
    ),
    (
        "overflow",
        net,
        lambda m: pathlift.rescaling_group(m, X).rescale_(m, torch.full((8,), 130)),
        pathlift.RangeError,
        "rescaling '0.weight' by 2**130 to 2**130 leaves the normal range of float32: bits would be "
        "lost. Nothing was changed. Use smaller scales or a wider dtype.",
    ),
    (
        "p zero",
        net,
        lambda m: pathlift.path_norm(m, X, p=0),
        E,
        "p must be a finite number of at least 1; found 0.",
    ),
    (
        "p infinite",
        net,
        lambda m: pathlift.path_norm(m, X, p=float("inf")),
        E,
        "p must be a finite number of at least 1; found inf.",
    ),
    (
        "p text",
        net,
        lambda m: pathlift.path_norm(m, X, p="2"),
        E,
        "p must be a finite number of at least 1; found '2'.",
    ),
    (
        "negative diagonal",
        net,
        lambda m: pathlift.imbalance({"w": -torch.ones(2)}),
        E,
        "the diagonal of 'w' has negative or non-finite entries; a diagonal of G is non-negative. "
        "Check the model's parameters for NaN.",
    ),
    (
        "nan diagonal",
        net,
        lambda m: pathlift.imbalance({"w": torch.full((2,), float("nan"))}),
        E,
        "the diagonal of 'w' has negative or non-finite entries; a diagonal of G is non-negative. "
        "Check the model's parameters for NaN.",
    ),
    (
        "softmax",
        lambda: nn.Sequential(nn.Linear(4, 2), nn.Softmax(-1)),
        lambda m: pathlift.path_kernel_diagonal(m, X),
        pathlift.UnsupportedOperationError,
        "the path lifting is not defined for 'softmax' (in module '1'): it is not piecewise linear in "
        "the network's input. Supported: linear maps, convolutions, ReLU and its kin, pooling, batch "
        "norm with running statistics, sums and products. Use criterion='weight-norm', or "
        "condition_, which uses a stand-in and says so.",
    ),
]


@pytest.mark.parametrize(
    "make, call, error, message", [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_message_and_unchanged_model(
    make: Callable[[], nn.Module], call: Callable[[Any], Any], error: type, message: str
) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict()) if not _unreadable(model) else None
    with pytest.raises(error) as caught:
        call(model)
    assert isinstance(caught.value, pathlift.PathliftError)
    assert str(caught.value) == message
    if before is not None:
        unchanged(model, before)


def _unreadable(model: nn.Module) -> bool:
    return any(nn.parameter.is_lazy(p) or p.is_meta for p in model.parameters())


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


@pytest.mark.parametrize("model, x", [(Branch(), X), (net(), torch.randn(2, 3))])
def test_what_cannot_be_captured(model: nn.Module, x: Tensor) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(pathlift.CaptureError, match="can't be captured in train mode on inputs"):
        C(model, x)
    unchanged(model, before)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("fail_at", [0, 1, 3])
@pytest.mark.parametrize("together", [True, False])
def test_a_failure_in_the_middle_of_applying(
    monkeypatch: pytest.MonkeyPatch, exact: bool, fail_at: int, together: bool
) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(X).sum().backward()
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    calls: list[Tensor] = []

    def call(tensor: Tensor) -> None:
        calls.append(tensor)
        if len(calls) == fail_at + 1:
            raise MemoryError("injected")

    def one(tensor: Tensor, factors: Any, real: Any = rescale.multiply_by_) -> None:
        call(tensor)
        real(tensor, factors)

    def several(tensors: list[Tensor], factors: list[Tensor]) -> None:
        for tensor, factor in zip(tensors, factors, strict=True):
            call(tensor)
            tensor.mul_(factor)

    if together:
        monkeypatch.setattr(torch, "_foreach_mul_", several)
    else:
        monkeypatch.setattr(rescale, "_SMALL", 0)
        monkeypatch.setattr(rescale, "multiply_by_", one)
    group = pathlift.rescaling_group(model, X)
    scales = torch.arange(1, 9) if exact else torch.arange(1, 9) * 0.3
    with pytest.raises(MemoryError, match="injected"):
        ModuleHome(model).multiply_(group.factors(scales), optimizer=optimizer)
    unchanged(model, before)
    for key, values in optimizer.state_dict()["state"].items():
        assert torch.equal(values["momentum_buffer"], state[key]["momentum_buffer"])


def test_a_network_that_is_not_deterministic_is_restored() -> None:
    model = Noisy()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(pathlift.VerificationError, match="The model has been restored"):
        C(model, X)
    unchanged(model, before)


def test_optimizer_state_that_is_not_known() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for p in model.parameters():
        optimizer.state[p]["curvature"] = torch.ones_like(p)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(E, match="SGD keeps state 'curvature' for '0.weight'"):
        C(model, X, optimizer=optimizer)
    unchanged(model, before)
