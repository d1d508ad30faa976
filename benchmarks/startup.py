"""Seconds to start: ``import pathlift``, the README's lines and the command line, in new processes.

    python benchmarks/startup.py [--repeats 5] [--cpu] [--json FILE]

Every line is a fresh interpreter; the lines take turns, so that load on the machine meets all of
them. Prints medians and ranges.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

_MODEL = """
import torch
from torch import nn
model = nn.Sequential(
    nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 20), nn.ReLU(), nn.Linear(20, 10)
)
model(torch.randn(2, 784))
"""
_README = """
import pathlift
report = pathlift.condition_(model, torch.randn(2, 784))
str(report)
pathlift.rescaling_group(model, torch.randn(2, 784)).summary()
pathlift.path_norm(model, torch.randn(1, 784), p=1)
"""
_SCIPY = "import scipy.sparse, scipy.sparse.linalg, scipy.sparse.csgraph"

# Name -> the interpreter's arguments.
LINES = {
    "import torch": ["-c", "import torch"],
    "a model's first forward": ["-c", _MODEL],
    "the README's ten lines": ["-c", _MODEL + _README],
    "SciPy's sparse matrices": ["-c", _MODEL + _SCIPY],
    "import torch, pathlift": ["-c", "import torch, pathlift"],
    "first use of condition_": ["-c", "import torch, pathlift; pathlift.condition_"],
    "pathlift --help": ["-m", "pathlift.cli", "--help"],
    "pathlift inspect, refused": ["-m", "pathlift.cli", "inspect", "x", "--input", "1"],
}


def seconds(arguments: list[str], cpu: bool) -> float:
    """By the clock, or of the process itself where the machine does other work."""
    start, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *arguments], capture_output=True)
    after = os.times()
    own = sum(after[2:4]) - sum(before[2:4])
    return own if cpu else time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cpu", action="store_true", help="count the processes' own seconds")
    args = parser.parse_args()
    samples: dict[str, list[float]] = {name: [] for name in LINES}
    for k in range(args.repeats + 1):
        for name, arguments in LINES.items():
            found = seconds(arguments, args.cpu)
            if k:
                samples[name].append(found)
    torch_alone = statistics.median(samples["import torch"])
    forward = statistics.median(samples["a model's first forward"])
    for name, found in samples.items():
        middle = statistics.median(found)
        ran = LINES[name][-1].startswith(_MODEL)
        base, what = (forward, "forward") if ran else (torch_alone, "torch")
        print(
            f"{name:<34} {middle:6.3f} s  ({min(found):.3f} to {max(found):.3f}), "
            f"beyond {what} {middle - base:+.3f} s"
        )
    if args.json:
        args.json.write_text(json.dumps(samples, indent=1))


if __name__ == "__main__":
    main()
