"""The table of docs/training.md is what the code does (its examples run in tests/docs)."""

from __future__ import annotations

import re
from pathlib import Path

from torch import optim

from pathlift.tensors import rules

TEXT = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def test_table() -> None:
    found: dict[str, dict[str, int]] = {}
    table = TEXT[TEXT.index("| optimiser | -2") :].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        entries = {}
        for power, cell in zip((-2, -1, 1, 0), cells[1:], strict=True):
            power = 2 if cell.startswith("2:") else power
            entries.update(dict.fromkeys(re.findall("`([a-z_]+)`", cell), power))
        for name in cells[0].split(", "):
            found[name] = entries
    for name, entries in found.items():
        if hasattr(optim, name):
            known = {k: r.power for k, r in rules.RULES[getattr(optim, name)].items()}
            assert entries == known, name
    assert {c.__name__ for c in rules.RULES if c.__module__.startswith("torch.")} <= set(found)
