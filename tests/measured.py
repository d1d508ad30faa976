"""Settings that were told before they were trained, as docs/reproduced has them."""

from __future__ import annotations

import csv
import re
from pathlib import Path

FILE = Path(__file__).parents[1] / "docs" / "reproduced" / "left-out.csv"


def told() -> list[dict[str, str]]:
    """One row per setting."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def gain(row: dict[str, str], column: str = "gain, continuous") -> tuple[int, int]:
    """Percent and sign of a cell like ``+18% [+17%, +19%]``; a loss where it diverged."""
    if row[column] == "diverged":
        return -100, -1
    share, *ends = map(int, re.findall(r"[-+]\d+(?=%)", row[column]))
    low, high = ends or (0, 0)
    return share, 1 if low > 0 else -1 if high < 0 else 0
