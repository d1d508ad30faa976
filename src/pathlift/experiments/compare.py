"""``pathlift compare``: train every (method, architecture, data, optimiser, rate, seed); a page."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import pathlift
from pathlift.errors import ArgumentError
from pathlift.experiments import figures
from pathlift.experiments.architectures import INITIALIZATIONS
from pathlift.experiments.data import DATA_SETS
from pathlift.experiments.methods import METHODS
from pathlift.experiments.optimizers import OPTIMIZERS
from pathlift.experiments.store import Store
from pathlift.experiments.summary import (
    HEADINGS,
    LEVEL,
    Setting,
    Target,
    best_rate,
    default_target,
    number,
    plain,
    settings_of,
    span,
    summarise_setting,
    table_rows,
)
from pathlift.experiments.sweep import add_place_arguments, grid, place_of, sweep
from pathlift.text import columns

LABELS = {name: method.label for name, method in METHODS.items()}
Progress = Callable[[str], object]


def add_arguments(parser: Any) -> None:
    """The options of ``pathlift compare``."""
    add = parser.add_argument
    add("--methods", default="baseline,path,enorm", help=f"of {','.join(METHODS)}; or all")
    add(
        "--architectures",
        default="autoencoder:128-32-8",
        metavar="NAME:WIDTHS,…",
        help="such as mlp:64-32, autoencoder:128-32-8, convolutional:128, resnet18:64",
    )
    add("--data", default="digits", help=f"of {','.join(DATA_SETS)}")
    known = ",".join(o for o in OPTIMIZERS if o != "path-sgd")
    add("--optimizers", default="sgd", help=f"of {known}")
    add("--rates", default="0.1,0.3,1,3,10", help="learning rates")
    add("--seeds", type=int, default=5, help="number of seeds, paired over methods")
    add("--epochs", type=int, default=60, help="of every run (default: 60)")
    add("--batch", type=int, default=128, help="samples per step (default: 128)")
    add("--initialization", choices=INITIALIZATIONS, default="pytorch", help="of all weights")
    add("--every", type=int, default=5, help="epochs between conditionings of path-schedule")
    add("--samples", type=int, help="train on the first so many samples")
    add("--all-samples", action="store_true", help="train on everything, without a test set")
    add("--norm", action="store_true", help="batch norm in every network")
    add("--target", help="loss=0.25 or accuracy=0.99; else what the baseline reaches half-way")
    add("-o", "--output", type=Path, default=Path("comparison"), help="folder of page and store")
    add_place_arguments(parser)
    add("--job-cells", type=int, help="cells that train together at most")


def run(args: Any, progress: Progress) -> dict[str, Any]:
    """The command: trains what is missing, writes ``index.html`` and ``summary.json``."""
    rates = [_number(r, "--rates") for r in _list(args.rates)]
    for name, least in (("seeds", 1), ("epochs", 1), ("batch", 1), ("every", 1), ("processes", 1)):
        if getattr(args, name) < least:
            raise ArgumentError(f"--{name} must be at least {least}; found {getattr(args, name)}.")
    cells = grid(
        list(METHODS) if args.methods == "all" else _list(args.methods),
        _list(args.architectures),
        _list(args.data),
        _list(args.optimizers),
        rates,
        range(args.seeds),
        epochs=args.epochs,
        batch=args.batch,
        initialization=args.initialization,
        every=args.every,
        held_out=not args.all_samples,
        samples=args.samples,
        norm=args.norm,
    )
    target = None if args.target is None else _target(args.target)
    rows = sweep(
        cells,
        Store(args.output / "cells"),
        place=place_of(args),
        processes=args.processes,
        dask=args.dask,
        job_cells=args.job_cells,
        progress=progress,
    )
    progress("writing the page")
    found = write(rows, args.output, target, command(args))
    return {
        "data": {"page": str(args.output / "index.html"), "settings": plain(found)},
        "text": lambda width: f"{text(found, width)}\n\nThe page is {args.output / 'index.html'}",
    }


def write(
    rows: Sequence[dict[str, Any]], output: Path, target: Target | None, made_by: str
) -> list[dict[str, Any]]:
    """Write ``index.html`` and ``summary.json``; returns the summary."""
    settings = settings_of(rows)
    found = [summarise_setting(s, target or default_target(s)) for s in settings]
    (output / "summary.json").write_text(json.dumps(plain(found), indent=1), encoding="utf-8")
    (output / "index.html").write_text(_page(settings, found, made_by), encoding="utf-8")
    return found


def command(args: Any) -> str:
    """The command line that gives this comparison, without what does not change its numbers."""
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["pathlift compare"]
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        kept = action.dest not in ("help", "output", "dask", "processes", "job_cells")
        if kept and value != action.default:
            words.append(action.option_strings[-1] + ("" if value is True else f" {value}"))
    return " ".join(words)


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str, option: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ArgumentError(f"{option} takes positive numbers; found {text!r}.")
    return value


def _target(text: str) -> Target:
    metric, _, value = text.partition("=")
    if metric not in ("loss", "accuracy"):
        raise ArgumentError(f"--target {text!r} is neither loss=NUMBER nor accuracy=NUMBER.")
    return Target(metric, _number(value, "--target"))


def text(found: Sequence[dict[str, Any]], width: int | None = None) -> str:
    """The main tables as plain text, in so many columns of characters (None: as many as needed)."""
    parts = []
    for setting in found:
        head = (
            f"{setting['architecture']} on {setting['data']}, {setting['optimizer']}: "
            f"{setting['seeds']} seeds, {setting['epochs']} epochs; "
            f"target {setting['target']['text']}"
        )
        table = columns([HEADINGS, *table_rows(setting, LABELS)], width)
        parts.append(f"{head}\n{table}")
    return "\n\n".join(parts)


def verdict(setting: dict[str, Any], name: str) -> str:
    """One sentence on a method, whichever way it falls."""
    e = setting["methods"][name]
    interval = e["final_loss_interval"]
    if interval is None or not np.isfinite(e["final_loss_difference"]):
        final = "no final losses to compare"
    elif interval[1] < 0:
        final = "a lower final loss than the baseline's"
    elif interval[0] > 0:
        final = "a higher final loss than the baseline's"
    else:
        final = "no difference in final loss that these seeds can show"
    quick, value = e["epochs_ratio_interval"], e["epochs_ratio"]
    if quick is None or np.isnan(value):
        speed = "the target is reached by too few runs to compare"
    elif quick[0] > 1:
        speed = f"the target in {_fold(value)} fewer epochs"
    elif quick[1] < 1:
        more = f"the target in {_fold(1 / value)} more epochs" if value else ""
        speed = more or "the target is never reached, as the baseline's is"
    else:
        speed = "no difference in epochs to the target that these seeds can show"
    return f"{LABELS.get(name, name)}: {final}; {speed}"


def _fold(value: float) -> str:
    return "infinitely (never otherwise)" if np.isinf(value) else f"{value:.2f} times"


def draw_curves(setting: Setting, metric: str = "loss") -> figures.Draw:
    """Learning curves, each method at its own best rate: median and quartiles over seeds."""

    def draw(axes: Any) -> None:
        for k, (name, runs) in enumerate(setting.runs.items()):
            best = best_rate(runs.loss[..., -1])
            values = runs.curves[metric][best]
            values = np.where(np.isfinite(values), values, np.nan)
            x = np.arange(1, values.shape[1] + 1)
            label = f"{LABELS.get(name, name)}, rate {setting.rates[best]:g}"
            shown = ~np.isnan(values).any(0)
            low, middle, high = np.percentile(values[:, shown], [25, 50, 75], axis=0)
            marker = figures.MARKERS[k % len(figures.MARKERS)]
            every = (k, max(1, int(shown.sum()) // 6))  # set off, so that none hides another
            style = {**figures.line(k), "marker": marker, "markevery": every, "markersize": 4}
            axes.plot(x[shown], middle, label=label, **style)
            axes.fill_between(
                x[shown], low, high, color=figures.line(k)["color"], alpha=0.2, linewidth=0
            )
        scale = "log" if metric.endswith("loss") else "linear"
        name = metric.replace("_", " ") if metric.startswith("test") else f"training {metric}"
        axes.set(xlabel="epoch", ylabel=name, yscale=scale)
        figures.plain_ticks(axes)
        figures.legend(axes)

    return draw


def draw_rates(setting: Setting) -> figures.Draw:
    """Final loss against the learning rate: mean over seeds, dots for single seeds."""

    def draw(axes: Any) -> None:
        for k, (name, runs) in enumerate(setting.runs.items()):
            final = runs.loss[..., -1]
            final = np.where(np.isfinite(final), final, np.nan)
            style = figures.line(k)
            axes.plot(setting.rates, final, ".", color=style["color"], alpha=0.35, markersize=4)
            marker = figures.MARKERS[k % len(figures.MARKERS)]
            axes.plot(
                setting.rates,
                final.mean(1),
                marker=marker,
                markersize=5,
                label=LABELS.get(name, name),
                **style,
            )
        start = float(np.median(next(iter(setting.runs.values())).loss[:, :, 0]))
        top = axes.get_ylim()[1]
        if np.isfinite(start) and top > 4 * start:  # one run about to diverge would hide the rest
            axes.set_ylim(top=4 * start)
        axes.set(xlabel="learning rate", ylabel="final training loss", yscale="log")
        figures.ticks(axes, setting.rates)
        figures.plain_ticks(axes)
        figures.legend(axes)

    return draw


def draw_speeds(setting: dict[str, Any]) -> figures.Draw:
    """Epochs saved at each method's own best rate, with intervals."""

    def draw(axes: Any) -> None:
        shown = [
            (LABELS.get(n, n), e["epochs_ratio"], e["epochs_ratio_interval"])
            for n, e in list(setting["methods"].items())[1:]
        ]
        for k, (_, value, interval) in enumerate(shown):
            style = figures.line(k + 1)
            if not np.isfinite(value) or not value:
                axes.text(1, k, f"  {_never(value)}", va="center", color=style["color"])
                continue
            if interval is not None and np.isfinite(interval[1]):
                axes.plot(interval, [k, k], color=style["color"], linewidth=3, alpha=0.5)
            marker = figures.MARKERS[(k + 1) % len(figures.MARKERS)]
            axes.plot([value], [k], marker, color=style["color"])
        axes.axvline(1, color="#555", linewidth=1)
        axes.set_yticks(range(len(shown)), [n for n, _, _ in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set(xlabel="ratio of epochs, baseline / method")

    return draw


def _never(value: float) -> str:
    """What a ratio of epochs without a finite value means."""
    if np.isnan(value):
        return "never, nor does the baseline"
    return "never" if value == 0 else "the baseline never"


def _reordered(cells: Sequence[str]) -> list[str]:
    """Cells of the main table with what matters first, so that it is seen without scrolling."""
    return [cells[HEADINGS.index(h)] for h in _FIRST] + [
        c for h, c in zip(HEADINGS, cells, strict=True) if h not in _FIRST
    ]


_FIRST = ("method", "fewer epochs [95%]", "difference [95%]", "epochs", "final loss", "best rate")
_EXPLAIN = f"""<p>{figures.PATH_KERNEL}</p>
<p><em>Own best rate</em>: every method has the learning rate that suits it best,
chosen for the lowest mean final loss over seeds (in its column) and for the fewest median epochs
to the target (in its columns); an asterisk marks a rate at the edge of the grid. Brackets are
{LEVEL}% bootstrap intervals over paired seeds; every draw of seeds chooses the best rates anew.
Seconds are those of one run that trains alone, all conditioning included. <em>Imbalance</em> is
log(arithmetic mean / geometric mean) of the path kernel's diagonal per parameter, at the first
step.</p>"""


def _page(settings: Sequence[Setting], found: Sequence[dict[str, Any]], made_by: str) -> str:
    parts = ["<h1>Same function, other start: a comparison</h1>", _EXPLAIN]
    parts += [_section(s, f) for s, f in zip(settings, found, strict=True)]
    parts.append(
        f"<p>Made by <code>{html.escape(made_by)}</code>, pathlift {pathlift.__version__}.</p>"
    )
    return figures.page("pathlift: a comparison", "\n".join(parts))


def _section(setting: Setting, found: dict[str, Any]) -> str:
    target = found["target"]["text"]
    sentences = "".join(
        f"<li>{html.escape(verdict(found, name))}." for name in list(found["methods"])[1:]
    )
    equal_head = ["rate", *(LABELS.get(m, m) for m in found["methods"])]
    losses, epochs = [], []
    for k, rate in enumerate(setting.rates):
        entries = [e["equal_rates"][k] for e in found["methods"].values()]
        losses.append([f"{rate:g}", *(equal_loss(e, j == 0) for j, e in enumerate(entries))])
        epochs.append([f"{rate:g}", *(equal_epochs(e, j == 0) for j, e in enumerate(entries))])
    speeds = (
        figures.embed(
            draw_speeds(found),
            "Epochs saved by each method, with intervals",
            (4.8, 1.3 + 0.35 * len(found["methods"])),
        )
        if len(found["methods"]) > 1
        else ""
    )
    return f"""<h2>{html.escape(setting.name)}</h2>
<p>{setting.parameters:,} parameters, {len(setting.seeds)} seeds, {setting.epochs} epochs, batches
and initial weights paired. Target: training {html.escape(target)}.</p>
<ul>{sentences}</ul>
<h3>Each method at its own best rate</h3>
{figures.table(_reordered(HEADINGS), map(_reordered, table_rows(found, LABELS)))}
{figures.embed(draw_curves(setting), "Training loss against epochs, own best rates")}
<p>Training loss, each method at its own best rate: median over seeds, band between quartiles.</p>
{figures.embed(draw_rates(setting), "Final training loss against learning rate")}
<p>Final training loss against the learning rate: dots are seeds, lines their mean; a line stops
where a seed diverged.</p>
{speeds}
<p>Epochs to the target, baseline over method, each at its own best rate, with intervals: right of
the line the method is quicker.</p>
<h3>At equal rates</h3>
<p>Final loss, and the difference to the baseline at the same rate:</p>
{figures.table(equal_head, losses)}
<p>Median epochs to the target, and the ratio of the baseline's epochs at the same rate to them:</p>
{figures.table(equal_head, epochs)}"""


def equal_loss(entry: dict[str, Any], first: bool) -> str:
    """Final loss at one rate, and the difference to the baseline's."""
    if entry["diverged"]:
        return f"{entry['diverged']} diverged"
    value = number(entry["final_loss"])
    gap = entry["final_loss_difference"]
    if first or not np.isfinite(gap):
        return value
    return f"{value} ({gap:+.2g} {span(entry['final_loss_interval'], signed=True)})"


def equal_epochs(entry: dict[str, Any], first: bool) -> str:
    """Median epochs to the target at one rate, and the baseline's over them."""
    value = number(entry["epochs_to_target"])
    if first or not np.isfinite(entry["epochs_ratio"]) or not entry["epochs_ratio"]:
        return value
    return f"{value} ({entry['epochs_ratio']:.2f}x {span(entry['epochs_ratio_interval'])})"
