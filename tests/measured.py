"""Every setting that was trained, as docs/reproduced has it, with what is known before."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pathlift.experiments.exactness import CONTINUOUS, ENORM
from pathlift.experiments.judging import FIXED, OWN, distinct, facts_of_entry, network_of
from pathlift.verdict import CHANGING, NARROW, WIDER, Facts, judged

FOLDER = Path(__file__).parents[1] / "docs" / "reproduced"
# The sets that were told before they were trained.
TOLD = ("left-out", "left-out-again", "left-out-third", "left-out-fourth")
# Percent of the baseline's loss, and its sign; None: not measured.
Gain = tuple[int, int] | None


class Setting(NamedTuple):
    """A setting, its gains at own best rates and at the baseline's, and its best rate's change.

    ``told``: the verdict that was written down before; empty where there is none. ``behind``: the
    experiment.
    """

    network: str
    data: str
    optimizer: str
    facts: Facts
    behind: str
    told: str
    own: Gain
    old: Gain
    enorm: Gain
    enorm_old: Gain
    ratio: float

    @property
    def now(self) -> str:
        """What the rule says today."""
        return judged(self.facts).verdict

    @property
    def sign(self) -> int:
        """Of the gain at own best rates."""
        assert self.own is not None
        return self.own[1]

    @property
    def kind(self) -> str:
        """Of the network: which part of the rule it falls under."""
        facts = self.facts
        if facts.attention:
            return "attention"
        if facts.convolutions:
            return "convolutional, norms" if facts.batch_norms else "convolutional"
        changing = "changing" if facts.width_ratio >= CHANGING else "equal"
        if facts.batch_norms:
            return f"norms, {changing}"
        if facts.output_ratio < WIDER:
            return f"few outputs, {changing}"
        return "wide, narrow" if facts.width_ratio >= NARROW else "wide"


@cache
def settings() -> tuple[Setting, ...]:
    """All with enough seeds for a sign; of equal ones in when.json that with the most."""
    return (*_when(), *_told())


def of(kind: str, *optimizers: str) -> list[Setting]:
    """The settings of a kind, with these kinds of optimisers (none: SGD, also with momentum)."""
    wanted = optimizers or ("sgd",)
    return [s for s in settings() if s.kind == kind and s.facts.optimizer in wanted]


def shares(found: Sequence[Setting], column: str, sign: int = 1) -> list[int]:
    """Sorted sizes, in percent, of the gains (-1: losses) in a column."""
    gains = [getattr(s, column) for s in found]
    return sorted(abs(g[0]) for g in gains if g and g[1] == sign)


def signs(found: Sequence[Setting], column: str = "own") -> tuple[int, int, int]:
    """How many gained, showed no difference, lost."""
    gains = [g[1] for g in (getattr(s, column) for s in found) if g]
    return gains.count(1), gains.count(0), gains.count(-1)


def told(name: str) -> list[Setting]:
    """Those of a set that was told before it was trained."""
    return [s for s in settings() if s.behind == name]


def _when() -> Iterator[Setting]:
    for entry in distinct(json.loads((FOLDER / "when.json").read_text(encoding="utf-8"))):
        by = entry["methods"]
        gains = [_of_json(by.get(m, {}).get(r)) for m in (CONTINUOUS, ENORM) for r in (OWN, FIXED)]
        ratio = by[CONTINUOUS]["rate_ratio"]
        what = network_of(entry), entry["data"], entry["optimizer"]
        yield Setting(*what, facts_of_entry(entry), "when", "", *gains, ratio)


def _of_json(found: dict[str, Any] | None) -> Gain:
    if not found or found.get("sign") is None:
        return None
    share = found.get("gain")
    return (-100 if share is None else round(100 * share)), found["sign"]


def _told() -> Iterator[Setting]:
    entries = json.loads((FOLDER / "left-out-verdicts.json").read_text(encoding="utf-8")).values()
    by_name = {(network_of(e), e["data"], e["optimizer"]): e for e in entries}
    columns = (
        *("gain, continuous", "continuous, old rate"),
        *("gain, ENorm", "ENorm, old rate"),
    )
    for name in TOLD:
        with (FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["right"] == "too few seeds":
                    continue
                what = row["network"], row["data"], row["optimizer"]
                gains = [_of_text(row[c]) for c in columns]
                sign = {"gain": 1, "no difference": 0, "loss": -1}[row["seen"]]
                gains[0] = gains[0] and (gains[0][0], sign)  # an end may round to 0
                ratio = float(row["best rate / baseline's"])
                facts = facts_of_entry(by_name[what])
                yield Setting(*what, facts, name, row["verdict"], *gains, ratio)


def _of_text(cell: str) -> Gain:
    """Of a cell like ``+18% [+17%, +19%]``; a loss where it diverged."""
    if cell == "diverged":
        return -100, -1
    share, *ends = map(int, re.findall(r"[-+]\d+(?=%)", cell))
    low, high = ends or (0, 0)
    return share, 1 if low > 0 else -1 if high < 0 else 0
