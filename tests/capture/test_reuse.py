"""A captured program for other weights: the same scales as a capture of its own, or refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.checkpoint.format import read_header
from pathlift.checkpoint.writing import Shard, as_bytes, write_file
from pathlift.errors import ArgumentError, CheckpointError

X = torch.randn(2, 3, 8, 8)


class Network(nn.Module):
    """Convolutions, a batch norm, a residual, a mask and an index table that it computes with."""

    def __init__(self, width: int = 6, slope: float = 0.1, mask: float = 1.0) -> None:
        super().__init__()
        self.slope = slope
        self.inside = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.again = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.out = nn.Linear(width, 4)
        self.register_buffer("mask", torch.tensor([mask, 0.0, 1.0]))
        self.register_buffer("gain", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if bool(self.mask[0] > 0):  # a value that decides what is done
            x = x * self.mask.view(1, -1, 1, 1)
        y = nn.functional.leaky_relu(self.norm(self.inside(x)), self.slope)
        y = y + self.again(y).relu()
        return self.out((y * self.gain.view(1, -1, 1, 1)).mean((2, 3)))


def _network(seed: int, **settings: float) -> Network:
    torch.manual_seed(seed)
    model = Network(**settings)
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


def _same(report: pathlift.ConditioningReport, other: pathlift.ConditioningReport) -> bool:
    return torch.equal(report.log2_scales, other.log2_scales) and (
        report.imbalance_before,
        report.imbalance_after,
    ) == (other.imbalance_before, other.imbalance_after)


Again = Callable[[pathlift.Conditioner, nn.Module, Path], pathlift.Conditioner]


def _saved(conditioner: pathlift.Conditioner, model: nn.Module, path: Path) -> pathlift.Conditioner:
    conditioner.save(path / "program.safetensors")
    return pathlift.Conditioner.load(path / "program.safetensors", model)


WAYS: dict[str, Again] = {"on": lambda c, model, _: c.on(model), "save and load": _saved}


@pytest.mark.parametrize("way", WAYS)
def test_other_weights_are_conditioned_as_by_their_own_capture(way: str, tmp_path: Path) -> None:
    conditioner = pathlift.Conditioner(_network(0), X)
    first, second = _network(1), _network(1)
    reused = WAYS[way](conditioner, first, tmp_path)
    found = reused.condition_(exact=True)
    assert _same(found, pathlift.condition_(second, X, exact=True))
    assert found.max_output_change == 0.0
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert reused.group.summary() == conditioner.group.summary()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m: setattr(m, "slope", 0.2), "setting 'slope'"),
        (lambda m: m.train(), "setting 'training'"),
        (lambda m: m.mask.zero_(), "values of buffer 'mask'"),
        (lambda m: setattr(m.norm, "eps", 1e-3), "setting 'norm.eps'"),
        (
            lambda m: setattr(m, "again", nn.Conv2d(6, 6, 1, bias=False).eval()),
            "setting 'again.kernel",
        ),
        (lambda m: setattr(m.out, "bias", None), "module 'out'"),
        (lambda m: m.inside.requires_grad_(False), "tensor 'inside.weight'"),
        (lambda m: m.norm.double(), "tensor 'norm.running_mean'"),
        (lambda m: m.out.register_forward_hook(lambda *_: None), "setting 'out._forward_hooks'"),
        (lambda m: setattr(m, "norm", nn.Identity()), "module 'norm'"),
    ],
)
def test_a_model_that_may_do_something_else_is_refused(
    way: str, change: Callable[[Network], object], what: str, tmp_path: Path
) -> None:
    conditioner = pathlift.Conditioner(_network(0), X)
    other = _network(1)
    change(other)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ArgumentError) as error:
        WAYS[way](conditioner, other, tmp_path)
    assert what in str(error.value) and "Capture this one" in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_what_counts_is_the_model_as_it_was_captured() -> None:
    model = _network(0)
    conditioner = pathlift.Conditioner(model, X)
    model.train()
    conditioner.on(_network(1))
    with pytest.raises(ArgumentError, match="training"):
        conditioner.on(_network(1).train())


def test_running_statistics_may_differ_and_count() -> None:
    conditioner = pathlift.Conditioner(_network(0), X)
    other = _network(1)
    other.norm.num_batches_tracked.fill_(7)
    other.norm.running_var.fill_(100.0)
    own = pathlift.Conditioner(other, X).condition_(exact=True, on_nothing="ignore")
    again = _network(1)
    again.norm.num_batches_tracked.fill_(7)
    again.norm.running_var.fill_(100.0)
    assert _same(own, conditioner.on(again).condition_(exact=True, on_nothing="ignore"))


def test_tied_parameters_have_to_be_tied() -> None:
    def network(tied: bool) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        if tied:
            model[2].weight = model[0].weight
        return model

    x = torch.zeros(2, 4)
    pathlift.Conditioner(network(True), x).on(network(True))
    with pytest.raises(ArgumentError, match="tensor"):
        pathlift.Conditioner(network(True), x).on(network(False))


def test_a_file_of_another_version_or_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "program.safetensors"
    conditioner = pathlift.Conditioner(_network(0), X)
    conditioner.save(path)
    with path.open("rb") as file:
        tensors, about = read_header(file, path)
    assert json.loads(about["program"])["graphs"]
    # No weight is in it: the inputs and what stands for the gain's constant.
    assert sum(t.nbytes for t in tensors) < 4 * X.nbytes

    def rewritten(**changed: str) -> None:
        write_file(path, Shard([], lambda: iter(()), {**about, **changed}))

    rewritten(torch="1.0")
    with pytest.raises(CheckpointError, match=r"written with torch 1\.0"):
        pathlift.Conditioner.load(path, _network(1))
    weights = tmp_path / "weights.safetensors"
    one = torch.ones(2)
    write_file(weights, Shard([("a", one.dtype, (2,))], lambda: iter([as_bytes(one)])))
    with pytest.raises(CheckpointError, match="holds no captured program"):
        pathlift.Conditioner.load(weights, _network(1))


def test_inputs_that_are_no_plain_values_are_not_saved(tmp_path: Path) -> None:
    class Odd:
        pass

    class Takes(nn.Linear):
        def forward(self, x: Tensor, odd: object = None) -> Tensor:
            return super().forward(x)

    last = pathlift.Conditioner(Takes(3, 2), (torch.zeros(2, 3), Odd()))
    with pytest.raises(CheckpointError, match="it holds a Odd"):
        last.save(tmp_path / "program.safetensors")
    assert not list(tmp_path.iterdir())


class Foreign:
    """Nothing of a model's: it holds what can't be told, itself among it."""

    __module__ = "somewhere.else"

    def __init__(self) -> None:
        self.me, self.lock, self.sizes = self, threading.Lock(), [object()] * 3


def test_objects_that_are_not_the_models_are_told_by_class() -> None:
    def holding() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        model.trainer, model.loop = Foreign(), (loop := [])
        loop.append(loop)
        return model

    conditioner = pathlift.Conditioner(holding(), torch.zeros(2, 4))
    assert conditioner.on(holding()).condition_().num_scales == 6
    other = holding()
    other.trainer = "none"
    with pytest.raises(pathlift.ArgumentError, match="setting 'trainer'"):
        conditioner.on(other)
