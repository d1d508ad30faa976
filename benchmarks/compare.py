"""Two JSON files of ``benchmarks/conditioning.py``: every phase of the second over the first.

    python benchmarks/compare.py before.json after.json

Prints the ratio of medians per model and column, marked ``*`` where the ranges of the samples do
not overlap (the difference is larger than the spread).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

COLUMNS = (
    "first",
    "call",
    "again",
    "capture",
    "symmetry",
    "criterion",
    "solve",
    "apply",
    "verify",
    "step",
    "group",
    "norm",
    "diagonal",
    "extra MB",
)


def samples(value: Any) -> list[float]:
    if value is None or isinstance(value, str):  # not measured, or why it is not defined
        return [float("nan")]
    return [float(v) for v in value] if isinstance(value, list) else [float(value)]


def cell(before: Any, after: Any) -> str:
    """``after / before`` of medians, with a star where the samples do not overlap."""
    a, b = samples(before), samples(after)
    ratio = statistics.median(b) / statistics.median(a) if statistics.median(a) else float("nan")
    apart = len(a) > 1 and len(b) > 1 and (min(a) > max(b) or min(b) > max(a))
    return f"{ratio:.2f}{'*' if apart else ' '}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args()
    before, after = (json.loads(p.read_text())["rows"] for p in (args.before, args.after))
    print(" ".join([f"{'after / before':<18}", *(f"{c:>10}" for c in COLUMNS)]))
    for name in after:
        if name in before:
            cells = (f"{cell(before[name].get(c), after[name].get(c)):>10}" for c in COLUMNS)
            print(" ".join([f"{name:<18}", *cells]))


if __name__ == "__main__":
    main()
