"""Trained networks: accuracy and SQNR of logits after quantisation, with every tool.

    python benchmarks/quantization_trained.py --data ../shared/data   # all networks, 5 trainings

A network of inverted bottlenecks with depthwise convolutions and batch norms, on MNIST and on
CIFAR-10, and a small vision transformer on MNIST, all trained here on part of the training set.
Example inputs (and what Brevitas and AIMET don't need) are images of the training set; figures are
of the test set. Results are added to ``docs/quantization.json`` after every training.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import quantization_tools as compared
from pathlift.experiments.data import load
from pathlift.quantization import quantised

JSON = Path(__file__).parents[1] / "docs" / "quantization.json"
SETTINGS = [("int8", "tensor"), ("int4", "tensor"), ("int4", "channel")]
EXAMPLES, BATCH = 32, 128
# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}


def cnn(channels: int, widths: tuple[int, ...]) -> nn.Module:
    """Inverted bottlenecks with depthwise convolutions, each with half the resolution."""

    def block(width: int, out: int) -> list[nn.Module]:
        wide = 4 * width
        return [
            nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Conv2d(wide, wide, 3, 2, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
        ]  # fmt: skip

    first = widths[0]
    made = [nn.Conv2d(channels, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU()]
    for width, out in pairwise(widths):
        made += block(width, out)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)]
    return nn.Sequential(*made, *head)


class Transformer(nn.Module):
    """A small vision transformer on 28 x 28 images: 16 patches are its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(49, 48)
        self.place = nn.Parameter(0.02 * torch.randn(16, 48))
        layer = nn.TransformerEncoderLayer(
            48, 4, 96, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 28, 28) to logits (N, 10)."""
        patches = x.reshape(-1, 4, 7, 4, 7).permute(0, 1, 3, 2, 4).reshape(-1, 16, 49)
        tokens = self.embed(patches) + self.place
        out: Tensor = self.head(self.norm(self.layers(tokens)).mean(1))
        return out


class Case(NamedTuple):
    """A network, its data, and how many images of how many epochs it is trained on."""

    data: str
    make: Callable[[], nn.Module]
    images: int
    epochs: int
    rate: float
    tested: int


CASES = {
    "CNN, MNIST": Case("mnist", lambda: cnn(1, (16, 32, 64)), 30_000, 4, 5e-3, 4_000),
    "transformer, MNIST": Case("mnist", Transformer, 40_000, 6, 3e-3, 4_000),
    "CNN, CIFAR-10": Case("cifar10", lambda: cnn(3, (32, 48, 64)), 20_000, 6, 4e-3, 4_000),
}


def fit(model: nn.Module, x: Tensor, y: Tensor, case: Case, seed: int) -> nn.Module:
    """AdamW with one cycle of the rate; images of CIFAR-10 are mirrored at random."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=case.rate, weight_decay=1e-2)
    steps = case.epochs * math.ceil(len(x) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, case.rate, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(case.epochs):
        for batch in torch.randperm(len(x), generator=generator).split(BATCH):
            images = x[batch]
            if case.data == "cifar10":
                mirrored = torch.rand(len(batch), generator=generator) < 0.5
                images[mirrored] = images[mirrored].flip(-1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    """Of all images, a batch at a time."""
    return torch.cat([model(part) for part in x.split(500)])


def accuracy(found: Tensor, y: Tensor) -> float:
    """Percent of the images whose class has the largest logit."""
    return float((found.argmax(1) == y).float().mean() * 100)


def sqnr(exact: Tensor, found: Tensor) -> float:
    """In dB."""
    error = float((exact - found).double().square().sum())
    return 10 * math.log10(float(exact.double().square().sum()) / error)


def rows(
    name: str, seed: int, root: Path, others: dict[str, compared.Tool]
) -> list[dict[str, Any]]:
    """Of one training: per setting, accuracy in percent and SQNR in dB by tool."""
    case = CASES[name]
    train, test = (load(case.data, root / case.data, split=s) for s in ("train", "test"))
    assert train.targets is not None and test.targets is not None
    torch.manual_seed(seed)
    order = torch.randperm(len(train.inputs))[: case.images]
    x, y = train.inputs[order], train.targets[order]
    model = fit(case.make(), x, y, case, seed)
    x_test, y_test = test.inputs[: case.tested], test.targets[: case.tested]
    exact = logits(model, x_test)
    found = []
    for format, per in SETTINGS:
        here = {"here": compared.here(format=format, per=per)}
        cells = {"float32": accuracy(exact, y_test)}
        decibels = {}
        for label, tool in {**others, **here}.items():
            try:
                made = quantised(tool(model, x[:EXAMPLES]), format, per)
            except Exception as error:  # a tool that can't take the network
                print(f"{label} fails on {name}: {type(error).__name__}")
                continue
            now = logits(made, x_test)
            cells[label], decibels[label] = accuracy(now, y_test), sqnr(exact, now)
        setting = f"{format} per {per}"
        one = {"network": name, "setting": setting, "seed": seed}
        found.append({**one, "accuracy": cells, "sqnr": decibels})
    return found


def interval(values: list[float], digits: int = 1) -> str:
    """Mean and the half width of its 95 % interval."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    width = STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {width:.{digits}f}"


def table(found: list[dict[str, Any]]) -> list[str]:
    """Markdown: accuracy, the difference to the better of the other tools, and SQNR."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["network"], row["setting"]), []).append(row)
    labels = list(dict.fromkeys(k for row in found for k in row["accuracy"]))
    other = [k for k in labels if k not in ("float32", "here")]
    head = [*labels, "here less the best other"]
    lines = [
        "Accuracy in percent, means over trainings with 95 % intervals. The last column is of the "
        "differences within a training, to the column that is best in the mean.",
        "",
        f"| network | trainings | {' | '.join(head)} |",
        f"|{' --- |' * (len(head) + 2)}",
    ]
    for (name, setting), mine in groups.items():
        cells = [interval([row["accuracy"][k] for row in mine]) for k in labels]
        best = max(other, key=lambda k: statistics.mean(row["accuracy"][k] for row in mine))
        gain = [row["accuracy"]["here"] - row["accuracy"][best] for row in mine]
        lines.append(
            f"| {name}, {setting} | {len(mine)} | {' | '.join(cells)} | {interval(gain, 2)} |"
        )
    tools = [*other, "here"]
    lines += ["", "SQNR of the logits in dB.", "", f"| network | {' | '.join(tools)} |"]
    lines.append(f"|{' --- |' * (len(tools) + 1)}")
    for (name, setting), mine in groups.items():
        means = {k: statistics.mean(row["sqnr"][k] for row in mine) for k in tools}
        top = max(means.values())
        cells = [f"**{v:.1f}**" if v == top else f"{v:.1f}" for v in means.values()]
        lines.append(f"| {name}, {setting} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Train, measure, and add to the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist and cifar10")
    parser.add_argument("--networks", default=";".join(CASES), help="separated by ;")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=JSON)
    args = parser.parse_args()
    torch.set_num_threads(1)
    others = {"before": compared.folded, **compared.tools()}
    names = args.networks.split(";")
    done: list[dict[str, Any]] = []
    # Seed by seed, so that a run that is cut short has every network.
    for seed in range(args.seeds):
        for name in names:
            done += rows(name, seed, args.data, others)
            data = json.loads(args.json.read_text()) if args.json.exists() else {}
            kept = [r for r in data.get("trained", []) if r["network"] not in names]
            args.json.write_text(json.dumps({**data, "trained": kept + done}, indent=1) + "\n")
            for row in done[-len(SETTINGS) :]:
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
