"""Experiments write what they say; every cell of theirs can be built."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pathlift.cli import main
from pathlift.experiments import reproduce
from pathlift.experiments.architectures import build, data_for
from pathlift.experiments.data import Data
from pathlift.experiments.reproduce import EXPERIMENTS, Run, stem_of, write, write_index
from pathlift.experiments.store import Store
from pathlift.experiments.study import interleaved
from pathlift.experiments.sweep import Place

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")
SHAPES = {
    "python-manual": ((64,), 96),
    "photographs": ((64,), 0),
    "two-moons": ((2,), 2),
    "digits": ((64,), 10),
    "digits-pixelwise": ((64,), 10),
    "cifar10": ((3, 32, 32), 10),
    "mnist": ((1, 28, 28), 10),
    "fashion-mnist": ((1, 28, 28), 10),
}
TRAINING = [name for name in EXPERIMENTS if name not in ("scales", "cost")]


def _tiny(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiment as it is, with two architectures, two seeds and two epochs."""
    experiment = EXPERIMENTS[name]

    def studies(small: bool) -> dict[str, reproduce.Study]:
        found = {}
        for suffix, study in experiment.studies(small).items():
            family = dict(sorted(study.family.items())[-2:])
            shorter = {
                **study.grid,
                "seeds": range(2),
                "epochs": 2,
                "samples": 128,
                "rates": list(study.grid["rates"])[:2],
                "methods": ("baseline", "path"),
            }
            found[suffix] = replace(study, family=family, grid=shorter, shown=max(family))
        return found

    monkeypatch.setitem(EXPERIMENTS, name, replace(experiment, studies=studies))


@pytest.mark.parametrize("small", [True, False], ids=["small", "full"])
@pytest.mark.parametrize("name", TRAINING)
def test_every_cell_can_be_built(name: str, small: bool) -> None:
    for study in EXPERIMENTS[name].studies(small).values():
        cells = study.cells()
        assert len({c.key for c in cells}) == len(cells) > 0
        assert study.shown in study.family
        methods = {c.method for c in cells}
        assert "baseline" in methods and methods & {"path", "path-continuous"}
        largest = max(cells, key=lambda c: (len(c.architecture), c.architecture))
        shape, classes = SHAPES[largest.data]
        inputs = torch.zeros(2, *shape)
        if largest.data == "python-manual":
            inputs = inputs.long()
        data = Data(largest.data, inputs, torch.zeros(2).long(), classes)
        data = data_for(largest.architecture, data)
        network = build(largest.architecture, data, batch_norm=largest.norm)
        assert network(data.inputs).shape[0] == 2


def test_the_experiments_are_there() -> None:
    assert list(EXPERIMENTS) == [
        "two-moons",
        "fully-connected",
        "fully-convolutional",
        "resnet",
        "autoencoder",
        "optimizers",
        "exact",
        "when",
        "left-out",
        "left-out-again",
        "left-out-third",
        "left-out-fourth",
        "scales",
        "cost",
    ]


@pytest.mark.parametrize("name", ["two-moons", "autoencoder"])
def test_figures_table_command_and_findings(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tiny(name, monkeypatch)
    result = write(name, True, Run(tmp_path, Place(), progress=lambda text: None))
    for file, _ in result.figures:
        assert (tmp_path / f"{file}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in (tmp_path / f"{file}.svg").read_text()
    with (tmp_path / f"{name}.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 1 + 2 * 2 and len({len(r) for r in rows}) == 1
    with (tmp_path / f"{name}-2.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 1 + 2 * 2 and rows[0][1] == "rate"  # two architectures, two rates
    text = (tmp_path / f"{name}.md").read_text()
    assert f"    pathlift reproduce {name} --small\n" in text
    assert all(f"({file}.png)" in text for file, _ in result.figures)
    assert text.count("(imbalance ") == len(result.findings) >= 2
    (tmp_path / "discussion.md").write_text("Our own words.\n")
    index = write_index(tmp_path).read_text()
    assert index.index("Our own words.") < index.index(f"## {EXPERIMENTS[name].title}")
    assert str(tmp_path) not in index


def test_scales_match_the_theory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "scales", "--small", "-o", str(tmp_path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data == {"index": str(tmp_path / "README.md"), "experiments": ["scales"]}
    with (tmp_path / "scales.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert len(rows) == 18 and head[2:4] == ["rms log2 scale, predicted", "solved"]
    for row in rows:
        assert float(row[3]) == pytest.approx(float(row[2]), abs=0.8)
        assert float(row[5]) <= float(row[4]) + 1e-3
    widths = [float(r[3]) for r in rows[:9]]
    assert min(widths[0], widths[8]) > 1.5 * widths[4]


def test_training_alone_writes_cells_that_a_later_call_writes_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("fully-connected", "optimizers"):
        _tiny(name, monkeypatch)
    words = ["reproduce", "--small", "-o", str(tmp_path)]
    assert main([*words, "--train", "--json", "fully-connected", "optimizers"]) == 0
    found = json.loads(capsys.readouterr().out)
    cells = list((tmp_path / ".cells").glob("*.parquet"))
    assert found["experiments"] == ["fully-connected", "optimizers"]
    assert found["finished"] == len(cells) == 2 * 8 + 2 * 8
    assert [p.name for p in tmp_path.iterdir()] == [".cells"]
    # A network that was cut short is left out; the others are written up.
    study = EXPERIMENTS["fully-connected"].studies(True)[""]
    for cell in study.cells():
        if cell.architecture == study.family[8.0]:
            (tmp_path / ".cells" / f"{cell.key}.parquet").unlink()
    assert main([*words, "--finished", "fully-connected"]) == 0
    with (tmp_path / "fully-connected.csv").open(newline="") as file:
        _, *rows = csv.reader(file)
    assert [float(r[0]) for r in rows] == [7.0] * 2
    # A seed that is not complete is kept, though it is not written up.
    pack = tmp_path / "fully-connected.cells.parquet"
    whole = Store(tmp_path / "none", [pack]).keys()
    first = next(c for c in study.cells() if c.key in whole and c.seed == 1)
    (tmp_path / ".cells" / f"{first.key}.parquet").unlink()
    pack.unlink()
    assert main([*words, "--finished", "fully-connected"]) == 0
    assert Store(tmp_path / "none", [pack]).keys() == whole - {first.key}
    text = (tmp_path / "README.md").read_text()
    assert EXPERIMENTS["fully-connected"].title in text
    assert f"Not trained yet: {study.family[8.0]} (digits, sgd, batch norm)." in text
    assert "trained on an" not in text  # a CPU needs no mention


def test_networks_of_all_studies_take_turns() -> None:
    studies = list(EXPERIMENTS["fully-connected"].studies(False).values())
    turns = dict.fromkeys((c.architecture.count("-") + 1, c.norm) for c in interleaved(studies))
    assert list(turns) == [(3, True), (3, False), (8, True), (8, False), (5, True), (5, False)]
    assert {c.key for c in interleaved(studies)} == {c.key for s in studies for c in s.cells()}


def test_the_full_form_stands_beside_the_small_one() -> None:
    assert stem_of("autoencoder", True) == "autoencoder"
    assert stem_of("autoencoder", False) == "autoencoder-full"
    assert stem_of("when", False) == stem_of("when", True) == "when"


def test_data_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "resnet", "-o", str(tmp_path)]) == 1
    assert "cifar10 is read from files" in capsys.readouterr().err
