"""How the cost grows: with parameters, with depth and with the number of operations.

    python benchmarks/scaling.py [--json FILE] [--largest 1e8] [--repeats 3] [--cpu] [--laws layers]

Square networks of eight layers (1e5 to ``--largest`` parameters), chains of narrow residual blocks
with batch norms (10 to 1,000 layers), and one layer behind a chain of additions (100 to 50,000
operations). For every part of the call: seconds, and the slope between the last two sizes in
logarithms; 1 is in proportion. With ``--cpu`` seconds are those of the process itself, for a
machine that does other work.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import pathlift.timing

PARTS = ("whole", "capture", "symmetry", "criterion", "solve", "apply", "verify")


class Blocks(nn.Module):
    """Residual blocks: linear, batch norm, ReLU."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Operations(nn.Module):
    """Two layers with additions between them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.inside, self.out = count, nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = y = self.inside(x).relu()
        for _ in range(self.count):
            y = y + x
        return self.out(y)


def square(parameters: float) -> nn.Sequential:
    width = round(math.sqrt(parameters / 8))
    layers = [m for _ in range(8) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def sizes(largest: float) -> dict[str, tuple[list[int], Callable[[int], nn.Module], int]]:
    """Law -> sizes, the model of a size, and the width of its input (0: the model's own)."""
    parameters = [10**k for k in range(5, 10) if 10**k <= largest]
    return {
        "parameters": (parameters, square, 0),
        "layers": ([10, 100, 300, 1000], Blocks, 8),
        "operations": ([100, 1000, 10_000, 50_000], Operations, 4),
    }


def clock() -> float:
    """Seconds: of the clock, or of this process's own work."""
    return time.process_time() if "--cpu" in sys.argv else time.perf_counter()


def measure(model: nn.Module, x: Tensor, repeats: int) -> dict[str, float]:
    """Medians of the parts of a call."""
    samples: dict[str, list[float]] = {part: [] for part in PARTS}
    initial = {k: v.clone() for k, v in model.state_dict().items()}
    for k in range(repeats + 1):
        model.load_state_dict(initial)
        gc.collect()
        start = clock()
        report = pathlift.condition_(model, x, on_nothing="ignore")
        if k:
            samples["whole"].append(clock() - start)
            for part in PARTS[1:]:
                samples[part].append(report.seconds[part])
    return {part: statistics.median(found) for part, found in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=float, default=1e8)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--laws", default="parameters,layers,operations")
    parser.add_argument("--cpu", action="store_true", help="count the process's own seconds")
    args = parser.parse_args()
    pathlift.timing.time = SimpleNamespace(perf_counter=clock)  # the parts by the same clock
    laws = {k: v for k, v in sizes(args.largest).items() if k in args.laws.split(",")}
    found: dict[str, dict[int, dict[str, float]]] = {}
    for law, (steps, make, width) in laws.items():
        print(" ".join([f"{law:<14}", *(f"{p:>10}" for p in PARTS)]))
        found[law] = {}
        for size in steps:
            torch.manual_seed(0)
            model = make(size)
            first = next(m for m in model.modules() if isinstance(m, nn.Linear))
            x = torch.randn(2, width or first.in_features)
            seconds = found[law][size] = measure(model, x, args.repeats)
            print(
                " ".join([f"{size:<14.3g}", *(f"{v:>10.3g}" for v in seconds.values())]), flush=True
            )
        a, b = steps[-2:]
        slopes = {
            part: math.log(found[law][b][part] / found[law][a][part]) / math.log(b / a)
            for part in PARTS
        }
        print(" ".join([f"{'slope':<14}", *(f"{v:>10.2f}" for v in slopes.values())]), flush=True)
        if args.json:
            about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
            args.json.write_text(json.dumps({"about": about, "seconds": found}, indent=1))


if __name__ == "__main__":
    main()
