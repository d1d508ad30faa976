"""The comparison of methods at own best rates, and the decision drawn from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pathlift.experiments.exactness import Comparison, compare, decide, fine, studies, table
from pathlift.experiments.study import finished
from pathlift.experiments.summary import Runs, Setting

RATES, SEEDS = [0.1, 0.15, 0.225], 20


def _runs(levels: list[float], noise: float, own: float = 0.0) -> Runs:
    """Final losses ``level of the rate + noise of the seed (shared by all methods) + own``."""
    shared = np.random.default_rng(0).normal(0, noise, SEEDS)
    alone = np.random.default_rng(int(min(levels[0], 9) * 1e6)).normal(0, own, (len(levels), SEEDS))
    final = np.array(levels)[:, None] + shared + alone
    nothing = np.zeros((len(levels), SEEDS, 1))
    return Runs({"loss": final[..., None]}, np.zeros(SEEDS), nothing, 1.0, np.zeros(SEEDS))


def _setting(**levels: list[float]) -> Setting:
    runs = {n.replace("_", "-"): _runs(v, 0.2, 0.001) for n, v in levels.items()}
    return Setting("mlp:8", "digits", "sgd", RATES, list(range(SEEDS)), 1, 100, runs)


def _of(found: list[Comparison], method: str, other: str) -> Comparison:
    return next(c for c in found if (c.method, c.other) == (method, other))


def test_paired_differences_see_through_what_seeds_share() -> None:
    # Seeds differ by 0.2, methods by 0.02: only the pairing shows it.
    setting = _setting(baseline=[1.2, 1.0, 1.1], path=[1.1, 1.0, 1.0], path_continuous=[0.98, 1, 2])
    found = compare(setting)
    assert [(c.method, c.other) for c in found] == [
        ("path", "baseline"),
        ("path-continuous", "baseline"),
        ("path-continuous", "path"),
    ]
    gain = _of(found, "path-continuous", "baseline")
    assert gain.verdict == "better" and gain.loss == pytest.approx(-0.02, abs=0.001)
    assert gain.interval is not None and gain.interval[0] < gain.loss < gain.interval[1]
    assert _of(found, "path", "baseline").verdict == "no difference shown"
    cells = table(found).lines[1]
    assert cells[6] == "0.1 / 0.15" and cells[-1] == "better"
    assert cells[9].startswith("-2.") and cells[9].count("%") == 3


def test_the_decision_follows_the_intervals() -> None:
    better = compare(_setting(baseline=[1.0] * 3, path=[0.95] * 3, path_continuous=[0.9] * 3))
    said = decide(better)
    everywhere = "better or equal everywhere that was measured"
    assert said[0].startswith(f"Continuous against powers of two: {everywhere} (1 comparisons: ")
    assert said[1].startswith(f"Continuous against none: {everywhere}")
    worse = compare(_setting(baseline=[1.0] * 3, path=[0.9] * 3, path_continuous=[0.95] * 3))
    said = decide([*better, *worse])
    assert said[0].startswith("Continuous against powers of two: worse on mlp:8 on digits, sgd (2")
    assert "better in 1, worse in 1" in said[0] and "better in 2, worse in 0" in said[1]


def test_two_seeds_are_no_evidence() -> None:
    setting = _setting(baseline=[1.0] * 3, path=[0.9] * 3)
    few = {n: replace(r, curves={"loss": r.loss[:, :2]}) for n, r in setting.runs.items()}
    (found,) = compare(replace(setting, seeds=[0, 1], runs=few))
    assert found.verdict == "too few seeds" and found.loss == pytest.approx(-0.1, abs=0.01)
    assert "[" not in table([found]).lines[0][8]


def test_a_method_that_diverges_everywhere_is_worse_than_any() -> None:
    found = compare(_setting(baseline=[1.0] * 3, path_continuous=[np.inf] * 3))
    assert [c.verdict for c in found] == ["worse"]


def test_rates_are_a_factor_apart_and_small_is_a_part_of_full() -> None:
    assert fine(1, 2, 2) == [0.444, 0.667, 1.0, 1.5, 2.25]
    small, full = studies(True), studies(False)
    assert set(small) < set(full)
    keys = {c.key for s in full.values() for c in s.cells()}
    assert {c.key for s in small.values() for c in s.cells()} < keys
    assert all(
        len(s.grid["rates"]) >= 5
        and np.allclose(np.diff(np.log(s.grid["rates"])), np.log(1.5), atol=0.01)
        for s in full.values()
    )
    assert all(len(s.grid["seeds"]) == 20 for s in small.values())


def test_what_is_finished_are_whole_seeds() -> None:
    study = studies(True)["-digits-classifier-sgd"]
    cells = study.cells()
    known = {c.key for c in cells if c.seed < 7} | {c.key for c in cells if c.method == "path"}
    found = finished({"-one": study, "-two": studies(True)["-digits-autoencoder-adam"]}, known)
    assert list(found) == ["-one"] and found["-one"].grid["seeds"] == list(range(7))
    assert {c.key for c in found["-one"].cells()} <= known


def test_the_command_writes_tables_figures_and_the_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("matplotlib")
    from pathlift.cli import main
    from pathlift.experiments import exactness, reproduce

    def tiny(small: bool) -> dict:
        study = exactness.one_network(
            "mlp:6-2-6", "two-moons", "sgd", [0.1, 0.15], seeds=range(1), epochs=2, samples=128
        )
        return {"-moons": study}

    entry = replace(reproduce.EXPERIMENTS["exact"], studies=tiny)
    monkeypatch.setitem(reproduce.EXPERIMENTS, "exact", entry)
    assert main(["reproduce", "exact", "--small", "-o", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experiments"] == ["exact"]
    text = (tmp_path / "exact.md").read_text()
    assert "- Continuous against powers of two: " in text and "(exact-decision.png)" in text
    assert text.count("| mlp:6-2-6 | two-moons | sgd | 1 |") == 5
    # Its cells are kept in one file: elsewhere, the same command trains nothing.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "exact.cells.parquet").rename(elsewhere / "exact.cells.parquet")
    assert main(["reproduce", "exact", "--small", "--finished", "-o", str(elsewhere)]) == 0
    assert "8 cells are there, 0 to train" in capsys.readouterr().err
    assert (elsewhere / "exact.csv").read_text() == (tmp_path / "exact.csv").read_text()
    assert (tmp_path / "exact-decision.png").read_bytes()[:4] == b"\x89PNG"
