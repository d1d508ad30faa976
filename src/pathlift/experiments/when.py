"""When does conditioning help? One table of all settings that were measured, as JSON.

A *gain* is the share by which a method's final training loss is below the baseline's: at each
method's own best rate, at the baseline's best rate, for continuous scales at the rate nearest to
that times the change of the largest stable rate, and at the smallest rate of the grid.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pathlift.curvature import curvature
from pathlift.experiments import catalogue
from pathlift.experiments.architectures import width_ratio
from pathlift.experiments.compare import LABELS
from pathlift.experiments.exactness import (
    CONTINUOUS,
    ENORM,
    EXACT,
    LEAST_SEEDS,
    NONE,
    compare,
    decide,
    fine,
    one_network,
    rate_of,
    table,
)
from pathlift.experiments.exactness import studies as decided
from pathlift.experiments.judging import (
    FIXED,
    OWN,
    auc,
    counts,
    distinct,
    misses,
    network_of,
    norm_of,
    sign_of,
    verdict_of,
)
from pathlift.experiments.methods import loss_of
from pathlift.experiments.study import Result, Run, Study, Table, stored
from pathlift.experiments.summary import Interval, Setting, difference, plain, settings_of
from pathlift.experiments.sweep import Cell, Place, cell_data, start_of

FILE = "when.json"
_BATCHES, _CURVATURE_SEEDS = 4, 1
# Of studies that the rule was there before: those of other experiments, and Muon's.
LATER = "-of-"
# Criteria for steps that don't grow with the gradient: first powers in place of squares for Adam's,
# equal spectral norms for Muon's.
FIRST, SPECTRAL = ("path-root", "path-first"), ("spectral",)
_OWN: dict[str, tuple[str, ...]] = {"sgd": (), "muon": SPECTRAL}


def _study(architecture: str, optimizer: str, rates: list[float], **settings: Any) -> Study:
    given = {
        "methods": (NONE, CONTINUOUS, *_OWN.get(optimizer, FIRST)),
        "data": ("digits",),
        "seeds": range(5),
        "epochs": 20,
        **settings,
    }
    (data,) = given.pop("data")
    return one_network(architecture, data, optimizer, rates, **given)


def contrasts() -> dict[str, Study]:
    """Beside those of the decision: equal widths, norms, convolutions, Adam's own criteria."""
    code = {"data": ("digits-pixelwise",), "epochs": 40}
    kaiming = {"initialization": "kaiming-normal"}
    return {
        "-equal-sgd": _study("mlp:64-64-64", "sgd", fine(0.667, 2, 2)),
        "-norm-equal": _study("mlp:64-64-64-64-64-64", "sgd", fine(0.3, 2, 2), norm=True),
        "-norm-bottleneck": _study("mlp:256-16-256", "sgd", fine(0.675, 2, 5), norm=True),
        "-classifier-adam": _study("mlp:256-16-256", "adam", fine(0.0081, 2, 2)),
        "-autoencoder-adam": _study("autoencoder:128-32-8", "adam", fine(0.0054, 2, 2), **code),
        "-autoencoder-adamw": _study("autoencoder:128-32-8", "adamw", fine(0.0054, 2, 2), **code),
        f"{LATER}classifier-muon": _study(
            "mlp:256-16-256", "muon", [0.0005, 0.001, 0.002, 0.004, 0.008]
        ),
        "-narrow-code": _study("autoencoder:128-32-2", "sgd", fine(1, 2, 2), **code),
        "-wide-middle": _study("mlp:16-256-16", "sgd", fine(0.667, 2, 2)),
        "-language-adamw": _study(
            "transformer:32-2",
            "adamw",
            [0.0001875, 0.000375, 0.00075, 0.0015, 0.003, 0.006, 0.012, 0.024],
            methods=(NONE, CONTINUOUS, ENORM),
            data=("python-manual",),
            samples=1920,
            batch=16,
            epochs=2,
        ),
        "-convolutional": _study("convolutional:8", "sgd", fine(0.1, 2, 4), **kaiming),
    }


def studies(small: bool) -> dict[str, Study]:
    """Those of the decision (small: the digits' alone), contrasts, optimisers, and full sizes."""
    found = {**decided(small), **contrasts()}
    gathered = {"optimizers": catalogue.optimizers(True)}
    if not small:
        gathered |= {f"{name}-full": ones(False) for name, ones in _FULL.items()}
    for name, ones in gathered.items():
        found |= {f"{LATER}{name}{suffix}": study for suffix, study in ones.items()}
    return found


_FULL: dict[str, Callable[[bool], dict[str, Study]]] = {
    "autoencoder": catalogue.autoencoder,
    "fully-connected": catalogue.fully_connected,
    "optimizers": catalogue.optimizers,
    "fully-convolutional": catalogue.fully_convolutional,
    "resnet": catalogue.resnet,
}


def stable_rate_factor(cell: Cell, place: Place) -> float:
    """Largest stable rate of gradient descent once conditioned (continuous), over that before.

    From the Gauss-Newton matrix's top eigenvalue on the first batches, geometric mean over seeds.
    """
    data, _ = cell_data(cell, place)
    inputs = data.inputs[: _BATCHES * cell.batch]
    wanted = data.wanted[: len(inputs)]
    batches = list(zip(inputs.split(cell.batch), wanted.split(cell.batch), strict=True))
    logs, loss = [], loss_of(data)
    for seed in range(_CURVATURE_SEEDS):
        after, before = (
            curvature(start_of(replace(cell, seed=seed, method=m), data).model, batches, loss)
            for m in (CONTINUOUS, NONE)
        )
        logs.append(math.log(after.stable_rate / before.stable_rate))
    return math.exp(sum(logs) / len(logs))


def entry(setting: Setting, cell: Cell, factor: float) -> dict[str, Any]:
    """What is known of a setting, before training (``factor``: of stable rates) and after."""
    base = setting.runs[NONE]
    return {
        "architecture": setting.architecture,
        "data": setting.data,
        "optimizer": setting.optimizer,
        "batch_norm": cell.norm,
        "initialization": cell.initialization,
        "parameters": setting.parameters,
        "epochs": setting.epochs,
        "samples": cell.samples,
        "seeds": len(setting.seeds),
        "rates": setting.rates,
        "width_ratio": width_ratio(cell.architecture),
        "imbalance_before": float(base.imbalance.mean()),
        "stable_rate_factor": factor,
        "baseline_rate": rate_of(setting, NONE),
        "methods": {n: _method(setting, n, factor) for n in setting.runs if n != NONE},
    }


def _method(setting: Setting, name: str, factor: float) -> dict[str, Any]:
    base = setting.rates.index(rate_of(setting, NONE))
    # The grid's rate where the step is as far from diverging as the baseline's at its best.
    matched = min(setting.rates, key=lambda r: abs(math.log(r / setting.rates[base] / factor)))
    every = range(len(setting.rates))
    own = rate_of(setting, name)
    at_matched = gain_of(setting, name, [setting.rates.index(matched)], [base])
    return {
        "label": LABELS[name],
        "imbalance_after": float(setting.runs[name].imbalance.mean()),
        "rate": own,
        "rate_ratio": own / rate_of(setting, NONE),
        "own_best_rates": gain_of(setting, name, every),
        "baseline_best_rate": gain_of(setting, name, [base]),
        **({"matched_rate": at_matched} if name == CONTINUOUS else {}),
        "smallest_rate": gain_of(setting, name, [0]),
    }


def gain_of(
    setting: Setting, name: str, rates: Sequence[int], baselines: Sequence[int] | None = None
) -> dict[str, Any]:
    """The share of the baseline's loss that the method gains, with its interval and its sign.

    The sign is 0 where the interval has both, and None where there are too few seeds for one. The
    baseline has ``rates`` to choose from, too, or ``baselines``.
    """
    chosen = ((name, rates), (NONE, rates if baselines is None else baselines))
    final = [setting.runs[n].loss[list(places), :, -1] for n, places in chosen]
    value, interval = difference(final[0], final[1])
    unit = float(final[1].mean(1).min())
    share: Interval = None
    sign = None
    if interval is not None and math.isfinite(unit) and len(setting.seeds) >= LEAST_SEEDS:
        share = (-interval[1] / unit, -interval[0] / unit)
        sign = 1 if share[0] > 0 else -1 if share[1] < 0 else 0
    return {"gain": -value / unit, "interval": share, "sign": sign}


def experiment(name: str, chosen: dict[str, Study], run: Run) -> Result:
    """Gather every study's setting; write ``when.json``."""
    entries, comparisons = [], []
    for suffix, study in chosen.items():
        cells = {c.architecture: c for c in study.cells()}
        for setting in settings_of(stored(study, run)):
            cell = cells[setting.architecture]
            comparisons += compare(setting, _BETWEEN)
            run.progress(f"curvature of {cell.architecture} on {cell.data}")
            factor = stable_rate_factor(cell, run.place)
            later = suffix.startswith(LATER)
            entries.append({**entry(setting, cell, factor), "later": later})
    text = json.dumps(plain(entries), indent=1)
    (run.output / FILE).write_text(text + "\n", encoding="utf-8")
    between = table(comparisons)._replace(title="Continuous, powers of two and ENorm compared")
    sentences = [*_sentences(entries), *decide(comparisons, _BETWEEN)]
    return Result([], [_table(entries), _rule_table(entries), between], sentences)


_BETWEEN = ((CONTINUOUS, EXACT), (ENORM, CONTINUOUS))


def _table(entries: Sequence[dict[str, Any]]) -> Table:
    head = (
        *("network", "data", "optimizer", "seeds", "width ratio", "method", "imbalance"),
        *(
            "stable rate / baseline's",
            "best rate / baseline's",
            "gain, own best rates",
            "at the baseline's best",
            "at that times the stable ratio",
        ),
        "at the smallest rate",
    )
    lines: list[Sequence[str]] = []
    for e in entries:
        network = network_of(e)
        for m in e["methods"].values():
            gains = [
                shown(m[k]) if k in m else ""
                for k in ("own_best_rates", "baseline_best_rate", "matched_rate", "smallest_rate")
            ]
            imbalance = _fall(e, m, " → ")
            front = (network, e["data"], e["optimizer"], str(e["seeds"]))
            about = (f"{e['width_ratio']:g}", m["label"], imbalance)
            stable = f"{e['stable_rate_factor']:.2g}" if m["label"] == LABELS[CONTINUOUS] else ""
            rates = (stable, f"{m['rate_ratio']:.2g}")
            lines.append((*front, *about, *rates, *gains))
    return Table(head, lines)


def _rule_table(entries: Sequence[dict[str, Any]]) -> Table:
    """The rule's verdicts against what was seen."""
    head = (
        *("settings", "method", "at", "verdict: likely to help", "nothing to do", "don't"),
        "a gain ranked above no gain (AUC)",
    )
    lines: list[Sequence[str]] = []
    kinds = {
        "that the rule was first made from": [e for e in entries if not e["later"]],
        "measured later": [e for e in entries if e["later"]],
        "in all": entries,
    }
    for label, members in kinds.items():
        own = distinct(members)  # of equal settings one counts
        for method, rates in itertools.product((CONTINUOUS, ENORM), _AT):
            known = [e for e in own if sign_of(e, rates, method) is not None]
            cells = (
                f"{gained} gained, {level} no difference shown, {lost} lost"
                for gained, level, lost in counts(known, rates, method).values()
            )
            quality = auc(known, rates, method)
            ranked = "" if math.isnan(quality) else f"{quality:.2f}"
            front = (f"{len(known)} {label}", LABELS[method], _AT[rates])
            if known:
                lines.append((*front, *cells, ranked))
    return Table(head, lines)


_AT = {
    OWN: "own best rates",
    FIXED: "the baseline's best rate",
    "matched_rate": "that times the stable ratio",
    "smallest_rate": "the smallest rate",
}


def _fall(entry: dict[str, Any], method: dict[str, Any], between: str) -> str:
    """The imbalance before and after, where paths are defined."""
    values = entry["imbalance_before"], method["imbalance_after"]
    return "not defined" if math.isnan(values[0]) else between.join(f"{v:.3f}" for v in values)


def shown(gain: dict[str, Any]) -> str:
    """A gain and its interval, as shares."""
    if not math.isfinite(gain["gain"]):
        return "diverged"
    interval = gain["interval"]
    span = "" if interval is None else f" [{interval[0]:+.0%}, {interval[1]:+.0%}]"
    return f"{gain['gain']:+.0%}{span}"


def _sentences(entries: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    for e in entries:
        m = e["methods"][CONTINUOUS]
        gain = m["own_best_rates"]
        signs = {1: "a gain", 0: "no difference shown", -1: "a loss", None: "too few seeds"}
        what = signs[gain["sign"]]
        miss = "" if gain["sign"] is None or not misses([e]) else " A miss."
        found.append(
            f"{e['architecture']} on {e['data']}, {e['optimizer']}{norm_of(e)}, continuous: {what} "
            f"at own best rates ({shown(gain)}); imbalance {_fall(e, m, ' to ')}, best rate "
            f"{m['rate_ratio']:.2g} times the baseline's. The rule says {verdict_of(e)}.{miss}"
        )
    return found
