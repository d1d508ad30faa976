"""When outputs differ although they should not: the model is as before and the cause is named."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.blame import smallest
from pathlift.capture.model import capture
from pathlift.capture.shown import lasts
from pathlift.homes.module import ModuleHome
from pathlift.homes.snapshot import Snapshot
from pathlift.verify import View, largest_change


class Clipped(nn.Module):
    """Three layers; once ``clip`` names hidden channels, they are not homogeneous any more."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.clip: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        for channel in self.clip:
            x = torch.cat(
                (x[:, :channel], x[:, channel:].clamp(max=0.01)[:, :1], x[:, channel + 1 :]), 1
            )
        return self.c(torch.relu(self.b(x)))


def conditioner() -> tuple[Clipped, pathlift.Conditioner, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Clipped()
    with torch.no_grad():
        model.a.weight.abs_()
        model.a.bias.abs_()
        model.a.weight.mul_(8 * torch.rand(8, 1) + 1)
    x = torch.rand(4, 3) + 1
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    model(x).sum().backward()
    optimizer.step()
    return model, pathlift.Conditioner(model, x), optimizer


@pytest.mark.parametrize("channels", [[5], [0], [2, 6]])
def test_the_channel_to_blame_is_named(channels: list[int]) -> None:
    model, conditioned, optimizer = conditioner()
    before = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    model.clip = channels
    with pytest.raises(pathlift.VerificationError) as e:
        conditioned.condition_(optimizer=optimizer)
    message = str(e.value)
    assert re.search(
        r"Of all scales scale \d alone does: of 'a.weight', 'a.bias', 'b.weight', which pass "
        r"through relu", message,
    ), message  # fmt: skip
    assert "The model has been restored" in message
    # Which one is said by the group itself.
    scale = int(re.search(r"scale (\d+) alone", message)[1])
    rows = conditioned.group.exponents("a.bias")[:, scale]
    assert [int(k) for k in rows.nonzero()] in [[c] for c in channels]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for key, values in optimizer.state_dict()["state"].items():
        assert torch.equal(values["momentum_buffer"], state["state"][key]["momentum_buffer"])


def test_a_model_that_draws_its_own_numbers() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x))) * (1 + 0.1 * next(calls))

    calls = itertools.count()

    torch.manual_seed(0)
    with pytest.raises(pathlift.VerificationError, match="Forward is not deterministic: the unch"):
        pathlift.condition_(Noisy(), torch.randn(2, 3))


def test_an_error_while_looking_restores_the_model() -> None:
    model, conditioned, _ = conditioner()
    before = copy.deepcopy(model.state_dict())
    calls = []

    def hook(*_: object) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("second run")

    model.register_forward_hook(hook)
    for exact in (True, False):
        calls.clear()
        with pytest.raises(pathlift.VerificationError, match="second run"):
            conditioned.condition_(exact=exact)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_the_smallest_set() -> None:
    names = list(range(100))
    for guilty in ({17}, {0}, {99}, {3, 4}, {0, 50, 99}, set(range(8))):
        tried: list[list[int]] = []

        def fails(some: list[int], guilty: set[int] = guilty, tried: list = tried) -> bool:
            tried.append(some)
            return guilty <= set(some)

        assert smallest(names, fails, trials=1000) == sorted(guilty)
        assert len(tried) <= 2 * 7 * len(guilty) + 2 * len(guilty)
        few = smallest(names, fails, trials=5)
        assert guilty <= set(few)
    assert smallest([4], lambda some: True) == [4]


def test_change_of_outputs() -> None:
    nan = float("nan")
    one = [[torch.tensor([1.0, nan]), torch.tensor([1, 2])], [torch.tensor([True])]]
    assert largest_change(one, copy.deepcopy(one)) == 0.0
    other = copy.deepcopy(one)
    other[0][1][1] = 5
    assert largest_change(one, other) == 3.0
    other[0][0][1] = 1.0
    assert largest_change(one, other) == float("inf")
    assert largest_change([[]], [[]]) == 0.0


def test_what_a_run_leaves_behind_is_put_back() -> None:
    class Messy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
            self.last, self.sizes = None, {}

        def forward(self, x: Tensor) -> Tensor:
            self.sizes["x"] = tuple(x.shape)
            self.last = self.b(torch.relu(self.norm(self.a(x))))
            return self.last

    torch.manual_seed(0)
    model, x = Messy(), torch.randn(5, 3)
    conditioned = pathlift.Conditioner(model, x)
    model.last, model.sizes = None, {}
    sizes, statistics = model.sizes, model.norm.running_mean.clone()
    state = torch.get_rng_state()
    assert conditioned.condition_(exact=True).max_output_change == 0.0
    assert model.last is None and model.sizes is sizes and sizes == {}
    assert torch.equal(model.norm.running_mean, statistics)
    assert torch.equal(state, torch.get_rng_state())


def test_a_run_that_was_watched_need_not_be_one_that_is_not() -> None:
    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x))) * (1.5 if torch.is_grad_enabled() else 1.0)

    torch.manual_seed(0)
    x = torch.randn(4, 3)
    for exact in (True, None):
        report = pathlift.condition_(Modes(), x, exact=exact)
        assert bool(report.log2_scales.any())
        assert report.max_output_change < 1e-6


class Stateful(nn.Module):
    """Two layers and a norm; ``what`` is done with what a call leaves."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.what, self.calls = what, 0
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.norm(self.a(x))))
        if self.what == "counts":
            self.count += 1
        elif self.what == "counts into another":
            self.count += 1
            self.last += self.count
        elif self.what == "adds what was last":
            x = x + self.last
            self.last.copy_(x.detach().mean(0))
        elif self.what == "keeps a tensor":
            self.kept = x.detach()
        elif self.what == "fails from the second call on":
            self.calls += 1
            if self.calls > 1:
                x = x + self.b.weight.square().sum()
        return x


@pytest.mark.parametrize(
    ("what", "training", "expected"),
    [
        ("nothing", True, False),
        ("nothing", False, False),
        ("counts", True, False),
        ("counts into another", True, True),
        ("adds what was last", True, True),
        ("adds what was last", False, True),
        ("keeps a tensor", False, True),
    ],
)
def test_when_a_call_may_see_what_the_one_before_has_left(
    what: str, training: bool, expected: bool
) -> None:
    torch.manual_seed(0)
    model, x = Stateful(what).train(training), torch.randn(5, 3)
    program = capture(model, x)
    with Snapshot(model) as before:
        model(x)
        assert lasts(program, before.changed(), before.written()) == expected
    runs = View(ModuleHome(model), program).look()
    assert runs is not None
    assert len(runs) == (3 if expected else 2)


def test_what_only_a_second_call_does_is_seen() -> None:
    torch.manual_seed(0)
    model, x = Stateful("nothing"), torch.randn(5, 3)
    with torch.no_grad():
        model.norm.weight.mul_(torch.linspace(0.1, 30, 8))
    conditioned = pathlift.Conditioner(model, x)
    model.what = "fails from the second call on"
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(pathlift.VerificationError, match="differ by up to"):
        conditioned.condition_(exact=True)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.calls == 0


@pytest.mark.parametrize("exact", [True, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_what_was_applied_stays(batch: int, training: bool, exact: bool | None) -> None:
    """In train mode a batch norm refuses one value: a capture then remembers parameters, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model.train(training)
    x = torch.randn(batch, 4)
    before = [p.detach().clone() for p in model.parameters()]
    if training and batch == 1:
        with pytest.raises(pathlift.CaptureError, match="Expected more than 1 value"):
            pathlift.condition_(model, x, exact=exact)
        return
    report = pathlift.condition_(model, x, exact=exact)
    other = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p, q in zip(other.parameters(), before, strict=True):
            p.copy_(q)
    pathlift.rescaling_group(other.train(training), x).rescale_(other, report.log2_scales)
    assert report.log2_scales.any()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    again = pathlift.condition_(model, x, exact=exact)
    assert again.imbalance_before == pytest.approx(report.imbalance_after, abs=1e-6)
