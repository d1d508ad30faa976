"""How good the rule of :mod:`pathlift.verdict` is on settings that were measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pathlift.experiments.architectures import widths_of
from pathlift.experiments.data import SIZES
from pathlift.experiments.exactness import CONTINUOUS
from pathlift.verdict import DONT, LIKELY, NOTHING, VERDICTS, Facts, judged, optimizer_kind

Entry = dict[str, Any]
OWN, FIXED = "own_best_rates", "baseline_best_rate"
# What a verdict promises of the gain's sign at own best rates.
RIGHT = {LIKELY: (1,), NOTHING: (0,), DONT: (0, -1)}
_RANK = {LIKELY: 2, NOTHING: 1, DONT: 0}


def facts_of_entry(entry: Entry) -> Facts:
    """What ``advise`` would know of a setting of ``when.json`` before it is trained."""
    # None or NaN where paths are not defined.
    before, after = entry["imbalance_before"], entry["methods"][CONTINUOUS]["imbalance_after"]
    kind = entry["architecture"].partition(":")[0]
    features, classes = SIZES[entry["data"]]
    widths = widths_of(entry["architecture"])
    return Facts(
        1,
        0.0 if before is None or math.isnan(before) else before,
        0.0 if after is None or math.isnan(after) else after,
        entry["width_ratio"],
        {"autoencoder": features, "completion": features // 2}.get(kind, classes) / min(widths),
        batch_norms=1.0 if entry["batch_norm"] or kind == "resnet18" else 0.0,
        attention=kind == "transformer",
        convolutions=1.0 if kind in ("convolutional", "resnet18") else 0.0,
        optimizer=optimizer_kind(entry["optimizer"]),
    )


def norm_of(entry: Entry) -> str:
    """What is said behind a network of its norms."""
    return ", batch norm" if entry["batch_norm"] else ""


def network_of(entry: Entry) -> str:
    """How a setting's network is called in tables."""
    return str(entry["architecture"]) + norm_of(entry)


def verdict_of(entry: Entry) -> str:
    """The rule's verdict on a setting."""
    return judged(facts_of_entry(entry)).verdict


def sign_of(entry: Entry, rates: str = OWN, method: str = CONTINUOUS) -> int | None:
    """Sign of what a method gained (0: not shown); None where that was not measured."""
    sign: int | None = entry["methods"].get(method, {}).get(rates, {}).get("sign")
    return sign


def distinct(entries: Sequence[Entry]) -> list[Entry]:
    """Settings with enough seeds for a sign; of equal ones that with the most seeds."""
    keys = ("architecture", "data", "optimizer", "batch_norm", "initialization", "samples")
    best: dict[tuple[Any, ...], Entry] = {}
    for entry in sorted(entries, key=lambda e: e["seeds"]):
        if sign_of(entry) is not None:
            best[tuple(entry[k] for k in keys)] = entry
    return list(best.values())


def counts(
    entries: Sequence[Entry], rates: str = OWN, method: str = CONTINUOUS
) -> dict[str, tuple[int, int, int]]:
    """verdict -> how many settings gained, showed no difference, lost."""
    found = {}
    for verdict in VERDICTS:
        signs = [sign_of(e, rates, method) for e in entries if verdict_of(e) == verdict]
        found[verdict] = (signs.count(1), signs.count(0), signs.count(-1))
    return found


def auc(entries: Sequence[Entry], rates: str = OWN, method: str = CONTINUOUS) -> float:
    """Probability that a setting that gains is ranked above one that does not; ties count half.

    NaN without both kinds.
    """
    return rank_auc([(verdict_of(e), sign_of(e, rates, method) == 1) for e in entries])


def rank_auc(pairs: Sequence[tuple[str, bool]]) -> float:
    """The same of verdicts and whether their settings gained."""
    ranks: dict[bool, list[int]] = {True: [], False: []}
    for verdict, gained in pairs:
        ranks[gained].append(_RANK[verdict])
    wins = [(a > b) + 0.5 * (a == b) for a in ranks[True] for b in ranks[False]]
    return sum(wins) / len(wins) if wins else float("nan")


def misses(entries: Sequence[Entry]) -> list[Entry]:
    """Settings of which the verdict was wrong at own best rates."""
    return [e for e in entries if sign_of(e) not in RIGHT[verdict_of(e)]]
