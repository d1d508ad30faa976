"""Statistics against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pathlift.errors import ArgumentError
from pathlift.experiments.summary import (
    Runs,
    Target,
    default_target,
    difference,
    percentiles,
    plain,
    ratio,
    settings_of,
    summarise,
)


def _row(method: str, rate: float, seed: int, loss: list[float], **more: object) -> dict:
    return {
        "method": method, "architecture": "mlp:8", "data": "made", "optimizer": "sgd", "rate": rate, "seed": seed,
        "loss": loss, "accuracy": None, "test_loss": None, "test_accuracy": None, "conditioning_seconds": None,
        "preparation_seconds": 0.0, "epoch_seconds": 2.0, "imbalance": 1.0, "parameters": 7, **more,
    }  # fmt: skip


def _rows() -> list[dict]:
    """Baseline best at rate 1, the method at rate 2 and one epoch sooner; rate 3 diverges."""
    rows = []
    for seed in range(8):
        e = 0.01 * seed
        rows += [
            _row("baseline", 1.0, seed, [4 + e, 3 + e, 2 + e, 1 + e]),
            _row("baseline", 2.0, seed, [5, 5, 5, 5]),
            _row("baseline", 3.0, seed, [5, math.inf, math.inf, math.inf]),
            _row("path", 1.0, seed, [4 + e, 4, 4, 4], preparation_seconds=0.5),
            _row(
                "path",
                2.0,
                seed,
                [3 + e, 2 + e, 1 + e, 0.5 + e],
                preparation_seconds=0.5,
                conditioning_seconds=[0, 1.0, 0, 4.0],
            ),
            _row("path", 3.0, seed, [3, 2, math.inf, math.inf], preparation_seconds=0.5),
        ]
    for row in rows:
        if row["method"] == "path" and row["conditioning_seconds"] is None:
            row["conditioning_seconds"] = [0.0] * 4
    return rows


def test_each_method_at_its_own_best_rate() -> None:
    found = summarise(_rows(), Target("loss", 2.5))[0]
    base, path = found["methods"]["baseline"], found["methods"]["path"]
    assert (base["best_rate"], path["best_rate"]) == (1.0, 2.0)
    assert base["final_loss"] == pytest.approx(1.035) and path["final_loss"] == pytest.approx(0.535)
    assert path["final_loss_difference"] == pytest.approx(-0.5)
    # All seeds differ by the same, so every draw gives the same difference.
    assert path["final_loss_interval"] == pytest.approx((-0.5, -0.5))
    assert (base["epochs_to_target"], path["epochs_to_target"]) == (3, 2)
    assert path["epochs_ratio"] == 1.5 and path["epochs_ratio_interval"] == (1.5, 1.5)
    assert base["seconds_to_target"] == 6.0
    # Two epochs of 2 s, 1 s of conditioning by then (the 4 s come later), 0.5 s before.
    assert path["seconds_to_target"] == 5.5
    assert base["best_rate_at_edge"] and not path["best_rate_at_edge"]


def test_equal_rates_are_compared_as_they_are() -> None:
    equal = summarise(_rows(), Target("loss", 2.5))[0]["methods"]["path"]["equal_rates"]
    assert [e["rate"] for e in equal] == [1, 2, 3]
    assert [e["diverged"] for e in equal] == [0, 0, 8]
    assert equal[0]["final_loss_difference"] == pytest.approx(4 - 1.035)
    assert equal[0]["epochs_ratio"] == 0  # the method never arrives
    assert equal[1]["epochs_ratio"] == math.inf  # the baseline never does
    assert math.isnan(equal[2]["final_loss_difference"]) and equal[2]["final_loss_interval"] is None


def test_targets() -> None:
    curves = np.array([[3.0, 2.0, 1.0], [3.0, 3.0, 3.0]])
    assert Target("loss", 2.0).reached(curves).tolist() == [2, math.inf]
    assert Target("accuracy", 3.0).reached(curves).tolist() == [1, 1]
    setting = settings_of(_rows())[0]
    assert default_target(setting) == Target(
        "loss", 3.04
    )  # 3.035, half-way at rate 1, to three digits
    with pytest.raises(ArgumentError, match="has no accuracy"):
        summarise(_rows(), Target("accuracy", 0.9))
    with pytest.raises(ArgumentError, match="1 cells of mlp:8, made, sgd are missing"):
        settings_of(_rows()[1:])


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        base = generator.normal(size=(1, 20))
        low, high = difference(base + generator.normal(0.3, 1, (1, 20)), base)[1] or (0, 0)
        covered += low <= 0.3 <= high
    assert 170 <= covered <= 198


def test_pairing_narrows_the_interval() -> None:
    generator = np.random.default_rng(2)
    base = generator.normal(size=(1, 20))
    paired = difference(base + 0.1, base)[1]
    assert paired == pytest.approx((0.1, 0.1))
    other = difference(generator.normal(size=(1, 20)) + 0.1, base)[1]
    assert other is not None and other[1] - other[0] > 0.5


def test_infinite_and_undefined_draws() -> None:
    inf = math.inf
    assert ratio(np.array([[2.0, 2.0]]), np.array([[inf, inf]])) == (inf, (inf, inf))
    value, interval = ratio(np.array([[inf, inf]]), np.array([[inf, inf]]))
    assert math.isnan(value) and interval is None
    assert percentiles(np.array([1.0, math.nan, math.nan])) is None
    assert plain({"a": [1.0, inf], "b": (math.nan,)}) == {"a": [1.0, None], "b": [None]}


def test_seconds_of_a_run_that_never_arrives_are_infinite() -> None:
    runs = Runs(
        {"loss": np.array([[[3.0, 3.0]]])}, np.zeros(1), np.zeros((1, 1, 2)), 1.0, np.zeros(1)
    )
    assert runs.seconds_to(Target("loss", 1.0)).tolist() == [[math.inf]]
