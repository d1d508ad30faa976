"""Models out of the ordinary: each works, with every bit kept, or raises a worded error."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

import pathlift
from pathlift.capture.inputs import tensors_in


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...]


class Pair(NamedTuple):
    one: Tensor
    two: Tensor


class Returns(nn.Module):
    """Two linear layers; what is returned is up to ``kind``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> object:
        y = self.b(F.relu(self.a(x)))
        return {
            "dataclass": Output(y, (y + y, y * 2)),
            "dict": {"y": y, "none": None},
            "ordered": OrderedDict(y=y),
            "named": Pair(y, y.abs()),
            "nested": [(y, {"z": [y]}), None],
            "with a number": (y, 3.0),
        }[self.kind]


def same(model: nn.Module, before: list[Tensor], *args: object, **kwargs: object) -> bool:
    torch.manual_seed(1)
    with torch.no_grad():
        after = tensors_in(model(*args, **kwargs))
    return len(after) == len(before) > 0 and all(map(torch.equal, before, after))


def outputs(model: nn.Module, *args: object, **kwargs: object) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return [t.clone() for t in tensors_in(model(*args, **kwargs))]


def rescaled(model: nn.Module, x: object) -> pathlift.ConditioningReport:
    group = pathlift.rescaling_group(model, x)
    assert group.num_scales > 0
    group.rescale_(model, torch.arange(group.num_scales) % 7 - 3)
    return pathlift.condition_(model, x, exact=True)


@pytest.mark.parametrize(
    "kind", ["dataclass", "dict", "ordered", "named", "nested", "with a number"]
)
def test_outputs_of_any_structure(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Returns(kind), torch.randn(5, 3)
    before = outputs(model, x)
    report = rescaled(model, x)
    assert report.num_scales == 4 and report.max_output_change == 0.0
    assert same(model, before, x)


def test_keyword_arguments_and_defaults() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, *, extra: Tensor | None = None, twice: bool = False) -> Tensor:
            h = self.a(x) if extra is None else self.a(x) + self.b(extra)
            h = F.relu(h)
            return self.c(h + h if twice else h)

    torch.manual_seed(0)
    model = Keywords()
    inputs = {"x": torch.randn(5, 3), "extra": torch.randn(5, 2)}
    before = outputs(model, **inputs)
    rescaled(model, inputs)
    assert same(model, before, **inputs)
    alone = Keywords()
    before = outputs(alone, inputs["x"])
    group = pathlift.rescaling_group(alone, inputs["x"])
    assert "b.weight" in group.summary() and "not used by the model" in group.summary()
    rescaled(alone, inputs["x"])
    assert same(alone, before, inputs["x"])


@pytest.mark.parametrize("training", [True, False])
def test_branches_on_the_mode(training: bool) -> None:
    """A rescaling must hold in both modes, also where the code differs between them."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.a(x))
            if not self.training:
                h = torch.cat([torch.sigmoid(h[:, :2]), h[:, 2:]], 1)
            return self.b(h)

    torch.manual_seed(0)
    model, x = Branch().train(training), torch.randn(5, 3)
    assert pathlift.rescaling_group(model, x).num_scales == 2
    before = [outputs(model.train(mode), x) for mode in (False, True)]
    rescaled(model.train(training), x)
    assert model.training == training
    assert all(same(model.train(mode), before[mode], x) for mode in (False, True))


def test_frozen_batch_norm_in_a_model_that_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)
    )
    model[1].eval()
    modes = [m.training for m in model.modules()]
    x = torch.randn(4, 2, 5, 5)
    twin = copy.deepcopy(model)
    before = outputs(twin, x)
    rescaled(model, x)
    assert [m.training for m in model.modules()] == modes
    assert same(model, before, x)


@pytest.mark.parametrize("wrap", ["weight_norm", "old_weight_norm", "spectral_norm", "orthogonal"])
def test_parametrised_weights(wrap: str) -> None:
    torch.manual_seed(0)
    apply = {
        "weight_norm": nn.utils.parametrizations.weight_norm,
        "old_weight_norm": nn.utils.weight_norm,
        "spectral_norm": nn.utils.parametrizations.spectral_norm,
        "orthogonal": nn.utils.parametrizations.orthogonal,
    }[wrap]
    model = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), apply(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2)
    ).eval()
    x = torch.randn(5, 3)
    before = outputs(model, x)
    rescaled(model, x)
    assert same(model, before, x)


def test_pruned_weights_keep_their_masks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    nn.utils.prune.random_unstructured(model[0], "weight", 0.5)
    nn.utils.prune.ln_structured(model[2], "weight", 0.5, n=2, dim=0)
    x = torch.randn(5, 3)
    before, mask = outputs(model, x), model[0].weight_mask.clone()
    report = rescaled(model, x)
    assert report.num_scales == 6
    assert same(model, before, x) and torch.equal(model[0].weight_mask, mask)


def test_tied_and_doubly_registered_parameters() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 3)
            self.alias = self.one
            self.two = nn.Linear(3, 3)
            self.two.weight = self.one.weight
            self.out = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.relu(self.two(x)) + F.relu(self.alias(x)))

    torch.manual_seed(0)
    model, x = Tied(), torch.randn(5, 3)
    before = outputs(model, x)
    assert rescaled(model, x).num_scales == 3
    assert same(model, before, x)
    assert model.two.weight is model.one.weight and model.alias is model.one


def test_a_lazy_model_after_its_first_batch() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2)), torch.randn(5, 3)
    with pytest.raises(pathlift.CaptureError, match="its module is lazy. Run the model once"):
        pathlift.condition_(model, x)
    before = outputs(model, x)
    rescaled(model, x)
    assert same(model, before, x)


def test_frozen_parameters_move_but_do_not_count() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)
    model[0].requires_grad_(False)
    before, weight = outputs(model, x), model[0].weight.clone()
    report = pathlift.condition_(model, x, exact=True)
    assert report.num_parameters == 10 and same(model, before, x)
    assert not torch.equal(model[0].weight, weight) or not report.log2_scales.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype)
    x = torch.randn(5, 3).to(dtype)
    before = outputs(model, x)
    report = pathlift.condition_(model, x)
    assert report.max_output_change == 0.0 and same(model, before, x)


def test_integer_parameters_and_other_tensors_are_left_alone() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
            self.steps = nn.Parameter(torch.tensor([3]), requires_grad=False)
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return self.b(F.relu(self.a(x))) * self.steps

    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(5, 3)
    before = outputs(model, x)
    count = int(model.count)
    rescaled(model, x)
    assert int(model.count) == count and int(model.steps) == 3
    assert same(model, before, x)


def test_gradients_hooks_and_random_state_are_as_before() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 2)), None
    x = torch.randn(5, 3)
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    model(x).sum().backward()
    seen, gradient = len(calls), model[0].weight.grad.clone()
    state = torch.get_rng_state()
    with torch.no_grad():
        pathlift.condition_(model, x, verify=False)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), state)
    assert model[0].weight.requires_grad and len(model[0]._forward_hooks) == 1
    assert torch.equal(model[0].weight.grad, gradient)
    model(x)
    assert len(calls) > seen


def test_a_model_without_scales_is_reported_not_changed() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)), torch.randn(5, 3)
    state = copy.deepcopy(model.state_dict())
    report = pathlift.condition_(model, x)
    assert report.num_scales == 0 and report.unsupported == {"gelu": 1}
    assert report.imbalance_before == report.imbalance_after
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert "pinned by" in str(report)


def test_no_parameters_at_all() -> None:
    report = pathlift.condition_(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.randn(2, 3))
    assert report.num_scales == 0 and report.num_parameters == 0
