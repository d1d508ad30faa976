"""The third-party survey on models of the tests' own: it would show what it is there to show."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.symmetry.group import RescalingGroup
from zoo import forks, third_party
from zoo.parties.recipe import Recipe, noise, recipe
from zoo.traces import differences, fake_tensors, reachable, snapshot


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    target = f"{__name__}:mlp"
    found = {
        "own:mlp": recipe(target, noise(4, 3)),
        "own:gone": recipe("no_such_package:x", noise(1)),
    }
    monkeypatch.setattr(third_party, "recipes", lambda: found)
    monkeypatch.setattr(Recipe, "make", _here(Recipe.make))


def _here(make: Callable[[Recipe], Any]) -> Callable[[Recipe], Any]:
    """pytest imports this file under a name that can't be imported again."""
    return lambda self: mlp() if self.target.endswith(":mlp") else make(self)


def test_there_are_enough_models_of_enough_libraries() -> None:
    names = list(third_party.recipes())
    assert len(names) >= 150
    assert len({name.partition(":")[0] for name in names}) >= 20
    assert all(name.count(":") == 1 for name in names)


def test_a_sound_model_has_no_finding(own: None) -> None:
    row = third_party.survey("own:mlp")
    assert not third_party.wrong(row)
    assert row["eval"] == row["train"] == "identical"
    assert row["scales"] > 0 and "imbalance" in row
    assert "without a finding: 1;" in third_party.table([row])


def test_a_missing_library_is_left_out_with_the_reason(own: None) -> None:
    row = third_party.survey("own:gone")
    assert "no_such_package" in row["missing"] and not third_party.wrong(row)
    assert "no_such_package" in third_party.table([row])


def test_a_wrong_rescaling_is_seen(own: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: RescalingGroup, model: nn.Module, scales: Tensor) -> None:
        with torch.no_grad():
            next(iter(model.parameters())).mul_(2)
            list(model.parameters())[-1].mul_(2)

    monkeypatch.setattr(RescalingGroup, "rescale_", wrong)
    assert {"eval", "train"} <= set(third_party.wrong(third_party.survey("own:mlp")))


def test_an_error_of_another_kind_and_a_refusal(own: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: Exception) -> Callable[..., Any]:
        def call(*_: object, **__: object) -> Any:
            raise error

        return call

    monkeypatch.setattr(pathlift, "rescaling_group", raising(KeyError("x")))
    row = third_party.survey("own:mlp")
    assert row["errors"].startswith("rescaling_group") and "KeyError" in row["traceback"]
    monkeypatch.setattr(pathlift, "rescaling_group", raising(pathlift.CaptureError("why")))
    row = third_party.survey("own:mlp")
    assert row["refused"] == "CaptureError: why" and not third_party.wrong(row)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda m: setattr(m, "made", 1), "model.made appeared"),
        (lambda m: m.eval(), "training changed"),
        (lambda m: m.table.append(2), "model.table"),
        (lambda m: m.cache.update(a=torch.ones(2)), "model.cache"),
        (lambda m: m[1].running_mean.add_(1), "running_mean changed"),
        (lambda m: torch.rand(1), "torch random state"),
        (lambda m: np.random.rand(), "numpy random state"),
        (lambda m: random.random(), "python random state"),
        (lambda m: torch.set_grad_enabled(False), "grad mode"),
    ],
)
def test_what_a_call_leaves_behind_is_seen(change: Callable[[Any], object], where: str) -> None:
    model: Any = mlp()
    model.table, model.cache = [1], {"a": torch.zeros(2)}
    before = snapshot(model)
    assert not differences(before, snapshot(model))
    try:
        change(model)
        assert any(where in line for line in differences(before, snapshot(model)))
    finally:
        torch.set_grad_enabled(True)


def test_every_tensor_of_an_output_is_compared() -> None:
    class Slotted:
        __slots__ = ("x",)

    one, two, three, four = (torch.rand(2) for _ in range(4))
    slotted: Any = Slotted()
    slotted.x = three
    output = {"a": [one, (two, one)], "b": slotted, "c": torch.distributions.Normal(four, 1.0)}
    found = reachable(output)
    assert [t is u for t, u in zip(found, (one, two, three, four), strict=False)] == [True] * 4
    assert not reachable(mlp())


def test_a_fake_tensor_is_found() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model: Any = mlp()
    assert not fake_tensors(model)
    model.table = {"a": [FakeTensorMode().from_tensor(torch.ones(2))]}
    assert fake_tensors(model) == ["model.table['a'][0] is fake"]


def test_a_model_that_dies_or_hangs_costs_one_row() -> None:
    def survey(name: str) -> dict[str, Any]:
        if name == "a:dies":
            forks.mp.current_process().kill()
        if name == "a:hangs":
            forks.mp.Event().wait()
        return {"name": name}

    names = ["a:dies", "a:hangs", "a:works", "b:works"]
    rows = {r["name"]: r for r in forks.rows(names, survey, lambda name: None, 1, 2)}
    assert "died" in rows["a:dies"]["crashed"] and "within 1 s" in rows["a:hangs"]["crashed"]
    assert rows["a:works"] == {"name": "a:works"} and rows["b:works"] == {"name": "b:works"}


@pytest.mark.skipif(not third_party.DATA.exists(), reason="make zoo has not been run")
def test_the_page_is_the_one_of_its_data_and_has_no_finding() -> None:
    rows = json.loads(third_party.DATA.read_text())
    assert third_party.table(rows) == third_party.TABLE.read_text()
    assert not [row["name"] for row in rows if third_party.wrong(row)]
