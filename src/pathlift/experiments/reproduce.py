"""``pathlift reproduce NAME``: the paper's experiments, in full or small on embedded data.

Every experiment writes its figures (PNG and SVG), its table (CSV and Markdown) and the command that
made them. A folder of several is summed up by a ``README.md``.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import pathlift
from pathlift.errors import ArgumentError
from pathlift.experiments import figures
from pathlift.experiments.architectures import build
from pathlift.experiments.compare import (
    LABELS,
    draw_curves,
    draw_rates,
    equal_epochs,
    equal_loss,
    verdict,
)
from pathlift.experiments.data import Data
from pathlift.experiments.methods import warm_up
from pathlift.experiments.store import Store
from pathlift.experiments.summary import (
    HEADINGS,
    Setting,
    Target,
    best_rate,
    default_target,
    quickest_rate,
    settings_of,
    summarise_setting,
    table_rows,
)
from pathlift.experiments.sweep import Cell, Place, add_place_arguments, grid, place_of, sweep
from pathlift.experiments.training import epoch_seconds
from pathlift.theory import expected_log2_scales

Progress = Callable[[str], object]


class Table(NamedTuple):
    """Headings and lines of cells; a table with a title is folded away under it on the page."""

    head: Sequence[str]
    lines: list[Sequence[str]]
    title: str = ""


@dataclass(frozen=True)
class Run:
    """How an experiment is run.

    Attributes:
        output: folder of figures and tables.
        place: data folder, device, threads.
        processes: of the sweep.
        dask: see :func:`pathlift.experiments.sweep.sweep`.
        progress: called with a line now and then.
    """

    output: Path
    place: Place
    processes: int = 1
    dask: str | None = None
    progress: Progress = print


@dataclass(frozen=True)
class Result:
    """What an experiment found: figures by file name with their captions, tables, sentences."""

    figures: list[tuple[str, str]]
    tables: list[Table]
    findings: list[str]


@dataclass(frozen=True)
class Study:
    """Training runs over a family of architectures.

    Attributes:
        axis: what grows along the family, the figure's x axis.
        family: x -> architecture.
        grid: arguments of :func:`pathlift.experiments.sweep.grid`, architectures aside.
        target: None: what the baseline reaches half-way, for each architecture.
        shown: the x whose curves are drawn.
        logarithmic: the x axis.
    """

    axis: str
    family: dict[float, str]
    grid: dict[str, Any]
    target: Target | None
    shown: float
    logarithmic: bool = False

    def cells(self) -> list[Cell]:
        """All runs."""
        return grid(architectures=list(self.family.values()), **self.grid)


@dataclass(frozen=True)
class Experiment:
    """One of the paper's experiments.

    Attributes:
        title: of its section.
        about: what is done, in full and small.
        run: ``(name, small, run) -> result``; writes figures.
        studies: (small) -> studies by suffix, for those that train.
    """

    title: str
    about: str
    run: Callable[[str, bool, Run], Result]
    studies: Callable[[bool], dict[str, Study]] = field(default=lambda small: {})


def _two_moons(small: bool) -> dict[str, Study]:
    exponents = range(-6, 1) if small else range(-8, 1)
    settings = {
        "methods": ("baseline", "path", "enorm"),
        "data": ("two-moons",),
        "optimizers": ("sgd",),
        "rates": [float(f"{10 ** (k / 2):.1g}") for k in exponents],
        "seeds": range(10 if small else 30),
        "epochs": 30 if small else 300,
        "batch": 32,
        "initialization": "kaiming-normal",
    }
    family = {float(w): "mlp:" + "-".join([str(w)] * 5) for w in (2, 4, 8, 16, 32)}
    target = Target("accuracy", 0.99)
    return {"": Study("width of the 5 hidden layers", family, settings, target, 8.0, True)}


def _fully_connected(small: bool) -> dict[str, Study]:
    width = 32 if small else 500
    settings = {
        "methods": ("baseline", "path", "enorm"),
        "data": ("digits" if small else "cifar10",),
        "optimizers": ("sgd",),
        "rates": (0.01, 0.03, 0.1, 0.3) if small else (1e-3,),
        "seeds": range(5 if small else 3),
        "epochs": 40 if small else 100,
        "norm": True,
    }
    family = {float(d): "mlp:" + "-".join([str(width)] * d) for d in range(3, 9)}
    target = Target("accuracy", 0.99)
    return {"": Study("hidden layers", family, settings, target, 5.0)}


def _fully_convolutional(small: bool) -> dict[str, Study]:
    settings = {
        "methods": ("baseline", "path", "enorm"),
        "data": ("digits" if small else "cifar10",),
        "optimizers": ("sgd",),
        "rates": (0.01, 0.03, 0.1, 0.3) if small else (1e-3, 1e-2, 1e-1),
        "seeds": range(5 if small else 3),
        "epochs": 20 if small else 128,
        "initialization": "kaiming-normal",
    }
    family = {4.0: "convolutional:4", 8.0: "convolutional:8"} if small else {}
    family = family or {128.0: "convolutional:128"}
    return {"": Study("channels", family, settings, None, max(family))}


def _resnet(small: bool) -> dict[str, Study]:
    settings = {
        "methods": ("baseline", "path", "enorm"),
        "data": ("digits" if small else "cifar10",),
        "optimizers": ("sgd",),
        "rates": (0.01, 0.03, 0.1, 0.3, 1.0) if small else (1e-3, 1e-2, 1e-1),
        "seeds": range(3),
        "epochs": 8 if small else 128,
    }
    width = 6 if small else 64
    return {"": Study("channels", {float(width): f"resnet18:{width}"}, settings, None, width)}


def _autoencoder(small: bool) -> dict[str, Study]:
    shared = {"methods": ("baseline", "path", "enorm"), "optimizers": ("sgd",)}
    if small:
        growing = {
            "data": ("digits",),
            "rates": (0.3, 1.0, 3.0),
            "seeds": range(5),
            "epochs": 40,
        }
        family = {64.0 / c: f"autoencoder:128-32-{c}" for c in (32, 16, 8, 4, 2)}
    else:
        growing = {
            "data": ("mnist",),
            "rates": (0.1, 1.0),
            "seeds": range(5),
            "epochs": 50,
        }
        family = {784.0 / c: f"autoencoder:512-128-{c}" for c in (98, 49, 28, 14, 7, 4)}
    claim = {"seeds": range(20), "epochs": 60, "held_out": False}
    as_one = {"data": ("digits",), "rates": (0.1, 0.3, 1.0, 3.0, 10.0)}
    by_pixel = {"data": ("digits-pixelwise",), "rates": (0.1, 0.3, 1.0, 2.0, 3.0, 10.0)}
    return {
        "": Study("compression factor", family, {**shared, **growing}, None, max(family), True),
        **{
            suffix: Study(
                "compression factor",
                {8.0: "autoencoder:128-32-8"},
                {**shared, **claim, **source},
                target,
                8.0,
            )
            for suffix, source, target in (
                ("-20-seeds", as_one, Target("loss", 0.4)),
                ("-20-seeds-pixelwise", by_pixel, Target("loss", 0.25)),
            )
        },
    }


def _train(name: str, small: bool, run: Run) -> Result:
    """Train every study of an experiment."""
    parts = [
        _study(name + suffix, study, run)
        for suffix, study in EXPERIMENTS[name].studies(small).items()
    ]
    return Result(
        [f for p in parts for f in p.figures],
        [t for p in parts for t in p.tables],
        [s for p in parts for s in p.findings],
    )


def _study(name: str, study: Study, run: Run) -> Result:
    rows = sweep(
        study.cells(),
        Store(run.output / ".cells"),
        place=run.place,
        processes=run.processes,
        dask=run.dask,
        progress=run.progress,
    )
    settings = {s.architecture: s for s in settings_of(rows)}
    ordered = [(x, settings[a]) for x, a in sorted(study.family.items())]
    targets = [study.target or default_target(s) for _, s in ordered]
    found = [summarise_setting(s, t) for (_, s), t in zip(ordered, targets, strict=True)]
    drawn = []

    def save(suffix: str, draw: figures.Draw, caption: str) -> None:
        figures.save(draw, run.output / f"{name}-{suffix}")
        drawn.append((f"{name}-{suffix}", caption))

    if len(ordered) > 1:
        caption = (
            f"Epochs to the target over the {study.axis}, each method at its own best rate: "
            f"median and quartiles over seeds; points at the top edge never arrive."
        )
        save("epochs", _over_family(study, ordered, targets, _epochs), caption)
        caption = f"Final training loss over the {study.axis}, own best rates: mean over seeds."
        save("loss", _over_family(study, ordered, targets, _final), caption)
    shown = settings[study.family[study.shown]]
    about = f"{shown.architecture} on {shown.data}"
    curve = "accuracy" if study.target and study.target.metric == "accuracy" else "loss"
    caption = f"Training {curve} of {about}, own best rates: median and quartiles over seeds."
    save("curves", draw_curves(shown, curve), caption)
    if len(shown.rates) > 1:
        caption = f"Final training loss of {about} against the learning rate; dots are seeds."
        save("rates", draw_rates(shown), caption)
    tables = [_study_table(study, ordered, found)]
    if len(shown.rates) > 1:
        tables.append(_equal_table(study, ordered, found))
    return Result(drawn, tables, _findings(ordered, found))


def _study_table(
    study: Study, ordered: list[tuple[float, Setting]], found: list[dict[str, Any]]
) -> Table:
    head = (study.axis, "data", "target", *HEADINGS)
    lines: list[Sequence[str]] = []
    for (x, setting), f in zip(ordered, found, strict=True):
        for cells in table_rows(f, LABELS):
            lines.append((f"{x:.3g}", setting.data, f["target"]["text"], *cells))
    return Table(head, lines)


def _equal_table(
    study: Study, ordered: list[tuple[float, Setting]], found: list[dict[str, Any]]
) -> Table:
    """Every rate by itself: final loss (difference) and epochs (ratio) of every method."""
    names = list(found[0]["methods"])
    labels = [LABELS.get(n, n) for n in names]
    head = (study.axis, "rate", *(f"loss, {n}" for n in labels), *(f"epochs, {n}" for n in labels))
    lines: list[Sequence[str]] = []
    for (x, setting), f in zip(ordered, found, strict=True):
        for k, rate in enumerate(setting.rates):
            entries = [f["methods"][n]["equal_rates"][k] for n in names]
            losses = [equal_loss(e, j == 0) for j, e in enumerate(entries)]
            epochs = [equal_epochs(e, j == 0) for j, e in enumerate(entries)]
            lines.append((f"{x:.3g}", f"{rate:g}", *losses, *epochs))
    return Table(head, lines, "At equal rates")


def _findings(ordered: list[tuple[float, Setting]], found: list[dict[str, Any]]) -> list[str]:
    sentences = []
    for (_, setting), f in zip(ordered, found, strict=True):
        before = f["methods"]["baseline"]["imbalance"]
        for name in list(f["methods"])[1:]:
            after = f["methods"][name]["imbalance"]
            sentences.append(
                f"{setting.architecture} on {setting.data}, {verdict(f, name)} (imbalance "
                f"{before:.3f} before, {after:.3f} after)."
            )
    return sentences


def _epochs(setting: Setting, name: str, target: Target) -> tuple[float, float, float]:
    runs = setting.runs[name]
    epochs = runs.epochs_to(target)[quickest_rate(runs, target)]
    low, middle, high = np.percentile(epochs, [25, 50, 75], method="inverted_cdf")
    return float(low), float(middle), float(high)


def _final(setting: Setting, name: str, target: Target) -> tuple[float, float, float]:
    final = setting.runs[name].loss[..., -1]
    values = final[best_rate(final)]
    return float(np.min(values)), float(np.mean(values)), float(np.max(values))


def _over_family(
    study: Study,
    ordered: list[tuple[float, Setting]],
    targets: list[Target],
    measure: Callable[[Setting, str, Target], tuple[float, float, float]],
) -> figures.Draw:
    """A measure of every method over the family, with its range."""

    def draw(axes: Any) -> None:
        xs = np.array([x for x, _ in ordered])
        top = max(s.epochs for _, s in ordered) * 1.05 if measure is _epochs else math.inf
        for k, name in enumerate(ordered[0][1].runs):
            triples = np.array(
                [measure(s, name, t) for (_, s), t in zip(ordered, targets, strict=True)]
            )
            triples = np.minimum(triples, top)
            triples = np.where(np.isfinite(triples), triples, np.nan)
            # Side by side: equal values would hide each other.
            shift = 1.03 ** (k - 1) if study.logarithmic else 0.0
            place = xs * shift if study.logarithmic else xs + 0.06 * (k - 1)
            style = figures.line(k)
            axes.plot(
                place,
                triples[:, 1],
                marker=figures.MARKERS[k],
                markersize=5,
                label=LABELS.get(name, name),
                **style,
            )
            axes.vlines(place, triples[:, 0], triples[:, 2], color=style["color"], alpha=0.4)
        what = "epochs to the target" if measure is _epochs else "final training loss"
        axes.set(xlabel=study.axis, ylabel=what)
        if study.logarithmic:
            figures.ticks(axes, [float(f"{x:.3g}") for x in xs])
        if measure is _final:
            axes.set_yscale("log")
        figures.legend(axes)

    return draw


def _network(widths: Sequence[int], gain: float, seed: int) -> nn.Module:
    from pathlift.experiments.architectures import mlp

    torch.manual_seed(seed)
    model = mlp(widths)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(gain)
    return model


def _scales(name: str, small: bool, run: Run) -> Result:
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
            expected = expected_log2_scales(widths, "pytorch", gain=gain)
            hidden = np.repeat(expected, widths[1:-1])
            solved, before, after = [], [], []
            for seed in range(samples):
                model = _network(widths, gain, seed)
                report = pathlift.condition_(model, torch.zeros(2, base), exact=False, verify=False)
                solved.append(float(report.log2_scales.square().mean().sqrt()))
                before.append(report.imbalance_before)
                after.append(report.imbalance_after)
            predicted = float(np.sqrt(np.mean(hidden**2)))
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


def _cost(name: str, small: bool, run: Run) -> Result:
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


EXPERIMENTS: dict[str, Experiment] = {
    "two-moons": Experiment(
        "Two moons: MLPs of growing width",
        "Five hidden layers of 2 to 32 units, Kaiming-normal initialisation, SGD, batch 32; epochs "
        "to 99% training accuracy. Small: "
        "30 epochs, 10 seeds, rates 1e-3 to 1; full: 300 epochs, 30 seeds, rates 1e-4 to 1.",
        _train,
        _two_moons,
    ),
    "fully-connected": Experiment(
        "Fully connected networks with batch norm",
        "3 to 8 hidden layers, batch norm, SGD, batch 128; epochs to 99% training accuracy. Full: "
        "CIFAR-10, width 500, rate 1e-3, 100 epochs, 3 seeds. Small: digits, width 32, four rates, "
        "40 epochs, 5 seeds.",
        _train,
        _fully_connected,
    ),
    "fully-convolutional": Experiment(
        "A fully convolutional network",
        "3 layers of w channels, 3 of 2w, two of 5w/2 and the classes (Gitman and Ginsburg), SGD, "
        "batch 128, Kaiming-normal initialisation, without batch norm. Full: CIFAR-10, w = 128, "
        "128 epochs, 3 seeds. Small: digits as 8x8 images, w = 4 and 8, 20 epochs, 5 seeds.",
        _train,
        _fully_convolutional,
    ),
    "resnet": Experiment(
        "ResNet-18 with 1x1 shortcuts",
        "SGD, batch 128, 3 seeds. Full: CIFAR-10, 64 channels, 128 epochs. Small: digits as 8x8 "
        "images, 6 channels, 8 epochs.",
        _train,
        _resnet,
    ),
    "autoencoder": Experiment(
        "Autoencoders of growing compression",
        "SGD, batch 128, PyTorch's initialisation. Full: MNIST, 784-512-128-c, two rates. Small: "
        "digits, 64-128-32-c, three rates, 40 epochs, 5 seeds. "
        "In both, the digits autoencoder with a code of 8 "
        "is also trained for 60 epochs on all samples at rates 0.1 to 10 with 20 seeds, with all "
        "pixels scaled by one number (as everywhere else) and with each scaled by its own.",
        _train,
        _autoencoder,
    ),
    "scales": Experiment(
        "Size of the rescaling at initialisation",
        "Networks n-n-(rn)-n-10 with PyTorch's initialisation: root mean square of the log2 scales "
        "against r, and against a factor on all initial weights (r = 1). Full: n = 512, 10 "
        "samples; small: n = 64, 3 samples.",
        _scales,
    ),
    "cost": Experiment(
        "Cost of conditioning",
        "Seconds of conditioning a network, with each solver, and of one training epoch of 50,000 "
        "samples in batches of 128 (from the time of a few steps).",
        _cost,
    ),
}


def add_arguments(parser: Any) -> None:
    """The options of ``pathlift reproduce``."""
    add = parser.add_argument
    add("name", choices=[*EXPERIMENTS, "all"])
    add("--small", action="store_true", help="on embedded data, in minutes on one core")
    add("-o", "--output", type=Path, default=Path("docs/reproduced"))
    add_place_arguments(parser)


def main(args: Any, progress: Progress) -> dict[str, Any]:
    """The command."""
    if args.processes < 1:
        raise ArgumentError(f"--processes must be at least 1; found {args.processes}.")
    args.output.mkdir(parents=True, exist_ok=True)
    run = Run(args.output, place_of(args), args.processes, args.dask, progress)
    names = list(EXPERIMENTS) if args.name == "all" else [args.name]
    for name in names:
        progress(f"{name}{' (small)' if args.small else ''}")
        write(name, args.small, run)
    index = write_index(args.output)
    return {
        "data": {"index": str(index), "experiments": names},
        "text": f"Results of {', '.join(names)} are in {index}",
    }


def write(name: str, small: bool, run: Run) -> Result:
    """Run an experiment; write its figures, ``NAME.csv`` and ``NAME.md``."""
    experiment = EXPERIMENTS[name]
    result = experiment.run(name, small, run)
    for k, table in enumerate(result.tables):
        path = run.output / f"{name}{'' if k == 0 else f'-{k + 1}'}.csv"
        path.write_text(_csv(table), encoding="utf-8", newline="")
    command = f"pathlift reproduce {name}{' --small' if small else ''}"
    if run.place.device != "cpu":
        command += f" --device {run.place.device}"
    parts = [f"## {experiment.title}", experiment.about, f"    {command}"]
    parts += [f"![{caption}]({file}.png)\n\n{caption}" for file, caption in result.figures]
    parts += [_markdown(table) for table in result.tables]
    parts.append("What the numbers say:")
    parts.append("\n".join(f"- {sentence}" for sentence in result.findings))
    (run.output / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return result


DISCUSSION = "discussion.md"  # written by people; kept


def write_index(output: Path) -> Path:
    """``README.md`` of every experiment that has been run, after the discussion if there is one."""
    parts = ["# Reproduced experiments", _PREFACE.strip()]
    discussion = output / DISCUSSION
    if discussion.is_file():
        parts.append(discussion.read_text(encoding="utf-8").strip())
    parts += [
        (output / f"{name}.md").read_text(encoding="utf-8").strip()
        for name in EXPERIMENTS
        if (output / f"{name}.md").is_file()
    ]
    path = output / "README.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


_PREFACE = """
All of this page but its discussion is written by `pathlift reproduce all --small`, or by the
command under each heading. *Imbalance*: log(arithmetic mean / geometric mean) of the path kernel's
diagonal per parameter, at the first step. *Best rate*: lowest mean final loss over seeds; an
asterisk: at the edge of the grid. *Epochs* (median over seeds) and *seconds* (one run alone, all
conditioning included) to the target at the rate that gets there first. *Fewer epochs*, *less time*:
the baseline's over the method's, above 1 is better. Brackets: 95% bootstrap intervals over paired
seeds, best rates chosen anew in every draw. A default target is the loss that the baseline reaches
half-way.
"""


def _csv(table: Table) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([table.head, *table.lines])
    return buffer.getvalue()


def _markdown(table: Table) -> str:
    lines = [table.head, ["---"] * len(table.head), *table.lines]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    if table.title:
        text = f"<details><summary>{table.title}</summary>\n\n{text}\n\n</details>"
    return text
