"""Whatever a caller is in, a call works as outside of it or says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pathlift
from pathlift.cautions import NothingToDo
from pathlift.surroundings import plain_arithmetic


class Doubles(TorchDispatchMode):
    """A mode under which everything is twice what it is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 2 if isinstance(out, Tensor) and out.is_floating_point() else out


class DoublesFunctions(TorchFunctionMode):
    """The same, of functions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 2 if isinstance(out, Tensor) and out.is_floating_point() else out


class MakesATensor(nn.Module):
    """What it makes in forward lies on the default device."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)) + torch.zeros(()))


X = torch.ones(2, 4)
AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a mode": Doubles,
    "a function mode": DoublesFunctions,
    "anomaly detection": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "the default device": lambda: torch.device("cpu"),
}


@pytest.mark.parametrize("name", AROUND)
def test_a_call_is_as_outside(name: str) -> None:
    expected = pathlift.condition_(outside := MakesATensor(), X)
    model = MakesATensor()
    with AROUND[name]():
        report = pathlift.condition_(model, X)
        norm = pathlift.path_norm(model, X)
    assert report.imbalance_after == expected.imbalance_after
    assert norm == pathlift.path_norm(outside, X)
    for a, b in zip(model.parameters(), outside.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("interface", ["older", "newer", "all"])
def test_coarse_products_are_not_for_the_work(interface: str) -> None:
    """Work is done in float32 where the user allows less, and the setting stays."""

    def read() -> list[object]:
        newer = getattr(torch._C, "_get_fp32_precision_getter", None)
        parts = [(b, o) for b in ("cuda", "mkldnn") for o in ("matmul", "conv", "rnn")]
        found: list[object] = [] if newer is None else [newer(*part) for part in parts]
        with suppress(RuntimeError):  # the older interface does not understand all of the newer's
            found.append(torch.get_float32_matmul_precision())
        return found

    plain = read()
    if interface == "older":
        torch.set_float32_matmul_precision("medium")
    elif not hasattr(torch._C, "_set_fp32_precision_setter"):
        pytest.skip("this torch has the older interface alone")
    elif interface == "newer":
        torch._C._set_fp32_precision_setter("mkldnn", "matmul", "bf16")
    else:
        torch._C._set_fp32_precision_setter("generic", "all", "tf32")
    try:
        before = read()
        with plain_arithmetic():
            found = read()
        assert before == read() != plain
        assert not {"tf32", "bf16", "medium"}.intersection(map(str, found))
        assert pathlift.condition_(MakesATensor(), X).max_output_change is not None
        assert before == read()
    finally:
        torch.set_float32_matmul_precision("highest")
        if interface != "older":
            torch._C._set_fp32_precision_setter("mkldnn", "matmul", "none")
            torch._C._set_fp32_precision_setter("generic", "all", "none")


def test_the_model_runs_on_the_default_device() -> None:
    model = MakesATensor()
    with torch.device("meta"), pytest.raises(pathlift.CaptureError, match="does not run on them"):
        pathlift.rescaling_group(model, X)
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.device("meta"):
        assert pathlift.condition_(plain, X).num_scales == 6
    assert torch.get_default_device() == torch.device("cpu")


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_transforms_are_refused(transform: Callable[..., Any]) -> None:
    model = MakesATensor()

    def inside(x: Tensor) -> Tensor:
        pathlift.rescaling_group(model, x)
        return x.sum()

    with pytest.raises(pathlift.ArgumentError, match="rescaling_group was called inside"):
        transform(inside)(X)
    assert torch.rand(2).shape == (2,)  # nothing is poisoned


def test_in_a_compiled_function() -> None:
    model = MakesATensor()
    compiled = torch.compile(
        lambda x: x + pathlift.rescaling_group(model, x).num_scales, backend="eager"
    )
    assert torch.equal(compiled(X), X + 6)


def test_parameters_without_values_are_refused() -> None:
    with FakeTensorMode():
        fake = nn.Linear(4, 2)
    with pytest.raises(pathlift.CaptureError, match="'weight' is a fake tensor"):
        pathlift.rescaling_group(fake, X)
    with torch.inference_mode():
        frozen = nn.Linear(4, 2)
    with pytest.raises(pathlift.CaptureError, match="'weight' was made in inference mode"):
        pathlift.condition_(frozen, X)


def test_a_warning_names_the_callers_line() -> None:
    import_module("torch._dynamo")  # stands between the caller and the library
    with pytest.warns(NothingToDo) as caught:
        pathlift.condition_(nn.Linear(4, 2), X)
    assert caught[0].filename == __file__
