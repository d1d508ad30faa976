"""Seconds of each phase of ``condition_`` beside one training step of the same model.

Run: ``python benchmarks/phases.py [--models resnet18,vgg16] [--json FILE]``. A step is one forward
and backward pass at batch 32 (median of 3). All figures of a row come from one process, one after
the other; the first call, which warms up the tracer, is not counted.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import pathlift

PHASES = ("capture", "symmetry", "criterion", "solve", "apply", "verify")


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def torchvision_model(name: str) -> nn.Module:
    # torchvision has no CPU build for every torch; it imports once its operators have a schema.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision.models import get_model

    return get_model(name, weights=None)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp-784-500x3-10": (lambda: mlp(784, 500, 500, 500, 10), (784,)),
    "mlp-3072-500x8-10": (lambda: mlp(3072, *[500] * 8, 10), (3072,)),
    **{
        name: (lambda name=name: torchvision_model(name), (3, 224, 224))
        for name in ("resnet18", "resnet50", "vgg16", "densenet121")
    },
}


def step_seconds(model: nn.Module, x: Tensor, repeats: int = 3) -> float:
    """Median seconds of one forward and backward pass."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model(x).sum().backward()
        times.append(time.perf_counter() - start)
        model.zero_grad()
    return statistics.median(times[1:])


def measure(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> dict[str, float]:
    """One row of the table."""
    torch.manual_seed(0)
    model = make()
    x = torch.randn(2, *shape)
    pathlift.condition_(copy.deepcopy(model), x)
    report = pathlift.condition_(copy.deepcopy(model), x)
    step = step_seconds(model, torch.randn(32, *shape))
    total = sum(report.seconds.values())
    return {
        **{phase: report.seconds[phase] for phase in PHASES},
        "total": total,
        "step": step,
        "total/step": total / step,
        "solve/step": report.seconds["solve"] / step,
        "certificate": report.gradient_norm,
        "before": report.imbalance_before,
        "after": report.imbalance_after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = {}
    for name in args.models.split(","):
        rows[name] = measure(*MODELS[name])
        if len(rows) == 1:
            print(" ".join([f"{'model':<18}", *(f"{k:>11}" for k in rows[name])]))
        print(" ".join([f"{name:<18}", *(f"{v:>11.3g}" for v in rows[name].values())]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
