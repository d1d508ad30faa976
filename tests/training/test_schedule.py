"""When a schedule conditions, what it remembers, and going on after a stop."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

import pathlift
from pathlift.errors import ArgumentError
from pathlift.training import Schedule

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        (model(X) - Y).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("every", "until", "when"),
    [
        (1, None, [0, 1, 2, 3, 4, 5, 6]),
        (3, None, [0, 3, 6]),
        (2, 4, [0, 2]),
        (2, 5, [0, 2, 4]),
        (None, None, [0]),
        (1, 0, []),
        (100, None, [0]),
    ],
)
def test_when_it_conditions(every: int | None, until: int | None, when: list[int]) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = Schedule(every, until, unit="step", tol=1e-6)
    for call in range(7):
        assert schedule.due == (call in when)
        report = schedule.step(model, X[:1], optimizer)
        assert (report is not None) == (call in when)
        if report is not None:
            assert schedule.history[-1] == {
                "unit": "step",
                "step": call,
                "imbalance_before": report.imbalance_before,
                "imbalance_after": report.imbalance_after,
                "moved": int(report.log2_scales.count_nonzero()),
            }
        train(model, optimizer)
    assert [entry["step"] for entry in schedule.history] == when
    assert schedule.calls == 7


def test_it_does_what_condition_does() -> None:
    model, other = net(), net()
    report = Schedule(exact=False).step(model, X[:1], None)
    expected = pathlift.condition_(other, X[:1], exact=False)
    assert report is not None
    assert torch.equal(report.log2_scales, expected.log2_scales)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("stop", range(1, 6))
def test_resume_equals_never_having_stopped(name: str, stop: int) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, Schedule]:
        model = net()
        options: dict[str, Any] = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.05, **options)
        return model, optimizer, Schedule(every=2, until=5, exact=False)

    def epochs(count: int, model: nn.Module, optimizer: Any, schedule: Schedule) -> None:
        for _ in range(count):
            schedule.step(model, X[:1], optimizer)
            train(model, optimizer)

    whole = start()
    epochs(6, *whole)
    assert all(entry["moved"] for entry in whole[2].history)

    stopped = start()
    epochs(stop, *stopped)
    saved = copy.deepcopy([part.state_dict() for part in stopped])
    saved[2] = json.loads(json.dumps(saved[2]))
    resumed = start()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    epochs(6 - stop, *resumed)
    for p, q in zip(resumed[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(p, q)
    assert resumed[2].history == whole[2].history
    assert resumed[2].calls == whole[2].calls


def test_a_failed_call_does_not_count() -> None:
    schedule = Schedule()
    with pytest.raises(pathlift.PathliftError):
        schedule.step(net(), torch.zeros(1, 5), None)
    assert schedule.calls == 0 and schedule.due and not schedule.history


def test_state_is_a_copy() -> None:
    schedule = Schedule()
    schedule.step(net(), X[:1], None)
    state = schedule.state_dict()
    state["history"][0]["step"] = 77
    assert schedule.history[0]["step"] == 0


def test_reach() -> None:
    schedule = Schedule(every=2)
    assert schedule.reach(4) and schedule.calls == 4 and schedule.due
    schedule.step(net(), X[:1], None)
    assert not schedule.reach(4) and schedule.calls == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be an integer >= 1 or None; found 0"),
        ({"every": True}, "every must be an integer >= 1 or None; found True"),
        ({"every": 1.5}, "every must be an integer >= 1 or None; found 1.5"),
        ({"until": -1}, "until must be an integer >= 0 or None; found -1"),
        ({"unit": "day"}, "unit must be 'epoch' or 'step'; found 'day'"),
        ({"criterium": "x"}, "'criterium' is not an argument of condition_"),
        ({"optimizer": None}, "'optimizer' is not an argument of condition_"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Schedule(**arguments)


@pytest.mark.parametrize("state", [None, {}, {"calls": 1}, {"calls": True, "history": []}, [1]])
def test_state_of_something_else(state: Any) -> None:
    with pytest.raises(ArgumentError, match="must be what Schedule.state_dict"):
        Schedule().load_state_dict(state)


def test_repr() -> None:
    assert repr(Schedule(3)) == "Schedule(every=3, until=None, unit='epoch', calls=0)"
