"""Advice: the rule, what it reads off a model, what it measures, and that nothing is changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from pathlift.advice import DONT, LIKELY, NOTHING, VERDICTS, Facts, advise, judge, optimizer_kind
from pathlift.condition import condition_
from pathlift.errors import ArgumentError
from pathlift.experiments.architectures import autoencoder, mlp

WHEN = Path(__file__).parents[1] / "docs" / "reproduced" / "when.json"
GOOD = Facts(100, 0.7, 0.2, 16.0, optimizer="sgd")


@pytest.mark.parametrize(
    ("change", "verdict", "said"),
    [
        ({}, LIKELY, "Widths change (16 times)"),
        ({"optimizer": "unknown"}, LIKELY, "Widths change (16 times)"),
        ({"num_scales": 0}, NOTHING, "No channel can be rescaled"),
        ({"imbalance_after": 0.69}, NOTHING, "would fall from 0.700 to 0.690 only"),
        ({"convolutions": 0.9}, NOTHING, "Most weights are convolutions"),
        ({"width_ratio": 1.0}, NOTHING, "All widths are about equal"),
        ({"batch_norms": 0.8}, DONT, "Batch norms divide a scale out again"),
        ({"other_norms": 0.5}, DONT, "2.17 in place of 1.25"),
        ({"attention": True}, DONT, "2.17 in place of 1.25"),
        ({"optimizer": "adaptive"}, NOTHING, "Adam and its kin take steps of one size"),
        ({"optimizer": "muon"}, NOTHING, "no run with it"),
        ({"batch_norms": 0.8, "num_scales": 0}, NOTHING, "No channel can be rescaled"),
        ({"other_norms": 0.5, "optimizer": "adaptive"}, DONT, "a two-layer Llama"),
    ],
)
def test_the_rule(change: dict, verdict: str, said: str) -> None:
    found = judge(replace(GOOD, **change))
    assert found.verdict == verdict and said in found.reasons[0]
    assert ("search again" in found.rate) == (verdict == LIKELY)
    assert found.verdict in VERDICTS and str(found).startswith(f"conditioning: {verdict}\n")


def test_remarks_say_what_is_odd() -> None:
    assert any("2^27" in r for r in judge(replace(GOOD, span=27.0)).reasons)
    assert any("Pass optimizer=" in r for r in judge(replace(GOOD, optimizer="unknown")).reasons)
    assert not any("Pass optimizer=" in r for r in judge(GOOD).reasons)


def test_an_autoencoder_is_read_and_left_alone() -> None:
    torch.manual_seed(0)
    model, x = autoencoder((12, 32, 4, 32, 12)), torch.randn(2, 12)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    found = advise(model, x, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert found.verdict == LIKELY and found.facts.optimizer == "sgd"
    assert found.facts.width_ratio == 8 and found.facts.num_scales == 32 + 4 + 32
    # The facts are the report's, and the settings are condition_'s.
    report = condition_(model, x, **found.settings)
    assert report.imbalance_before == pytest.approx(found.facts.imbalance_before)
    assert report.imbalance_after == pytest.approx(found.facts.imbalance_after, abs=1e-6)
    assert report.log2_scales.dtype == torch.float64
    again = advise(model, x, "sgd")
    assert again.verdict == NOTHING and "only; falls this small" in again.reasons[0]


def test_norms_and_attention_are_seen_fused_and_taken_apart() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Linear(6, 24), nn.Linear(24, 6)
            self.gain = nn.Parameter(torch.ones(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain
            return self.out(torch.relu(self.into(x)))

    x = torch.randn(2, 6)
    assert advise(mlp((6, 24, 3, 6), batch_norm=True), x, "sgd").verdict == DONT
    assert advise(nn.Sequential(Root(), Root()), x, "adamw").verdict == DONT
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert advise(block, torch.randn(2, 3, 8), "adamw").verdict == DONT
    assert advise(nn.Linear(6, 2), x, "sgd").verdict == NOTHING


def test_curvature_is_measured_on_the_data() -> None:
    torch.manual_seed(0)
    model, x = autoencoder((12, 32, 4, 32, 12)), torch.randn(64, 12)
    loader = [(x[:32], x[:32]), (x[32:], x[32:])]
    found = advise(model, x[:2], "sgd", data=(iter(loader), mse_loss))  # read once
    assert found.before is not None and found.after is not None
    assert found.before.largest != pytest.approx(found.after.largest, rel=1e-2)
    assert found.rate_factor == pytest.approx(found.before.largest / found.after.largest)
    assert any("largest stable rate" in r for r in found.reasons)
    assert f"{found.rate_factor:.2g} times" in found.rate
    data = json.loads(json.dumps(found.to_dict()))
    assert data["verdict"] == LIKELY and data["rate_factor"] == found.rate_factor
    assert data["before"]["largest"] == found.before.largest
    assert advise(model, x[:2], "sgd").to_dict()["rate_factor"] is None


def test_optimisers_are_known_by_their_names() -> None:
    parameters = [nn.Parameter(torch.zeros(2, 2))]
    for given, kind in (
        (torch.optim.AdamW(parameters), "adaptive"),
        (torch.optim.SGD(parameters, lr=0.1, momentum=0.9), "sgd"),
        ("Lion", "adaptive"),
        ("muon", "muon"),
        ("shampoo", "unknown"),
        (None, "unknown"),
    ):
        assert optimizer_kind(given) == kind


def test_what_is_wrong_is_said() -> None:
    model, x = mlp((3, 4, 2)), torch.zeros(2, 3)
    with pytest.raises(ArgumentError, match="model must be a torch.nn.Module; found int"):
        advise(3, x)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="optimizer must be .* found float"):
        advise(model, x, 0.1)  # type: ignore[arg-type]
    for data in ([(x, x)], (mse_loss, [(x, x)]), (x,)):
        with pytest.raises(ArgumentError, match=r"data must be \(loader, loss\)"):
            advise(model, x, data=data)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="data has no batches"):
        advise(model, x, data=([], mse_loss))


def _facts(entry: dict) -> Facts:
    """What advise() would know of a setting of the table."""
    after = entry["methods"]["path-continuous"]["imbalance_after"]
    return Facts(
        1,
        entry["imbalance_before"],
        after,
        entry["width_ratio"],
        batch_norms=1.0 if entry["batch_norm"] else 0.0,
        convolutions=1.0 if entry["architecture"].startswith("convolutional") else 0.0,
        optimizer=optimizer_kind(entry["optimizer"]),
    )


# Settings of the table on which the rule is wrong: with the verdict, and the gain's sign.
MISSES = {
    ("autoencoder:128-32-8", "adamw", "pytorch", NOTHING, 1),
    ("convolutional:8", "sgd", "kaiming-normal", NOTHING, -1),
    ("convolutional:8", "sgd", "pytorch", NOTHING, -1),
    ("mlp:16-256-16", "sgd", "pytorch", LIKELY, 0),
}


def test_the_rule_agrees_with_the_runs_it_rests_on() -> None:
    keys = ("architecture", "data", "optimizer", "batch_norm", "initialization")
    best: dict[tuple, dict] = {}  # of equal settings, the one with the most seeds
    for entry in json.loads(WHEN.read_text(encoding="utf-8")):
        kept = best.setdefault(tuple(entry[k] for k in keys), entry)
        if entry["seeds"] > kept["seeds"]:
            best[tuple(entry[k] for k in keys)] = entry
    assert len(best) > 8
    wrong = set()
    for entry in best.values():
        sign = entry["methods"]["path-continuous"]["own_best_rates"]["sign"]
        verdict = judge(_facts(entry)).verdict
        right = {LIKELY: sign == 1, NOTHING: sign == 0, DONT: sign in (0, -1)}[verdict]
        if sign is not None and not right:
            names = (entry["architecture"], entry["optimizer"], entry["initialization"])
            wrong.add((*names, verdict, sign))
    assert wrong == MISSES
