"""Settings that were left out: told first, trained then, compared by what was told."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from pathlift.experiments import left_out, reproduce
from pathlift.experiments.compare import LABELS
from pathlift.experiments.exactness import CONTINUOUS, ENORM, NONE
from pathlift.experiments.judging import rank_auc
from pathlift.experiments.study import Run, Study
from pathlift.experiments.sweep import Place
from pathlift.verdict import DONT, LIKELY, NOTHING, VERDICTS

REPRODUCED = Path(__file__).parents[2] / "docs" / "reproduced"
SETS = (
    left_out.studies,
    left_out.studies_again,
    left_out.studies_third,
    left_out.studies_fourth,
)
TINY = {"seeds": range(2), "epochs": 1, "samples": 128}


def _tiny(architecture: str, optimizer: str) -> Study:
    return left_out._study(architecture, "digits", optimizer, (0.1, 0, 1), **TINY)


def _run(folder: Path) -> Run:
    return Run(folder, Place(), progress=lambda text: None)


def _what(entry: dict) -> tuple:
    keys = ("architecture", "data", "optimizer", "batch_norm", "initialization")
    return tuple(entry[k] for k in keys)


def test_nothing_left_out_is_behind_the_rule() -> None:
    seen = {_what(e) for e in json.loads((REPRODUCED / "when.json").read_text())}
    told = json.loads((REPRODUCED / left_out.FILE).read_text())
    assert set(told) == {s for studies in SETS for s in studies(False)}
    assert seen.isdisjoint(map(_what, told.values()))
    assert len(set(map(_what, told.values()))) == len(told)
    assert {t["verdict"] for t in told.values()} == set(VERDICTS)


def test_what_was_told_is_what_the_networks_have() -> None:
    told = json.loads((REPRODUCED / left_out.FILE).read_text())
    small = left_out.studies(True)
    found = left_out.told(small["-deep-kaiming"], Place())
    kept = told["-deep-kaiming"]
    assert found["imbalance_before"] == pytest.approx(kept["imbalance_before"], rel=1e-4)
    after = [e["methods"][CONTINUOUS]["imbalance_after"] for e in (found, kept)]
    assert after[0] == pytest.approx(after[1], abs=1e-3)
    assert {c.data for s in small.values() for c in s.cells()} == {"digits", "python-manual"}


def test_verdicts_are_there_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, train = [], left_out.stored

    def stored(study: Study, run: Run) -> list:
        there.append(set(json.loads((tmp_path / left_out.FILE).read_text())))
        return train(study, run)

    monkeypatch.setattr(left_out, "stored", stored)
    chosen = {"-a": _tiny("autoencoder:6-2", "sgd"), "-b": _tiny("mlp:4-4", "adam")}
    result = left_out.experiment("left-out", chosen, _run(tmp_path))
    assert there == [{"-a", "-b"}] * 2
    settings, counted = result.tables
    assert [line[settings.head.index("verdict")] for line in settings.lines] == [LIKELY, NOTHING]
    edges = ", ".join(LABELS[m] for m in (NONE, CONTINUOUS, ENORM))
    assert {line[-1] for line in settings.lines} == {edges}  # of two rates both are
    assert {line[settings.head.index("right")] for line in settings.lines} == {"too few seeds"}
    assert [int(line[1]) for line in counted.lines] == [0, 0, 0]
    assert result.findings[0].startswith("Of 0 settings told before they were trained")


def test_a_verdict_is_right_where_the_sign_is_what_it_promises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    promised = {LIKELY: {1}, NOTHING: {0}, DONT: {0, -1}}
    for verdict, sign in itertools.product(promised, (1, 0, -1, None)):
        monkeypatch.setattr(left_out, "gain_of", lambda *_, sign=sign: {"sign": sign})
        outcome = left_out.Outcome({"verdict": verdict}, Mock(rates=[1.0]))
        assert outcome.right is (None if sign is None else sign in promised[verdict])


def test_a_verdict_is_told_once(tmp_path: Path) -> None:
    study = _tiny("autoencoder:6-2", "sgd")
    run = _run(tmp_path)
    first = left_out.foretold({"-a": study}, run)["-a"]
    assert first["verdict"] == LIKELY and first["width_ratio"] == 3
    text = (tmp_path / left_out.FILE).read_text().replace(LIKELY, DONT)
    (tmp_path / left_out.FILE).write_text(text)
    again = left_out.foretold({"-a": study, "-b": replace(study)}, run)
    assert (again["-a"]["verdict"], again["-b"]["verdict"]) == (DONT, LIKELY)


def test_training_alone_tells_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = replace(
        reproduce.EXPERIMENTS["left-out"],
        studies=lambda small: {"-a": _tiny("autoencoder:6-2", "sgd")},
    )
    monkeypatch.setitem(reproduce.EXPERIMENTS, "left-out", found)
    there: list[bool] = []

    def train(cells: list, run: Run) -> list:
        there.append((tmp_path / left_out.FILE).exists())
        return []

    monkeypatch.setattr(reproduce, "train_cells", train)
    reproduce._train_only(["left-out"], True, _run(tmp_path))
    assert there == [True]


def test_ranks_of_verdicts() -> None:
    assert rank_auc([(LIKELY, True), (NOTHING, False), (DONT, False)]) == 1
    assert rank_auc([(NOTHING, True), (LIKELY, False), (NOTHING, False)]) == 0.25
    assert rank_auc([(DONT, True)]) != rank_auc([(DONT, True)])  # NaN without both kinds
