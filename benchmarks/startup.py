"""Seconds to start: ``import pathlift`` and the command line, beside ``import torch`` alone.

    python benchmarks/startup.py [--repeats 5] [--json FILE]

Every line is a fresh interpreter; the lines take turns, so that load on the machine meets all of
them. Prints medians and ranges.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

LINES = {
    "import torch": ["-c", "import torch"],
    "import torch, pathlift": ["-c", "import torch, pathlift"],
    "first use of condition_": ["-c", "import torch, pathlift; pathlift.condition_"],
    "pathlift --help": ["-m", "pathlift.cli", "--help"],
    "pathlift inspect, refused": ["-m", "pathlift.cli", "inspect", "x", "--input", "1"],
}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    samples: dict[str, list[float]] = {name: [] for name in LINES}
    for k in range(args.repeats + 1):
        for name, arguments in LINES.items():
            found = seconds(arguments)
            if k:
                samples[name].append(found)
    base = statistics.median(samples["import torch"])
    for name, found in samples.items():
        middle = statistics.median(found)
        print(
            f"{name:<34} {middle:6.3f} s  ({min(found):.3f} to {max(found):.3f}), "
            f"beyond torch {middle - base:+.3f} s"
        )
    if args.json:
        args.json.write_text(json.dumps(samples, indent=1))


if __name__ == "__main__":
    main()
