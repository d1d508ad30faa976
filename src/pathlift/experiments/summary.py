"""What a comparison's rows say: each method at its own best rate and at equal rates.

Runs are paired by their seed. Intervals are bootstrap percentiles over seeds, the same draw of
seeds for a method and the baseline, and each draw chooses each method's best rate anew, so that
the choice is part of the uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathlift.errors import ArgumentError
from pathlift.experiments.store import Row

Array = NDArray[np.float64]
Interval = tuple[float, float] | None
_DRAWS = 2000
LEVEL = 95


@dataclass(frozen=True)
class Target:
    """A training loss (``"loss"``) of at most, or a training accuracy of at least, ``value``."""

    metric: str
    value: float

    def reached(self, curves: Array) -> Array:
        """First epoch (from 1) of curves (..., epochs); infinite if never."""
        hit = curves <= self.value if self.metric == "loss" else curves >= self.value
        return np.where(hit.any(-1), hit.argmax(-1) + 1.0, np.inf)

    def __str__(self) -> str:
        name = "loss" if self.metric == "loss" else "training accuracy"
        return f"{name} {self.value:.4g}"


@dataclass(frozen=True)
class Runs:
    """A method's runs in one setting.

    Attributes:
        curves: metric -> (rates, seeds, epochs); missing metrics are absent.
        preparation: (seeds,) seconds before the first step.
        conditioning: (rates, seeds, epochs) seconds during training.
        epoch_seconds: of one run that trains alone.
        imbalance: (seeds,) at the first step.
    """

    curves: dict[str, Array]
    preparation: Array
    conditioning: Array
    epoch_seconds: float
    imbalance: Array

    @property
    def loss(self) -> Array:
        """(rates, seeds, epochs) training loss; infinite once a run has diverged."""
        return self.curves["loss"]

    def epochs_to(self, target: Target) -> Array:
        """(rates, seeds) epochs to the target."""
        return target.reached(self.curves[target.metric])

    def seconds_to(self, target: Target) -> Array:
        """(rates, seeds) seconds to the target, all conditioning included."""
        epochs = self.epochs_to(target)
        spent = np.concatenate(
            [np.zeros_like(self.conditioning[..., :1]), np.cumsum(self.conditioning, -1)], -1
        )
        index = np.where(np.isfinite(epochs), epochs, 0).astype(int)
        during = np.take_along_axis(spent, index[..., None], -1)[..., 0]
        return epochs * self.epoch_seconds + during + self.preparation


@dataclass(frozen=True)
class Setting:
    """All methods on one architecture, data set and optimiser."""

    architecture: str
    data: str
    optimizer: str
    rates: list[float]
    seeds: list[int]
    epochs: int
    parameters: int
    runs: dict[str, Runs]

    @property
    def name(self) -> str:
        return f"{self.architecture} on {self.data}, {self.optimizer}"


def settings_of(rows: Sequence[Row]) -> list[Setting]:
    """Rows as arrays, one setting per (architecture, data, optimizer)."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["architecture"], row["data"], row["optimizer"]), []).append(row)
    return [_setting(name, members) for name, members in groups.items()]


def _setting(name: tuple[str, str, str], rows: list[Row]) -> Setting:
    rates = sorted({row["rate"] for row in rows})
    seeds = sorted({row["seed"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    by = {(row["method"], row["rate"], row["seed"]): row for row in rows}
    lacking = len(rates) * len(seeds) * len(methods) - len(by)
    if lacking:
        raise ArgumentError(f"{lacking} cells of {', '.join(name)} are missing; run the sweep.")
    # Cells with equal steps take equal time; other load on the machine only adds to it.
    times: dict[tuple[bool, bool], list[float]] = {}
    for row in rows:
        times.setdefault(_step(row), []).append(row["epoch_seconds"])
    runs = {}
    for method in methods:
        table = [[by[method, r, s] for s in seeds] for r in rates]
        curves = {
            metric: _array(table, metric)
            for metric in ("loss", "accuracy", "test_loss", "test_accuracy")
            if table[0][0][metric] is not None
        }
        conditioning = (
            _array(table, "conditioning_seconds")
            if all(r["conditioning_seconds"] is not None for line in table for r in line)
            else np.zeros_like(curves["loss"])
        )
        runs[method] = Runs(
            curves,
            preparation=np.median([[r["preparation_seconds"] for r in line] for line in table], 0),
            conditioning=conditioning,
            epoch_seconds=min(times[_step(table[0][0])]),
            imbalance=np.array([r["imbalance"] for r in table[0]]),
        )
    first = next(iter(runs.values()))
    parameters = min(row["parameters"] for row in rows)
    return Setting(*name, rates, seeds, first.loss.shape[-1], parameters, runs)


def _step(row: Row) -> tuple[bool, bool]:
    return row["method"] == "batch-norm", row["method"] == "path-sgd"


def _array(table: list[list[Row]], column: str) -> Array:
    return np.array([[r[column] for r in line] for line in table], dtype=np.float64)


def best_rate(values: Array) -> int:
    """Index of the rate with the lowest mean over seeds of ``values`` (rates, seeds)."""
    return int(values.mean(1).argmin())


def quickest_rate(runs: Runs, target: Target) -> int:
    """Index of the rate with the fewest median epochs to the target; ties go to the lower loss."""
    medians = np.median(runs.epochs_to(target), 1)
    final = runs.loss[..., -1].mean(1)
    return min(range(len(medians)), key=lambda k: (medians[k], final[k]))


def default_target(setting: Setting, share: float = 0.5) -> Target:
    """The median loss of the first method, at its best rate, after a share of the epochs."""
    runs = next(iter(setting.runs.values()))
    curves = runs.loss[best_rate(runs.loss[..., -1])]
    value = float(np.median(curves[:, max(math.ceil(share * curves.shape[1]) - 1, 0)]))
    return Target("loss", float(f"{value:.3g}"))


def draws_of(seeds: int) -> NDArray[np.int64]:
    """(draws, seeds) indices, drawn with replacement; always the same."""
    return np.random.default_rng(0).integers(0, seeds, (_DRAWS, seeds))


def percentiles(values: Array) -> Interval:
    """The central 95% of values, infinite ones included; None if a tenth is undefined."""
    defined = np.sort(values[~np.isnan(values)])
    if len(defined) < 0.9 * len(values) or not len(defined):
        return None
    edge = (100 - LEVEL) / 200
    last = len(defined) - 1
    return float(defined[math.floor(edge * last)]), float(defined[math.ceil((1 - edge) * last)])


def difference(method: Array, baseline: Array) -> tuple[float, Interval]:
    """Of the lowest mean over seeds, each at its best rate: method minus baseline.

    Args:
        method, baseline: (rates, seeds), lower is better.
    """
    index = draws_of(method.shape[1])

    def best(values: Array, chosen: NDArray[np.int64]) -> Array:
        return np.asarray(values[:, chosen].mean(-1).min(0))

    own = np.arange(method.shape[1])
    with np.errstate(invalid="ignore"):
        value = best(method, own) - best(baseline, own)
        return float(value), percentiles(best(method, index) - best(baseline, index))


def ratio(method: Array, baseline: Array) -> tuple[float, Interval]:
    """Of the lowest median over seeds, each at its best rate: baseline over method.

    Above 1 the method is quicker; infinite if the baseline never arrives, 0 if the method never
    does, NaN if neither does.
    """
    index = draws_of(method.shape[1])

    def best(values: Array, chosen: NDArray[np.int64]) -> Array:
        return np.asarray(np.median(values[:, chosen], -1).min(0))

    own = np.arange(method.shape[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        value = best(baseline, own) / best(method, own)
        return float(value), percentiles(best(baseline, index) / best(method, index))


def summarise(rows: Sequence[Row], target: Target | None = None) -> list[dict[str, Any]]:
    """One dict per setting, plain numbers and strings (JSON).

    The first method of the rows is the baseline.
    """
    return [summarise_setting(s, target or default_target(s)) for s in settings_of(rows)]


def summarise_setting(setting: Setting, target: Target) -> dict[str, Any]:
    """The numbers of one setting; see the module."""
    baseline = next(iter(setting.runs.values()))
    if target.metric not in baseline.curves:
        raise ArgumentError(f"{setting.name} has no {target.metric}: it has no classes.")
    return {
        "architecture": setting.architecture,
        "data": setting.data,
        "optimizer": setting.optimizer,
        "parameters": setting.parameters,
        "epochs": setting.epochs,
        "seeds": len(setting.seeds),
        "rates": setting.rates,
        "target": {"metric": target.metric, "value": target.value, "text": str(target)},
        "methods": {
            name: _entry(runs, baseline, setting, target) for name, runs in setting.runs.items()
        },
    }


def _entry(runs: Runs, baseline: Runs, setting: Setting, target: Target) -> dict[str, Any]:
    final = runs.loss[..., -1]
    best, quick = best_rate(final), quickest_rate(runs, target)
    epochs, seconds = runs.epochs_to(target), runs.seconds_to(target)
    gap, gap_interval = difference(final, baseline.loss[..., -1])
    fewer, fewer_interval = ratio(epochs, baseline.epochs_to(target))
    faster, faster_interval = ratio(seconds, baseline.seconds_to(target))
    accuracies = {
        metric: float(runs.curves[metric][best, :, -1].mean())
        for metric in ("accuracy", "test_accuracy", "test_loss")
        if metric in runs.curves
    }
    return {
        "imbalance": float(runs.imbalance.mean()),
        "best_rate": setting.rates[best],
        "best_rate_at_edge": best in (0, len(setting.rates) - 1) and len(setting.rates) > 1,
        "final_loss": float(final[best].mean()),
        "final_loss_difference": gap,
        "final_loss_interval": gap_interval,
        **{f"final_{metric}": value for metric, value in accuracies.items()},
        "quickest_rate": setting.rates[quick],
        "epochs_to_target": float(np.median(epochs[quick])),
        "epochs_ratio": fewer,
        "epochs_ratio_interval": fewer_interval,
        "seconds_to_target": float(np.median(seconds[quick])),
        "seconds_ratio": faster,
        "seconds_ratio_interval": faster_interval,
        "seconds_per_epoch": runs.epoch_seconds,
        "conditioning_seconds": float(
            np.median(runs.preparation) + np.median(runs.conditioning[best].sum(-1))
        ),
        "equal_rates": [_equal(runs, baseline, target, k, r) for k, r in enumerate(setting.rates)],
    }


def _equal(runs: Runs, baseline: Runs, target: Target, k: int, rate: float) -> dict[str, Any]:
    part = slice(k, k + 1)
    final, other = runs.loss[part, :, -1], baseline.loss[part, :, -1]
    gap, gap_interval = difference(final, other)
    epochs = runs.epochs_to(target)[part]
    fewer, fewer_interval = ratio(epochs, baseline.epochs_to(target)[part])
    return {
        "rate": rate,
        "diverged": int(np.isinf(final).sum()),
        "final_loss": float(final.mean()),
        "final_loss_difference": gap,
        "final_loss_interval": gap_interval,
        "epochs_to_target": float(np.median(epochs)),
        "epochs_ratio": fewer,
        "epochs_ratio_interval": fewer_interval,
    }


def plain(value: Any) -> Any:
    """The same for JSON, which has no infinities: they become None."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None, digits: int = 3) -> str:
    """For tables: significant digits, and words where there is no number."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "never"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


def span(interval: Interval, signed: bool = False) -> str:
    """An interval for tables; empty if there is none."""
    if interval is None:
        return ""
    low, high = ("∞" if math.isinf(v) else f"{v:+.2g}" if signed else f"{v:.2f}" for v in interval)
    return f"[{low}, {high}]"


HEADINGS = (
    "method",
    "imbalance",
    "best rate",
    "final loss",
    "difference [95%]",
    "test",
    "epochs",
    "fewer epochs [95%]",
    "seconds",
    "less time [95%]",
)


def table_rows(found: dict[str, Any], labels: dict[str, str]) -> Iterable[tuple[str, ...]]:
    """Cells of the main table of one setting, under :data:`HEADINGS`."""
    for k, (name, e) in enumerate(found["methods"].items()):
        test = e.get("final_test_accuracy", e.get("final_test_loss"))
        first = k == 0
        edge = "*" if e["best_rate_at_edge"] else ""
        yield (
            labels.get(name, name),
            number(e["imbalance"]),
            f"{e['best_rate']:g}{edge}",
            number(e["final_loss"]) if math.isfinite(e["final_loss"]) else "diverged",
            ""
            if first or not math.isfinite(e["final_loss_difference"])
            else f"{e['final_loss_difference']:+.2g} {span(e['final_loss_interval'], signed=True)}",
            number(test),
            number(e["epochs_to_target"]),
            "" if first else f"{_times(e['epochs_ratio'])} {span(e['epochs_ratio_interval'])}",
            number(e["seconds_to_target"]),
            "" if first else f"{_times(e['seconds_ratio'])} {span(e['seconds_ratio_interval'])}",
        )


def _times(value: float) -> str:
    if not value:
        return "never"  # the method does not arrive, the baseline does
    return "-" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:.2f}x"
