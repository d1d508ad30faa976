"""Studies: training runs over a family of architectures, their figures, tables and sentences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pathlift.experiments import figures
from pathlift.experiments.compare import (
    LABELS,
    draw_curves,
    draw_rates,
    equal_epochs,
    equal_loss,
    verdict,
)
from pathlift.experiments.store import Row, Store
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
from pathlift.experiments.sweep import Cell, Place, grid, sweep

CELLS = ".cells"
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
        finished: train nothing; take the seeds whose cells are all there.
    """

    output: Path
    place: Place
    processes: int = 1
    dask: str | None = None
    progress: Progress = print
    finished: bool = False

    def store(self) -> Store:
        """Finished cells: those of this machine, and those that were packed before."""
        return Store(self.output / CELLS, sorted(self.output.glob("*.cells.parquet")))


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
        before: what has to be done before anything of the studies is trained.
        full: what is added to the name where the full form stands beside the small one.
    """

    title: str
    about: str
    run: Callable[[str, bool, Run], Result]
    studies: Callable[[bool], dict[str, Study]] = field(default=lambda small: {})
    full: str = ""
    before: Callable[[dict[str, Study], Run], object] = field(default=lambda studies, run: None)


def interleaved(studies: Sequence[Study]) -> list[Cell]:
    """All cells, one network of every study in turn: cut short, each has come as far."""
    turns = [
        [[c for c in s.cells() if c.architecture == a] for a in s.family.values()] for s in studies
    ]
    rounds = itertools.zip_longest(*turns, fillvalue=[])
    return [cell for turn in rounds for cells in turn for cell in cells]


def finished(studies: dict[str, Study], known: set[str]) -> dict[str, Study]:
    """The studies with the seeds whose cells are all among the known keys; none: left out.

    Networks of which no seed is there are left out before that.
    """
    found = {}
    for suffix, study in studies.items():
        seeds = {
            x: _seeds_of(replace(study, family={x: a}), known) for x, a in study.family.items()
        }
        family = {x: a for x, a in study.family.items() if seeds[x]}
        common = set.intersection(*(seeds[x] for x in family)) if family else set()
        if common:
            shown = study.shown if study.shown in family else max(family)
            grid = {**study.grid, "seeds": sorted(common)}
            found[suffix] = replace(study, family=family, shown=shown, grid=grid)
    return found


def _seeds_of(study: Study, known: set[str]) -> set[int]:
    """Seeds whose cells are all among the known keys."""
    lacking = {c.seed for c in study.cells() if c.key not in known}
    return set(study.grid["seeds"]) - lacking


def stored(study: Study, run: Run) -> list[Row]:
    """A study's rows, trained where they are missing."""
    return train_cells(study.cells(), run)


def train_cells(cells: Sequence[Cell], run: Run) -> list[Row]:
    """Rows of cells, trained where they are missing."""
    return sweep(
        cells,
        run.store(),
        place=run.place,
        processes=run.processes,
        dask=run.dask,
        progress=run.progress,
    )


def run_study(name: str, study: Study, run: Run) -> Result:
    rows = stored(study, run)
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
    about = shown.name
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
        front = (f"{x:.3g}", setting.data, f["target"]["text"])
        lines += [(*front, *cells) for cells in table_rows(f, LABELS)]
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
