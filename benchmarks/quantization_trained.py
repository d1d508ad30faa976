"""Trained networks: accuracy on digits after quantisation, with every tool."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import quantization_tools as compared
from pathlift.quantization import quantised

SETTINGS = [("int8", "tensor"), ("int4", "tensor"), ("int4", "channel")]
SEEDS, EPOCHS = 3, 30


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """8x8 images in [0, 1] and classes: 1,297 to train on and 500 to test on."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[500:], y[500:], x[:500], y[:500]


def cnn() -> nn.Module:
    """Inverted bottlenecks with depthwise convolutions and batch norms."""

    def block(width: int, out: int, stride: int) -> list[nn.Module]:
        wide = 4 * width
        return [
            nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
        ]  # fmt: skip

    stem = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(*stem, *block(16, 24, 2), *block(24, 32, 2), *head)


class Transformer(nn.Module):
    """A small vision transformer: every row of the image is a token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.place = nn.Parameter(0.02 * torch.randn(8, 32))
        layer = nn.TransformerEncoderLayer(
            32, 4, 64, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) to logits (N, 10)."""
        tokens = self.embed(x.squeeze(1)) + self.place
        out: Tensor = self.head(self.norm(self.layers(tokens)).mean(1))
        return out


def fit(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """Adam with a falling rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of the images whose class has the largest logit."""
    return float((model(x).argmax(1) == y).float().mean() * 100)


def results(others: dict[str, compared.Tool]) -> list[dict[str, Any]]:
    """Per network and setting: accuracy in percent, one entry per seed, by tool."""
    x, y, x_test, y_test = digits()
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for name, make in {"CNN": cnn, "transformer": Transformer}.items():
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            model = fit(make(), x, y, seed)
            for format, per in SETTINGS:
                here = {"here": compared.here(format=format, per=per)}
                cells = found.setdefault((name, f"{format} per {per}"), {})
                cells.setdefault("float32", []).append(accuracy(model, x_test, y_test))
                for label, tool in {**others, **here}.items():
                    try:
                        made = quantised(tool(model, x[:16]), format, per)
                    except Exception as error:  # a tool that can't take the network
                        print(f"{label} fails on the {name}: {type(error).__name__}")
                        continue
                    cells.setdefault(label, []).append(accuracy(made, x_test, y_test))
    return [{"network": n, "setting": s, "accuracy": a} for (n, s), a in found.items()]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: mean accuracy in percent."""
    labels = list(dict.fromkeys(k for r in rows for k in r["accuracy"]))
    lines = [
        f"Accuracy in percent on 500 images of digits, means over {SEEDS} trainings.",
        "",
        f"| network | {' | '.join(labels)} |",
        f"|{' --- |' * (len(labels) + 1)}",
    ]
    for one in rows:
        means = [
            f"{statistics.mean(one['accuracy'][k]):.1f}" if k in one["accuracy"] else "-"
            for k in labels
        ]
        lines.append(f"| {one['network']}, {one['setting']} | {' | '.join(means)} |")
    return lines
