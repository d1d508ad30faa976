"""Continuous scales or powers of two? Every method at its own best rate on a fine grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pathlift.experiments import figures
from pathlift.experiments.compare import LABELS
from pathlift.experiments.study import Result, Run, Study, Table, run_study, stored
from pathlift.experiments.summary import (
    Interval,
    Runs,
    Setting,
    best_rate,
    difference,
    number,
    settings_of,
)

NONE, EXACT, CONTINUOUS, ENORM = "baseline", "path", "path-continuous", "enorm-continuous"
FOUR = (NONE, EXACT, CONTINUOUS, ENORM)
NAMES = {NONE: "none", EXACT: "powers of two", CONTINUOUS: "continuous", ENORM: LABELS[ENORM]}
LEAST_SEEDS = 5  # a bootstrap over fewer knows too few values
FACTOR = 1.5  # between neighbouring rates
# What is compared: a method and what it is compared with.
PAIRS = (
    (EXACT, NONE),
    (CONTINUOUS, NONE),
    (CONTINUOUS, EXACT),
    (ENORM, NONE),
    (ENORM, CONTINUOUS),
)


def fine(centre: float, below: int, above: int) -> list[float]:
    """Rates a factor 1.5 apart, so many below and above one; three digits."""
    return [float(f"{centre * FACTOR**k:.3g}") for k in range(-below, above + 1)]


def one_network(
    architecture: str, data: str, optimizer: str, rates: list[float], **settings: Any
) -> Study:
    """The study of one network on one data set with one optimiser; ``settings``: of the grid."""
    settings = {"methods": FOUR, "optimizers": (optimizer,), "data": (data,), **settings}
    return Study("network", {1.0: architecture}, {"rates": rates, **settings}, None, 1.0)


def studies(small: bool) -> dict[str, Study]:
    """One study per network, data set and optimiser; small: the digits alone."""
    bottleneck, code = "mlp:256-16-256", "autoencoder:128-32-8"
    seeds = range(20)
    found = {
        "-digits-autoencoder-sgd": one_network(
            code, "digits-pixelwise", "sgd", fine(1, 2, 4), seeds=seeds, epochs=40
        ),
        "-digits-classifier-sgd": one_network(
            bottleneck, "digits", "sgd", fine(1, 3, 2), seeds=seeds, epochs=20
        ),
        "-digits-autoencoder-adam": one_network(
            code, "digits-pixelwise", "adam", fine(0.0054, 2, 2), seeds=seeds, epochs=40
        ),
        "-digits-classifier-adam": one_network(
            bottleneck, "digits", "adam", fine(0.0081, 2, 2), seeds=seeds, epochs=20
        ),
    }
    if small:
        return found
    part = {"epochs": 5, "samples": 12_000, "held_out": False}
    found["-mnist-autoencoder-sgd"] = one_network(
        "autoencoder:256-64-16", "mnist", "sgd", fine(0.667, 2, 3), seeds=range(5), **part
    )
    found["-mnist-classifier-sgd"] = one_network(
        bottleneck, "mnist", "sgd", fine(0.3, 2, 2), seeds=range(5), **part
    )
    return found


class Comparison(NamedTuple):
    """One method against another, each at its own best rate; negative: the method is better."""

    setting: Setting
    method: str
    other: str
    loss: float
    interval: Interval
    test: float
    test_interval: Interval

    @property
    def verdict(self) -> str:
        """``"better"``, ``"worse"`` or ``"no difference shown"``, by the interval."""
        if self.interval is None:
            return "too few seeds"
        low, high = self.interval
        return "better" if high < 0 else "worse" if low > 0 else "no difference shown"

    @property
    def unit(self) -> float:
        """Loss of what it is compared with, at its best rate; gains are shares of it."""
        return _best(self.setting.runs[self.other], "loss")


def _final(runs: Runs, metric: str) -> Any:
    return runs.curves[metric][..., -1]


def _best(runs: Runs, metric: str) -> float:
    final = _final(runs, metric)
    return float(final[best_rate(final)].mean())


def compare(setting: Setting, pairs: Sequence[tuple[str, str]] = PAIRS) -> list[Comparison]:
    """All pairs whose methods have been run."""
    found = []
    for method, other in pairs:
        if {method, other} <= setting.runs.keys():
            own, base = setting.runs[method], setting.runs[other]
            loss = difference(_final(own, "loss"), _final(base, "loss"))
            test: tuple[float, Interval] = (math.nan, None)
            if "test_loss" in own.curves:
                test = difference(_final(own, "test_loss"), _final(base, "test_loss"))
            if len(setting.seeds) < LEAST_SEEDS:
                loss, test = (loss[0], None), (test[0], None)
            found.append(Comparison(setting, method, other, *loss, *test))
    return found


def decide(
    comparisons: Sequence[Comparison],
    pairs: Sequence[tuple[str, str]] = ((CONTINUOUS, EXACT), (CONTINUOUS, NONE)),
) -> list[str]:
    """Is the first of each pair better or equal everywhere, against the second?"""
    sentences = []
    for method, other in pairs:
        against = [c for c in comparisons if (c.method, c.other) == (method, other)]
        counts = [c.verdict for c in against]
        worse = "; ".join(c.setting.name for c in against if c.verdict == "worse")
        answer = f"worse on {worse}" if worse else "better or equal everywhere that was measured"
        sentences.append(
            f"{NAMES[method][0].upper()}{NAMES[method][1:]} against {NAMES[other]}: {answer} "
            f"({len(against)} comparisons: better in {counts.count('better')}, worse in "
            f"{counts.count('worse')}, no difference shown in "
            f"{counts.count('no difference shown')}, too few seeds in "
            f"{counts.count('too few seeds')})."
        )
    return sentences


def table(comparisons: Sequence[Comparison]) -> Table:
    """One line per comparison."""
    head = (
        *("network", "data", "optimizer", "seeds", "method", "against", "best rates"),
        *("loss", "difference [95%]", "share [95%]", "test: difference [95%]", "verdict"),
    )
    lines: list[Sequence[str]] = []
    for c in comparisons:
        s = c.setting
        rates = " / ".join(f"{rate_of(s, n):g}" for n in (c.method, c.other))
        losses = " / ".join(number(_best(s.runs[n], "loss")) for n in (c.method, c.other))
        lines.append(
            (
                *(s.architecture, s.data, s.optimizer, str(len(s.seeds))),
                *(NAMES[c.method], NAMES[c.other], rates, losses),
                _spanned(c.loss, c.interval, ".2g"),
                _spanned(c.loss / c.unit, c.interval, ".1%", c.unit),
                "" if math.isnan(c.test) else _spanned(c.test, c.test_interval, ".2g"),
                c.verdict,
            )
        )
    return Table(head, lines)


def rate_of(setting: Setting, method: str) -> float:
    """The method's own best rate."""
    return setting.rates[best_rate(_final(setting.runs[method], "loss"))]


def _spanned(value: float, interval: Interval, form: str, unit: float = 1.0) -> str:
    if interval is None:
        return f"{value:+{form}}"
    low, high = (v / unit for v in interval)
    return f"{value:+{form}} [{low:+{form}}, {high:+{form}}]"


def _draw(comparisons: Sequence[Comparison]) -> figures.Draw:
    """Loss over that without conditioning, with intervals: one line per setting."""
    shown = [c for c in comparisons if c.other == NONE and math.isfinite(c.loss)]
    settings = list(dict.fromkeys(c.setting.name for c in shown))
    methods = list(dict.fromkeys(c.method for c in shown))

    def draw(axes: Any) -> None:
        for k, method in enumerate(methods):
            colour = figures.line(k + 1)["color"]
            mine = [c for c in shown if c.method == method]
            shift = 0.16 * (k - (len(methods) - 1) / 2)
            heights = [settings.index(c.setting.name) + shift for c in mine]
            for c, y in zip(mine, heights, strict=True):
                if c.interval is not None:
                    ends = 1 + np.array(c.interval) / c.unit
                    axes.plot(ends, [y, y], color=colour, linewidth=2.5, alpha=0.5)
            ratios = [1 + c.loss / c.unit for c in mine]
            marker = figures.MARKERS[k]
            axes.plot(ratios, heights, marker, color=colour, markersize=5, label=NAMES[method])
        axes.axvline(1, color="#555", linewidth=1)
        axes.set_yticks(range(len(settings)), [n.replace(" on ", "\non ") for n in settings])
        axes.set_ylim(len(settings) - 0.5, -0.5)
        axes.set(xlabel="final loss / that without conditioning, own best rates")
        low, high = axes.get_xlim()
        marks = [0.125, 0.25, 0.5, 1, 2, 4, 8]
        figures.ticks(axes, [m for m in marks if low <= m <= high])
        figures.legend(axes)

    return draw


def experiment(name: str, chosen: dict[str, Study], run: Run) -> Result:
    """Train every study; compare; decide."""
    results, settings = [], []
    for suffix, study in chosen.items():
        results.append(run_study(name + suffix, study, run))
        settings += settings_of(stored(study, run))
    comparisons = [c for s in settings for c in compare(s)]
    figures.save(
        _draw(comparisons), run.output / f"{name}-decision", (6.4, 1.6 + 0.8 * len(chosen))
    )
    caption = (
        "Final training loss of every method over that without conditioning, each at its own best "
        "rate, with 95% intervals over paired seeds (none: too few seeds); left is better."
    )
    return Result(
        [(f"{name}-decision", caption), *(f for r in results for f in r.figures)],
        [table(comparisons), *(t for r in results for t in r.tables)],
        decide(comparisons),
    )
