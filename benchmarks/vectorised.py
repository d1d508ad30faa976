"""Runs per second: all runs stacked beside the same runs one by one with ``torch.optim``.

Run: ``python benchmarks/vectorised.py [--runs 60] [--threads 2] [--json FILE]``. Both sides train
the same MLP on the digits with the same batches for the same number of epochs and the same number
of threads, in one process; the one-by-one side trains a few of the runs and its time per run is
taken for all. The losses of those few are compared, and their largest difference is printed.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pathlift.experiments.architectures import mlp
from pathlift.experiments.data import Data, load
from pathlift.experiments.optimizers import optimizer_named
from pathlift.experiments.training import train

WIDTHS = {"mlp-64-32-32-10": (64, 32, 32, 10), "mlp-64-128-128-10": (64, 128, 128, 10)}


def one_run(model: nn.Module, seed: int, rate: float, data: Data, args: argparse.Namespace) -> list:
    """The loop everybody writes; the mean loss of every epoch."""
    model = copy.deepcopy(model)
    (optimizer,) = optimizer_named(args.optimizer).torch(list(model.parameters()), rate)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(args.epochs):
        total, steps = 0.0, 0
        order = torch.randperm(len(data.inputs), generator=generator)
        for index in order.split(args.batch):
            if len(index) < args.batch:
                break
            loss = cross_entropy(model(data.inputs[index]), data.targets[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
            steps += 1
        losses.append(total / steps)
    return losses


def measure(name: str, data: Data, args: argparse.Namespace) -> dict[str, float | str]:
    """One row of the table."""
    models, seeds, rates = [], [], []
    for run in range(args.runs):
        torch.manual_seed(run % 10)
        models.append(mlp(WIDTHS[name]))
        seeds.append(run % 10)
        rates.append(0.001 * (1 + run // 10))
    keywords = {"batch": args.batch, "optimizer": args.optimizer}
    train(models, seeds, rates, data, epochs=1, **keywords)  # warms up
    start = time.perf_counter()
    stacked = train(models, seeds, rates, data, epochs=args.epochs, **keywords)
    together = time.perf_counter() - start
    start = time.perf_counter()
    single = [one_run(models[k], seeds[k], rates[k], data, args) for k in range(args.singles)]
    alone = (time.perf_counter() - start) / args.singles * args.runs
    gap = (stacked.loss[: args.singles] - torch.tensor(single)).abs().max()
    return {
        "network": name,
        "runs": args.runs,
        "stacked_seconds": together,
        "one_by_one_seconds": alone,
        "times_faster": alone / together,
        "largest_loss_difference": float(gap),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--singles", type=int, default=6, help="runs trained one by one")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--optimizer", default="sgd", choices=("sgd", "momentum", "adam"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load("digits")
    rows = [measure(name, data, args) for name in WIDTHS]
    print(f"{'network':<20}{'runs':>5}{'stacked s':>11}{'one by one s':>14}{'faster':>8}{'gap':>10}")
    for row in rows:
        print(
            f"{row['network']:<20}{row['runs']:>5}{row['stacked_seconds']:>11.2f}"
            f"{row['one_by_one_seconds']:>14.2f}{row['times_faster']:>7.1f}x"
            f"{row['largest_loss_difference']:>10.1e}"
        )
    if args.json:
        args.json.write_text(json.dumps({**vars(args), "json": str(args.json), "rows": rows}))


if __name__ == "__main__":
    main()
