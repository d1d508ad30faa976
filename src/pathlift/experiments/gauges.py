"""Experiments that train nothing: the size of the rescaling, and its cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import pathlift
from pathlift.experiments import figures
from pathlift.experiments.architectures import build, mlp
from pathlift.experiments.data import Data
from pathlift.experiments.methods import warm_up
from pathlift.experiments.study import Result, Run, Table
from pathlift.experiments.training import epoch_seconds
from pathlift.theory import expected_log2_scales


def _network(widths: Sequence[int], gain: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = mlp(widths)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(gain)
    return model


def scales(name: str, small: bool, run: Run) -> Result:
    """Size of the rescaling against a width ratio and against the initial scale."""
    base, samples = (64, 3) if small else (512, 10)
    ratios = [2.0**k for k in range(-4, 5)]
    gains = [10.0 ** (k / 2) for k in range(-4, 5)]
    sweeps = {
        "width": [((base, base, int(base * r), base, 10), 1.0, r) for r in ratios],
        "gain": [((base, base, base, base, 10), g, g) for g in gains],
    }
    labels = {"width": "width of the middle layer / width", "gain": "factor of initial weights"}
    lines: list[Sequence[str]] = []
    drawn = []
    spread = {}
    for what, points in sweeps.items():
        run.progress(f"scales against {what}")
        series = []
        for widths, gain, x in points:
            predicted, solved, before, after = _sizes(widths, gain, samples)
            series.append((x, predicted, statistics.mean(solved), min(solved), max(solved)))
            lines.append(
                (
                    labels[what],
                    f"{x:.3g}",
                    f"{predicted:.2f}",
                    f"{statistics.mean(solved):.2f}",
                    f"{statistics.mean(before):.3f}",
                    f"{statistics.mean(after):.3f}",
                )
            )
        spread[what] = series
        figures.save(_draw_scales(series, labels[what]), run.output / f"{name}-{what}")
        caption = f"Root mean square log2 scale against the {labels[what]}: predicted and solved."
        drawn.append((f"{name}-{what}", caption))
    head = (
        "sweep",
        "value",
        "rms log2 scale, predicted",
        "solved",
        "imbalance before",
        "imbalance after",
    )
    middle = len(ratios) // 2
    flat = spread["width"][middle][2]
    findings = [
        f"With equal widths at PyTorch's initialisation the rescaling is small (rms {flat:.2f} "
        f"log2 units). With a middle layer 16 times narrower it is "
        f"{spread['width'][0][2]:.2f}, 16 times wider {spread['width'][-1][2]:.2f}; with weights "
        f"100 times smaller {spread['gain'][0][2]:.2f}, 100 times larger "
        f"{spread['gain'][-1][2]:.2f}.",
        "Largest distance of the predicted size from the solved one: "
        f"{max(abs(p[1] - p[2]) for s in spread.values() for p in s):.2f} log2 units. The "
        "prediction knows widths and initial scale alone; what it misses is each channel's own "
        "sample.",
    ]
    return Result(drawn, [Table(head, lines)], findings)


def _sizes(
    widths: tuple[int, ...], gain: float, samples: int
) -> tuple[float, list[float], list[float], list[float]]:
    """Root mean square log2 scale: predicted, and of samples; their imbalance before and after."""
    expected = expected_log2_scales(widths, "pytorch", gain=gain)
    predicted = float(np.sqrt(np.mean(np.repeat(expected, widths[1:-1]) ** 2)))
    x = torch.zeros(2, widths[0])
    reports = [
        pathlift.condition_(_network(widths, gain, seed), x, exact=False, verify=False)
        for seed in range(samples)
    ]
    return (
        predicted,
        [float(r.log2_scales.square().mean().sqrt()) for r in reports],
        [r.imbalance_before for r in reports],
        [r.imbalance_after for r in reports],
    )


def _draw_scales(series: list[tuple[float, float, float, float, float]], label: str) -> Any:
    def draw(axes: Any) -> None:
        x, predicted, solved, low, high = np.array(series).T
        axes.plot(x, predicted, label="predicted", **figures.line(0))
        axes.plot(x, solved, "s", color=figures.COLOURS[1], label="solved")
        axes.vlines(x, low, high, color=figures.COLOURS[1], alpha=0.4)
        axes.set(xlabel=label, ylabel="rms of log2 scales")
        figures.ticks(axes, [float(f"{v:.3g}") for v in x])
        axes.set_ylim(bottom=0)
        figures.legend(axes)

    return draw


_SOLVERS = ("newton", "coordinate")


def cost(name: str, small: bool, run: Run) -> Result:
    """Seconds of conditioning against network size for both solvers, beside a training epoch."""
    flat = Data("made", torch.randn(256, 784), torch.randint(10, (256,)), 10)
    images = Data("made", torch.randn(256, 3, 32, 32), torch.randint(10, (256,)), 10)
    widths = (16, 32, 64, 128, 256, 512) if small else (64, 128, 256, 512, 1024, 2048, 4096)
    channels = (4, 8, 16) if small else (8, 16, 32, 64)
    points = [(f"mlp:{w}-{w}-{w}", flat) for w in widths]
    points += [(f"resnet18:{c}", images) for c in channels]
    warm_up()
    lines: list[Sequence[str]] = []
    series: dict[str, list[tuple[int, float]]] = {}
    shares = []
    for architecture, data in points:
        run.progress(f"cost of {architecture}")
        model = build(architecture, data)
        size = sum(p.numel() for p in model.parameters())
        # An epoch of 50,000 samples in batches of 128, from the time of a few steps.
        epoch = epoch_seconds(model, data, rate=1e-6, batch=128, steps=3) / 2 * (50_000 // 128)
        totals = {}
        cells = []
        for solver in _SOLVERS:
            seconds = [_condition_seconds(architecture, data, solver) for _ in range(3)]
            best = min(seconds, key=lambda s: s[0] + s[1])
            totals[solver] = sum(best)
            cells += [f"{best[0]:.3f}", f"{sum(best):.2f}"]
            family = architecture.partition(":")[0]
            series.setdefault(f"{family}, {solver} alone", []).append((size, best[0]))
        shares.append(totals["newton"] / epoch)
        lines.append((architecture, f"{size:,}", *cells, f"{epoch:.1f}", f"{shares[-1]:.1%}"))
    figures.save(_draw_cost(series), run.output / f"{name}-seconds")
    head = (
        "network",
        "parameters",
        "newton: solve",
        "newton: all",
        "coordinate: solve",
        "coordinate: all",
        "epoch of 50,000",
        "newton of an epoch",
    )
    findings = [
        f"All of conditioning (capture, symmetry, criterion, solve, apply) took "
        f"{min(shares):.1%} to {max(shares):.1%} of one training epoch of 50,000 samples on this "
        f"machine, on one core. The share is largest for the smallest networks, where capturing "
        f"the graph is nearly all of it.",
    ]
    caption = "Seconds of the solve against the number of parameters, for both solvers."
    return Result([(f"{name}-seconds", caption)], [Table(head, lines)], findings)


def _condition_seconds(architecture: str, data: Data, solver: str) -> tuple[float, float]:
    """Seconds of the solve, and of everything else."""
    model = build(architecture, data)
    start = time.perf_counter()
    report = pathlift.condition_(model, data.inputs[:2], solver=solver, verify=False, exact=False)
    total = time.perf_counter() - start
    return report.seconds["solve"], total - report.seconds["solve"]


def _draw_cost(series: dict[str, list[tuple[int, float]]]) -> figures.Draw:
    def draw(axes: Any) -> None:
        for k, (label, points) in enumerate(series.items()):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, marker=figures.MARKERS[k], markersize=5, label=label, **figures.line(k))
        axes.set(xlabel="parameters", ylabel="seconds", xscale="log", yscale="log")
        figures.legend(axes)

    return draw
