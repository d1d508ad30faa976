"""The table of what every setting gained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from pathlift.experiments import when
from pathlift.experiments.architectures import build, data_for, widths_of
from pathlift.experiments.data import load
from pathlift.experiments.study import Run
from pathlift.experiments.summary import Runs, Setting
from pathlift.experiments.sweep import Place
from pathlift.experiments.when import contrasts, entry, studies


def _runs(levels: list[float], imbalance: float) -> Runs:
    seeds = np.linspace(-0.01, 0.01, 5)
    final = np.array(levels)[:, None] + seeds
    nothing = np.zeros((len(levels), 5, 1))
    return Runs({"loss": final[..., None]}, np.zeros(5), nothing, 1.0, np.full(5, imbalance))


def _entry(baseline: list[float], method: list[float]) -> dict:
    runs = {"baseline": _runs(baseline, 0.7), "path-continuous": _runs(method, 0.2)}
    rates = [0.1, 0.15, 0.225]
    setting = Setting("mlp:256-16-64", "digits", "sgd", rates, list(range(5)), 1, 100, runs)
    cell = replace(contrasts()["-equal-sgd"].cells()[0], architecture="mlp:256-16-64")
    return entry(setting, cell, 0.7)


def test_gains_are_shares_of_the_baselines_loss() -> None:
    found = _entry([2.0, 1.0, 1.5], [0.8, 0.9, 1.6])
    assert found["width_ratio"] == 16 and not found["batch_norm"]
    assert found["imbalance_before"] == pytest.approx(0.7) and found["baseline_rate"] == 0.15
    method = found["methods"]["path-continuous"]
    assert method["imbalance_after"] == pytest.approx(0.2)
    assert method["rate_ratio"] == pytest.approx(0.1 / 0.15)
    kinds = ("own_best_rates", "baseline_best_rate", "matched_rate", "smallest_rate")
    # Stable rates change by 0.7, so 0.1 is the grid's rate that matches 0.15 of the baseline.
    assert [method[k]["gain"] for k in kinds] == pytest.approx([0.2, 0.1, 0.2, 0.6])
    own = method["own_best_rates"]
    assert own["sign"] == 1 and own["interval"][0] <= own["gain"] <= own["interval"][1]
    assert (
        _entry([1.0] * 3, [1.3] * 3)["methods"]["path-continuous"]["own_best_rates"]["sign"] == -1
    )


def test_a_setting_that_diverges_has_no_number_in_the_json() -> None:
    found = _entry([2.0, 1.0, 1.5], [np.inf, np.inf, np.inf])
    assert "Infinity" not in json.dumps(when.plain([found])) and "NaN" not in json.dumps(
        when.plain([found])
    )


@pytest.mark.parametrize(
    "name", ["mlp:7-3-5", "autoencoder:9-4-2", "convolutional:4", "resnet18:2"]
)
def test_widths_are_those_of_the_network(name: str) -> None:
    data = load("digits")
    model = build(name, data_for(name, data))
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    outputs = [m.weight.shape[0] for m in layers[:-1]]
    assert set(widths_of(name)) == set(outputs)
    if "resnet" not in name:
        assert widths_of(name) == outputs


def test_every_contrast_can_be_built_and_small_needs_no_files() -> None:
    for study in contrasts().values():
        cell = study.cells()[0]
        data = load(cell.data)
        data = data_for(cell.architecture, data)
        build(cell.architecture, data, batch_norm=cell.norm)
    assert {c.data for s in studies(True).values() for c in s.cells()} == {
        "digits",
        "digits-pixelwise",
        "python-manual",
    }
    assert {c.data for s in studies(False).values() for c in s.cells()} > {"mnist"}


def test_the_file_is_written(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    study = when._study(
        "mlp:6-2-6", "adam", [0.01], data=("two-moons",), seeds=range(1), epochs=1, samples=128
    )
    run = Run(tmp_path, Place(), progress=lambda text: None)
    result = when.experiment("when", {"-moons": study}, run)
    (found,) = json.loads((tmp_path / "when.json").read_text())
    assert set(found["methods"]) == {"path-continuous", "path-root", "path-first"}
    assert found["width_ratio"] == 3
    assert len(result.tables[0].lines) == 3 and len(result.findings) == 3
    assert result.findings[1].startswith("Continuous against powers of two: ")
