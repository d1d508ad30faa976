"""A stacked run equals the same run alone, whatever trains beside it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pathlift.errors import ArgumentError
from pathlift.experiments.architectures import build, mlp
from pathlift.experiments.data import Data
from pathlift.experiments.runs import Recondition
from pathlift.experiments.training import epoch_seconds, stacks, train


def _data(count: int = 60) -> Data:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return Data("made", inputs, (inputs[:, 0] * inputs[:, 1] > 0).long() + (inputs[:, 2] > 1), 3)


def _models(count: int, *, norm: bool = False) -> list[nn.Module]:
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = mlp((5, 8, 4, 3))
        if norm:
            model = nn.Sequential(*model[:1], nn.BatchNorm1d(8), *model[1:])
        models.append(model.double())
    return models


SCHEDULES = {
    "none": None,
    "epochs": Recondition(2),
    "steps": Recondition(3, "step", {"criterion": "weight-norm", "exact": False}),
}


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_stacked_run_equals_the_run_alone(optimizer: str, norm: bool, schedule: str) -> None:
    models, data = _models(4, norm=norm), _data()
    seeds, rates = [0, 1, 1, 2], [0.05, 0.02, 1e30, 0.01]
    due = [SCHEDULES[schedule], None, SCHEDULES[schedule], SCHEDULES["epochs"]]
    keywords = {"epochs": 5, "batch": 16, "optimizer": optimizer, "test": _data(40)}
    before = copy.deepcopy(models[0].state_dict())
    together = train(models, seeds, rates, data, recondition=due, vectorised=True, **keywords)
    for k in range(4):
        alone = train(
            [models[k]],
            [seeds[k]],
            [rates[k]],
            data,
            recondition=[due[k]],
            vectorised=False,
            **keywords,
        )
        if k == 2:  # its rate makes it diverge; Adam's steps and batch norm may keep it finite
            if optimizer != "adam" and not norm:
                assert torch.isinf(together.loss[2, -1]) and torch.isinf(alone.loss[0, -1])
            continue
        for name in ("loss", "accuracy", "test_loss", "test_accuracy"):
            assert torch.allclose(
                getattr(together, name)[k], getattr(alone, name)[0], rtol=1e-9, atol=1e-12
            ), (k, name)
    assert together.conditioning_seconds is not None
    assert bool((together.conditioning_seconds[3, 2::2] > 0).all())
    assert float(together.conditioning_seconds[1].sum()) == 0
    assert all(torch.equal(before[n], t) for n, t in models[0].state_dict().items())


def test_conditioning_on_the_way_changes_the_run_that_has_it_and_no_other() -> None:
    models, data = _models(1) * 2, _data()
    models[0][0].weight.data *= 8
    keywords = {"epochs": 4, "batch": 16, "vectorised": True}
    plain = train(models, [0, 0], [0.02, 0.02], data, **keywords)
    mixed = train(
        models, [0, 0], [0.02, 0.02], data, recondition=[Recondition(2), None], **keywords
    )
    assert torch.equal(plain.loss[1], mixed.loss[1])
    assert torch.equal(plain.loss[0, :2], mixed.loss[0, :2])
    assert not torch.allclose(plain.loss[0, 2:], mixed.loss[0, 2:], rtol=1e-4)


def test_muon_stacked_is_close_to_torch() -> None:
    models, data = _models(2), _data()
    keywords = {"epochs": 4, "batch": 16, "optimizer": "muon"}
    together = train(models, [0, 1], [0.02, 0.01], data, vectorised=True, **keywords).loss
    alone = train(models, [0, 1], [0.02, 0.01], data, vectorised=False, **keywords).loss
    assert torch.allclose(together, alone, rtol=0.02)
    assert not torch.allclose(together[0], together[1], rtol=0.05)


def test_path_sgd_trains_one_at_a_time_and_does_not_depend_on_scales() -> None:
    models, data = _models(1) * 2, _data()
    models[1] = copy.deepcopy(models[0])
    with torch.no_grad():
        models[1][0].weight *= 4
        models[1][0].bias *= 4
        models[1][2].weight /= 4
    keywords = {"epochs": 3, "batch": 16}
    plain = train(models, [0, 0], [0.01, 0.01], data, **keywords).loss
    assert not torch.allclose(plain[0], plain[1], rtol=1e-3)
    path = train(models[:1], [0], [0.01], data, optimizer="path-sgd", **keywords).loss
    assert path[0, -1] < path[0, 0]
    with pytest.raises(ArgumentError, match="'path-sgd' trains one run at a time"):
        train(models, [0, 0], [0.1, 0.1], data, epochs=1, optimizer="path-sgd", vectorised=True)


class _Looks(nn.Module):
    """A forward pass that vmap can't map: it branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(x)
        return out if out.sum() > 0 else -out


def test_what_can_be_stacked() -> None:
    data = _data()
    assert stacks(_models(1)[0], data)
    assert not stacks(_Looks().double(), data)
    assert not stacks(mlp((5, 400, 400, 3)).double(), data)
    curves = train([_Looks().double()] * 2, [0, 1], [0.1, 0.1], data, epochs=2, batch=16)
    assert bool(torch.isfinite(curves.loss).all())


def test_stacks_of_many_runs_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    models, data = _models(5), _data()
    arguments = (models, [3, 1, 4, 1, 5], [0.1, 0.2, 0.05, 0.1, 0.3], data)
    whole = train(*arguments, epochs=2, batch=16).loss
    monkeypatch.setattr("pathlift.experiments.training.STACK_RUNS", 2)
    assert torch.allclose(whole, train(*arguments, epochs=2, batch=16).loss, rtol=1e-12)


def test_wrong_arguments_are_named() -> None:
    models, data = _models(2), _data()
    with pytest.raises(ArgumentError, match="one entry per run; found 2, 1, 2"):
        train(models, [0], [0.1, 0.1], data, epochs=1)
    with pytest.raises(ArgumentError, match="epochs must be at least 1; found 0"):
        train(models, [0, 1], [0.1, 0.1], data, epochs=0)
    with pytest.raises(ArgumentError, match="number 1 differs from number 0 in '0.bias'"):
        train([models[0], mlp((5, 9, 4, 3)).double()], [0, 1], [0.1, 0.1], data, epochs=1)


def test_epoch_seconds_leave_the_model_alone() -> None:
    model, data = _models(1)[0], _data()
    before = copy.deepcopy(model.state_dict())
    assert epoch_seconds(model, data, rate=0.1, batch=16) > 0
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_text_is_learnt_stacked_and_alone() -> None:
    """Every place of a piece is a character to be told, as one class of a sample."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 7, (24, 9), generator=generator)
    data = Data("text", codes[:, :-1], codes[:, 1:], 7)
    models = [build("transformer:8-1", data, seed=s) for s in range(2)]
    keywords = {"epochs": 2, "batch": 8, "optimizer": "adamw", "test": data}
    both, one = (
        train(models, [0, 1], [0.01, 0.02], data, vectorised=v, **keywords) for v in (True, False)
    )
    assert torch.allclose(both.loss, one.loss, rtol=1e-4) and both.loss.dtype == torch.float32
    assert torch.allclose(both.test_loss, one.test_loss, rtol=1e-4)
    assert torch.allclose(both.test_accuracy, one.test_accuracy)
    assert bool((both.loss[:, 1] < both.loss[:, 0]).all())
