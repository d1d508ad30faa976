"""A sample of `make operators`: one case of each operator; and proof that its checks can fail."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("expecttest")

import pathlift
from operators import sweep
from operators.cases import Case, Operator, cases, database
from operators.checks import Verdict, check, difference, shortfall
from operators.page import page
from pathlift.symmetry.group import RescalingGroup

FEW = 6  # cases to look through for one that stands for the operator


def typical(name: str) -> Case | None:
    """The first case whose argument has several entries, else the first one."""
    found = list(islice(cases(database()[name]), FEW))
    several = [case for case in found if case.leaves[case.argument].numel() > 1]
    return next(iter([*several, *found]), None)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", list(database()))
def test_one_sample_of_each_operator_is_sound(name: str) -> None:
    case = typical(name)
    if case is None:
        pytest.skip("no floating argument")
    verdict = check(case)
    assert verdict.sound, f"{verdict.to_dict()}\n{verdict.trace}"


@pytest.mark.zoo
@pytest.mark.parametrize("name", list(database()))
def test_every_sample_of_each_operator_is_sound(name: str) -> None:
    wrong = [v for v in map(check, sweep.chosen(name, sweep.MOST)) if not v.sound]
    assert not wrong, [v.to_dict() for v in wrong]


def made(call: object, *tensors: Tensor) -> Case:
    """The case of an operator of one's own: its first argument is fed."""
    sample = SimpleNamespace(input=tensors[0], args=tensors[1:], kwargs={})
    info = SimpleNamespace(sample_inputs=lambda *_: [sample])
    return next(cases(Operator("own", call, info)))  # type: ignore[arg-type]


def test_the_fed_argument_has_the_samples_values() -> None:
    values = torch.tensor([[0.3, -2.0, 0.0], [1e-3, 7.0, 1.0]])
    model = made(torch.relu, values).module()
    assert torch.allclose(model.feed(torch.tensor([1.0, 0.5])), values, rtol=1e-6, atol=0)


def test_a_scale_passes_what_is_homogeneous_and_not_what_is_not() -> None:
    values = torch.rand(2, 3) + 0.1
    relu, exp = check(made(torch.relu, values)), check(made(torch.exp, values))
    assert (relu.scales, relu.passes, relu.sound) == (6, True, True)
    assert (exp.scales, exp.passes, exp.sound) == (0, False, True)
    assert exp.pinned == {"exp": 1}


def test_a_wrong_rescaling_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: RescalingGroup, model: torch.nn.Module, scales: Tensor) -> None:
        with torch.no_grad():
            next(iter(model.parameters())).mul_(2)

    monkeypatch.setattr(RescalingGroup, "rescale_", wrong)
    assert "differ" in check(made(torch.exp, torch.rand(2, 3))).bits


def test_an_error_of_another_kind_is_seen_and_a_worded_one_is_a_refusal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = made(torch.relu, torch.rand(2, 3))
    for error, answer in ((KeyError("x"), "errors"), (pathlift.CaptureError("x"), "refused")):

        def broken(*_: object, _error: Exception = error, **options: object) -> None:
            raise _error

        monkeypatch.setattr("pathlift.condition.capture", broken)
        assert "x" in getattr(check(case), answer)


def test_a_report_that_falls_short_is_seen() -> None:
    def report(before: float, after: float) -> SimpleNamespace:
        return SimpleNamespace(imbalance_before=before, imbalance_after=after, converged=True)

    assert not shortfall(report(3.0, 1.0), report(1.0, 1.0))
    assert "untrue" in shortfall(report(3.0, 1.0), report(2.0, 1.0))
    assert "gains again" in shortfall(report(3.0, 1.0), report(1.0, 0.5))
    assert "untrue" in shortfall(report(3.0, 1.0), report(float("nan"), 1.0))


def test_nans_at_the_same_places_are_equal() -> None:
    nan = float("nan")
    before = [torch.tensor([1.0, nan, float("inf")]), 3, nan]
    assert not difference(before, [t.clone() if isinstance(t, Tensor) else t for t in before])
    assert "1 of 3 differ" in difference(before, [torch.tensor([1.0, nan, nan]), 3, nan])
    assert difference(before, [before[0], 4, nan])


def test_a_process_that_dies_costs_one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(case: Case) -> Verdict:
        if case.name == "1.0":
            sweep.mp.current_process().kill()
        return Verdict(case.operator.name, case.name)

    def samples(*_: object) -> list[SimpleNamespace]:
        return [SimpleNamespace(input=torch.rand(n), args=(), kwargs={}) for n in (1, 2, 3)]

    own = Operator("own", torch.relu, SimpleNamespace(sample_inputs=samples))
    monkeypatch.setattr(sweep, "database", lambda: {"own": own})
    monkeypatch.setattr(sweep, "check", dies)
    ((name, rows),) = sweep.sweep(["own"], 10, 1)
    assert [row.get("errors", "") for row in rows] == ["", "the process dies", ""]
    assert "with errors of the library's own: 1;" in page({name: rows})
