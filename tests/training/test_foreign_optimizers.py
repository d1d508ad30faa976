"""Optimisers of other libraries: what they hold after a rescaling, and which are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import pathlift
from pathlift.errors import ArgumentError
from pathlift.tensors.rescale import multiply_
from pathlift.training import rescale_average_, state_changes
from training.frameworks import importorskip

ROWS = torch.tensor([[-2.0], [0.0], [3.0], [1.0]], dtype=torch.float64)
ALL = torch.tensor([[3.0]], dtype=torch.float64)
# Name in timm -> options without what is no function of single entries (clipping by norms) and
# with floors far below the gradients.
TIMM: dict[str, dict[str, Any]] = {
    "adamwlegacy": {"amsgrad": True},
    "nadamw": {},
    "nadamlegacy": {},
    "radamlegacy": {},
    "adamp": {},
    "adan": {},
    "adabelief": {"amsgrad": True, "eps": 1e-30},
    "adopt": {"eps": 1e-12},
    "laprop": {"eps": 1e-30},
    "lamb": {"max_grad_norm": None},
    "lars": {"momentum": 0.9},
    "lion": {},
    "mars": {"gamma": 1e-3},
    "sgdw": {"momentum": 0.9},
    "sgdp": {"momentum": 0.9},
    "rmsproptf": {"alpha": 1e-30, "momentum": 0.9, "eps": 1e-30},
    "adafactor": {
        "scale_parameter": False,
        "clip_threshold": 1e9,
        "betas": (0.9, 0.99),
        "eps": 1e-60,
    },
    "adafactorbv": {"clipping_threshold": None, "eps": 1e-60},
    "muon": {"use_fallback": True},
    "lookahead_lion": {},
}
# One number for many entries: follows where all of them move alike.
ALIKE: dict[str, dict[str, Any]] = {
    "novograd": {"eps": 1e-30},
    "adafactor": {
        **TIMM["adafactor"],
        "min_dim_size_to_factor": 2,
    },
    "adafactorbv": {**TIMM["adafactorbv"], "min_dim_size_to_factor": 2},
}


def stepped(name: str, options: dict[str, Any], factor: Tensor) -> tuple[Any, Any]:
    """``theta 2^k`` and its optimiser, which has seen gradients ``g_t 2^-k``."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    parameter = nn.Parameter(start * factor)
    rest = {k: v for k, v in options.items() if k != "use_fallback"}
    group = {"params": [parameter], **({"use_fallback": True} if rest != options else {})}
    make = importorskip("timm.optim").create_optimizer_v2
    optimizer = make([group], opt=name, lr=0.01, weight_decay=0.0, **rest)
    for _ in range(7):
        gradient = 1e-3 * torch.randn(4, 4, generator=generator, dtype=torch.float64)
        parameter.grad = gradient / factor
        optimizer.step()
    return parameter, optimizer


TIMM_MATRICES = {"muon": {}}  # the buffer sums gradients; what is made of it is not kept
CASES = [(n, o, ROWS) for n, o in [*TIMM.items(), *TIMM_MATRICES.items()]] + [
    (n, o, ALL) for n, o in ALIKE.items()
]


@pytest.mark.parametrize(("name", "options", "factors"), CASES)
def test_state_is_what_the_new_coordinates_would_hold(
    name: str, options: dict[str, Any], factors: Tensor
) -> None:
    parameter, optimizer = stepped(name, options, torch.ones(1, 1, dtype=torch.float64))
    _, other = stepped(name, options, torch.exp2(factors))
    # Lookahead's own state is empty: it stands with the optimiser that it wraps.
    inner, beyond = (getattr(o, "_base_optimizer", o) for o in (optimizer, other))
    slow = inner.state[parameter].get("lookahead_slow_buff")
    kept = None if slow is None else slow.clone()
    changes = state_changes(optimizer, [("w", parameter, [factors])])
    for tensor, exponents, power in changes:
        multiply_(tensor, exponents, power)
    (state,), (expected,) = inner.state.values(), beyond.state.values()
    assert state.keys() == expected.keys() and (changes or not state)
    for key, value in state.items():
        if key == "lookahead_slow_buff":  # a point among the weights
            assert torch.equal(value, kept * torch.exp2(factors))
        elif key != "RMS" and isinstance(value, Tensor):
            assert torch.allclose(value.double(), expected[key].double(), rtol=1e-6, atol=0), key


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("madgrad", {}, "MADGRAD puts the weights at a distance"),
        ("adamuon", {}, "Muon keeps state 'exp_avg_sq' for 'w', and how it transforms"),
        ("novograd", {}, "'exp_avg_sq' for 'w', a mean over several entries"),
        ("adafactor", {"min_dim_size_to_factor": 2}, "'exp_avg_sq_row' for 'w', a mean over"),
        ("adafactorbv", {"min_dim_size_to_factor": 2}, "'exp_avg_sq_r' for 'w', a mean over"),
    ],
)
def test_what_cannot_follow_is_named(name: str, options: dict[str, Any], words: str) -> None:
    parameter, optimizer = stepped(name, options, torch.ones(1, 1, dtype=torch.float64))
    with pytest.raises(ArgumentError, match=words):
        state_changes(optimizer, [("w", parameter, [ROWS])])


def pretended(name: str) -> type[optim.SGD]:
    """A class of that full name."""
    module, _, own = name.rpartition(".")
    return type(own, (optim.SGD,), {"__module__": module})


def network() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)), torch.randn(8, 4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bitsandbytes.optim.adam.Adam8bit", "Adam8bit keeps its state in blocks of few bits"),
        ("torchao.optim.adam.Adam4bit", "Adam4bit keeps its state in blocks of few bits"),
        ("timm.optim.kron.Kron", "Kron keeps factors of a matrix"),  # the real one compiles first
    ],
)
def test_what_mixes_entries_is_refused_after_a_step(name: str, words: str) -> None:
    model, x = network()
    optimizer = pretended(name)(model.parameters(), lr=0.1, momentum=0.9)
    pathlift.condition_(model, x, optimizer=optimizer)  # nothing to carry yet
    model(x).square().mean().backward()
    optimizer.step()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=words):
        pathlift.condition_(model, x, optimizer=optimizer)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


@pytest.mark.parametrize(
    "name",
    [
        "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer",
        "apex.fp16_utils.x.FP16_Optimizer",
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_copies_of_the_weights_are_refused_at_once(name: str, wrapped: bool) -> None:
    model, x = network()
    optimizer: Any = pretended(name)(model.parameters(), lr=0.1)
    if wrapped:
        holder = optim.SGD(model.parameters(), lr=0.1)
        holder.optimizer, optimizer = optimizer, holder
    with pytest.raises(
        ArgumentError, match="trains copies of the weights.*Condition the model before"
    ):
        pathlift.condition_(model, x, optimizer=optimizer)


def test_schedule_free_points_move_with_the_weights() -> None:
    model, x = network()
    kind = pretended("schedulefree.adamw_schedulefree.AdamWScheduleFree")
    optimizer = kind(model.parameters(), lr=0.1)
    for p in model.parameters():
        optimizer.state[p] = {"z": p.detach().clone(), "exp_avg_sq": torch.ones_like(p)}
    report = pathlift.condition_(model, x, optimizer=optimizer)
    assert report.log2_scales.any()
    assert all(torch.equal(optimizer.state[p]["z"], p) for p in model.parameters())
    moves = {m.name: torch.exp2(-2 * m.exponents()) for m in report.moves}
    for n, p in model.named_parameters():
        assert torch.equal(optimizer.state[p]["exp_avg_sq"].double(), moves[n])


def test_another_models_optimiser_is_noticed() -> None:
    (model, x), (other, _) = network(), network()
    optimizer = optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    other(x).square().mean().backward()
    optimizer.step()
    with pytest.raises(ArgumentError, match="SGD holds none of the model's parameters that move"):
        pathlift.condition_(model, x, optimizer=optimizer)


@pytest.mark.parametrize("kind", ["ModelEma", "ModelEmaV2", "ModelEmaV3"])
def test_timms_averages(kind: str) -> None:
    model, x = network()
    average = getattr(importorskip("timm.utils"), kind)(model)
    group = pathlift.rescaling_group(model, x)
    report = pathlift.condition_(model, x)
    rescale_average_(average, group, report.log2_scales)
    held = average.ema if kind == "ModelEma" else average.module
    assert all(
        torch.equal(a, p) for a, p in zip(held.parameters(), model.parameters(), strict=True)
    )


def test_an_optimiser_of_keras_is_refused_in_words() -> None:
    model, x = network()
    optimizer = type("Adam", (), {"__module__": "keras.src.optimizers.adam"})()
    with pytest.raises(
        ArgumentError, match=r"Adam is an optimiser of Keras.*before the first step"
    ):
        pathlift.condition_(model, x, optimizer=optimizer)
