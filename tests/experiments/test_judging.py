"""How good a rule is: counted by hand."""

from __future__ import annotations

import math
from typing import Any

from pathlift.experiments.judging import auc, counts, distinct, misses, sign_of, verdict_of
from pathlift.verdict import DONT, LIKELY, NOTHING


def _entry(verdict: str, sign: int | None, fixed: int = 0, **more: Any) -> dict[str, Any]:
    """A setting that the rule gives a verdict on."""
    gains = {"own_best_rates": {"sign": sign}, "baseline_best_rate": {"sign": fixed}}
    entry = {
        "architecture": "autoencoder:64-8",
        "data": "digits",
        "optimizer": "adam" if verdict == NOTHING else "sgd",
        "batch_norm": verdict == DONT,
        "initialization": "pytorch",
        "samples": None,
        "seeds": 5,
        "width_ratio": 1.0 if verdict == DONT else 8.0,
        "imbalance_before": 1.0,
        "methods": {"path-continuous": {"imbalance_after": 0.1, **gains}},
    }
    return entry | more


def test_counts_misses_and_ranks() -> None:
    entries = [
        _entry(LIKELY, 1, fixed=-1),
        _entry(LIKELY, 0),
        _entry(NOTHING, 0, fixed=1),
        _entry(NOTHING, 1),
        _entry(DONT, -1),
    ]
    assert [verdict_of(e) for e in entries] == [LIKELY, LIKELY, NOTHING, NOTHING, DONT]
    assert counts(entries) == {LIKELY: (1, 1, 0), NOTHING: (1, 1, 0), DONT: (0, 0, 1)}
    assert misses(entries) == [entries[1], entries[3]]
    # Gains: ranks 2 and 1; the others: 2, 1, 0. Of the 6 pairs 1+1+1 are won and 1+1 tied.
    assert auc(entries) == (0.5 + 1 + 1 + 0 + 0.5 + 1) / 6
    assert auc(entries, "baseline_best_rate") == (0 + 0 + 0.5 + 1) / 4
    assert math.isnan(auc(entries[:1]))


def test_of_equal_settings_the_one_with_the_most_seeds_counts() -> None:
    few, many = _entry(LIKELY, 1), _entry(LIKELY, 0, seeds=20)
    other = _entry(LIKELY, 1, samples=12_000)
    unknown = _entry(LIKELY, None, architecture="mlp:9-3")
    assert distinct([many, few, other, unknown]) == [many, other]
    assert sign_of(many) == 0
