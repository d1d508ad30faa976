"""Advice: the rule, what it reads off a model, what it measures, and that nothing is changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from measured import of, shares, signs
from pathlift.advice import RATE_RATIOS, advise, judge
from pathlift.condition import condition_
from pathlift.errors import ArgumentError
from pathlift.experiments.architectures import autoencoder, mlp
from pathlift.verdict import DONT, LIKELY, NOTHING, Facts

WHEN = Path(__file__).parents[1] / "docs" / "reproduced" / "when.json"
GOOD = Facts(100, 0.7, 0.2, 16.0, optimizer="sgd")
NORMS = replace(GOOD, batch_norms=1.0)


def test_remarks_say_what_is_odd() -> None:
    assert any("2^27" in r for r in judge(replace(GOOD, span=27.0)).reasons)
    assert any("Pass optimizer=" in r for r in judge(replace(GOOD, optimizer="unknown")).reasons)
    assert not any("Pass optimizer=" in r for r in judge(GOOD).reasons)


def test_the_rate_follows_the_verdict_and_the_optimiser() -> None:
    assert "search again, from an eighth to twice" in judge(GOOD).rate
    assert judge(GOOD).rate_ratio == RATE_RATIOS["sgd"]
    for ratio, start in (
        (8.0, "as without conditioning. If you"),
        (30.0, "search again: with Adam"),
    ):
        adam = judge(replace(GOOD, optimizer="adaptive", output_ratio=ratio))
        assert adam.rate.startswith(start) and adam.rate_ratio == RATE_RATIOS["adaptive"]
    assert judge(NORMS).rate_ratio == RATE_RATIOS["norms"]
    assert judge(NORMS).rate.startswith("search again, from half")
    muon = judge(replace(GOOD, optimizer="muon"))
    assert muon.rate == "as without conditioning." and muon.rate_ratio is None


def test_rates_are_the_measured_ones() -> None:
    """Of continuous scales; and what ENorm gained at the old best rate."""
    plain = ("wide", "wide, narrow", "wide, equal", "few outputs, changing", "few outputs, equal")
    norms = ("norms, changing", "norms, equal")
    for kind, (low, high) in RATE_RATIOS.items():
        optimizer = "adaptive" if kind == "adaptive" else "sgd"
        kinds = norms if kind == "norms" else plain
        found = [round(s.ratio, 2) for name in kinds for s in of(name, optimizer)]
        assert (min(found), max(found)) == (low, high), kind
    wide = [s for s in of("wide") if s.enorm_old is not None]
    gained = shares(wide, "enorm_old")
    assert signs(wide, "enorm_old")[2] == 0
    assert (
        f"{len(gained)} of {len(wide)} networks with wide outputs ended {gained[0]}% to "
        f"{gained[-1]}% lower"
    ) in judge(GOOD).rate
    behind = of("norms, changing")
    lost = signs(behind, "old")[2]
    assert f"{lost} of {len(behind)} networks ended higher" in judge(NORMS).rate


def test_batch_norms_want_a_batch() -> None:
    model = mlp((6, 24, 3, 6), batch_norm=True)
    said = "a channel has 2 values: too few"
    assert any(said in r for r in advise(model, torch.randn(2, 6), "sgd").reasons)
    assert not any("too few" in r for r in advise(model, torch.randn(16, 6), "sgd").reasons)
    model.train()(torch.randn(16, 6))  # they have seen a batch
    assert not any("too few" in r for r in advise(model, torch.randn(2, 6), "sgd").reasons)
    assert not any("too few" in r for r in advise(mlp((6, 9, 6)), torch.randn(2, 6)).reasons)


def test_frozen_parameters_are_spoken_of() -> None:
    model, x = mlp((3, 8, 2)), torch.zeros(2, 3)
    assert advise(model, x).frozen.startswith("nothing is.")
    model[0].requires_grad_(False)
    found = advise(model, x)
    assert found.facts.frozen == 32 / 50 and found.frozen.startswith("64% of the parameters")


def test_an_autoencoder_is_read_and_left_alone() -> None:
    torch.manual_seed(0)
    model, x = autoencoder((24, 32, 4, 32, 24)), torch.randn(2, 24)
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
    assert advise(mlp((6, 24, 24, 6), batch_norm=True), x, "sgd").verdict == DONT
    assert advise(mlp((6, 24, 3, 6), batch_norm=True), x, "sgd").verdict == LIKELY
    assert advise(nn.Sequential(Root(), Root()), x, "adamw").verdict == DONT
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert advise(block, torch.randn(2, 3, 8), "adamw").verdict == DONT
    assert advise(nn.Linear(6, 2), x, "sgd").verdict == NOTHING


def test_a_narrow_code_is_better_served_by_another_criterion() -> None:
    torch.manual_seed(0)
    model, x = autoencoder((12, 128, 2, 128, 12)), torch.randn(32, 12)
    found = advise(model, x, "sgd", data=([(x, x)], mse_loss))
    assert found.verdict == NOTHING and found.settings["criterion"] == "weight-norm"
    condition_(model, x, exact=False, verify=False, criterion="weight-norm")
    again = advise(model, x, "sgd", data=([(x, x)], mse_loss))  # what was measured is what it is
    assert again.before is not None and found.after is not None
    assert again.before.largest == pytest.approx(found.after.largest, rel=1e-3)


def test_curvature_is_measured_on_the_data() -> None:
    torch.manual_seed(0)
    model, x = autoencoder((24, 32, 4, 32, 24)), torch.randn(64, 24)
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
