"""Training runs per second: all runs stacked beside the same runs one after another.

Run: ``python benchmarks/vectorised.py [--runs 240] [--processes 2] [--json FILE]``. Both sides
train the same MLPs with the same batches for the same number of epochs. One side is the loop
everybody writes around ``nn.Module`` and ``torch.optim``, one run after another, one thread (more
make networks of this size slower). The other is ``train`` in so many processes of one thread each.
A few runs are trained alone and their time per run is taken for all; both sides are measured in
turn, several times, and the medians are compared, so that other load on the machine hits both. The
losses of the runs that both sides trained are compared, too.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pathlift.experiments.architectures import mlp
from pathlift.experiments.data import Data, load
from pathlift.experiments.training import train

# Widths, data and batch size.
CASES: dict[str, tuple[tuple[int, ...], str, int]] = {
    "two-moons 2-8x5-2": ((2, 8, 8, 8, 8, 8, 2), "two-moons", 32),
    "two-moons 2-32x5-2": ((2, 32, 32, 32, 32, 32, 2), "two-moons", 32),
    "digits 64-32-32-10": ((64, 32, 32, 10), "digits", 32),
    "digits 64-128-128-10": ((64, 128, 128, 10), "digits", 32),
    "digits 64-32-32-10, batch 128": ((64, 32, 32, 10), "digits", 128),
}
OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "sgd": lambda m, rate: torch.optim.SGD(m.parameters(), lr=rate),
    "momentum": lambda m, rate: torch.optim.SGD(m.parameters(), lr=rate, momentum=0.9),
    "adam": lambda m, rate: torch.optim.Adam(m.parameters(), lr=rate),
}


def network(widths: tuple[int, ...], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return mlp(widths)


def one_run(
    widths: tuple[int, ...], seed: int, rate: float, data: Data, batch: int, args: Any
) -> list[float]:
    """The loop everybody writes; the mean loss of every epoch."""
    model = copy.deepcopy(network(widths, seed))
    optimizer = OPTIMIZERS[args.optimizer](model, rate)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(args.epochs):
        total, steps = 0.0, 0
        order = torch.randperm(len(data.inputs), generator=generator)
        for index in order.split(batch):
            if len(index) < batch:
                break
            loss = cross_entropy(model(data.inputs[index]), data.targets[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
            steps += 1
        losses.append(total / steps)
    return losses


def stacked(
    widths: tuple[int, ...], seeds: list[int], rates: list[float], data: Data, batch: int, args: Any
) -> Tensor:
    """One process's share of the runs."""
    torch.set_num_threads(1)
    models = [network(widths, seed) for seed in seeds]
    keywords = {"epochs": args.epochs, "batch": batch, "optimizer": args.optimizer}
    return train(models, seeds, rates, data, vectorised=True, **keywords).loss


def measure(name: str, pool: Parallel, args: Any) -> dict[str, float | str]:
    """One row of the table."""
    widths, source, batch = CASES[name]
    data = load(source)
    seeds = [run % 10 for run in range(args.runs)]
    rates = [0.001 * (1 + run // 10) for run in range(args.runs)]
    share = -(-args.runs // args.processes)
    parts = [slice(k, k + share) for k in range(0, args.runs, share)]
    jobs = [delayed(stacked)(widths, seeds[p], rates[p], data, batch, args) for p in parts]
    pool(jobs)  # starts the processes and warms up
    one_run(widths, 0, 0.001, data, batch, args)
    together, alone = [], []
    for _ in range(args.repeats):
        start = time.perf_counter()
        losses = torch.cat(pool(jobs))
        together.append(time.perf_counter() - start)
        start = time.perf_counter()
        single = [
            one_run(widths, seeds[k], rates[k], data, batch, args) for k in range(args.singles)
        ]
        alone.append((time.perf_counter() - start) / args.singles * args.runs)
    gap = (losses[: args.singles] - torch.tensor(single)).abs().max()
    return {
        "case": name,
        "runs": args.runs,
        "stacked_seconds": statistics.median(together),
        "one_by_one_seconds": statistics.median(alone),
        "times_faster": statistics.median(a / t for a, t in zip(alone, together, strict=True)),
        "largest_loss_difference": float(gap),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=240)
    parser.add_argument("--singles", type=int, default=4, help="runs trained alone, each repeat")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--optimizer", default="sgd", choices=sorted(OPTIMIZERS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'case':<32}{'runs':>5}{'stacked s':>11}{'alone s':>10}{'faster':>8}{'gap':>10}")
    with Parallel(n_jobs=args.processes) as pool:
        for name in CASES:
            row = measure(name, pool, args)
            rows.append(row)
            print(
                f"{name:<32}{row['runs']:>5}{row['stacked_seconds']:>11.2f}"
                f"{row['one_by_one_seconds']:>10.1f}{row['times_faster']:>7.1f}x"
                f"{row['largest_loss_difference']:>10.1e}",
                flush=True,
            )
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        args.json.write_text(json.dumps({**settings, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
