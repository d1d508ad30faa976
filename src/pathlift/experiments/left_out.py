"""The rule of :mod:`pathlift.verdict` on settings it was not made from: told first, trained then.

The verdicts are written to ``left-out-verdicts.json`` before a network of a setting is trained. A
verdict that is in the file is never computed again, so that a rule which has changed since is not
tested on what it has seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from pathlift.experiments.architectures import width_ratio
from pathlift.experiments.catalogue import factor_two
from pathlift.experiments.compare import LABELS
from pathlift.experiments.exactness import CONTINUOUS, ENORM, NONE, one_network, rate_of
from pathlift.experiments.judging import (
    RIGHT,
    Entry,
    facts_of_entry,
    network_of,
    rank_auc,
    verdict_of,
)
from pathlift.experiments.study import Result, Run, Study, Table, stored
from pathlift.experiments.summary import Setting, plain, settings_of
from pathlift.experiments.sweep import Place, cell_data, start_of
from pathlift.experiments.when import gain_of, shown
from pathlift.verdict import VERDICTS

FILE = "left-out-verdicts.json"
_IMAGES = {"epochs": 5, "samples": 12_000, "held_out": False}
_BY_DATA: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 20},
    "mnist": _IMAGES,
    "fashion-mnist": _IMAGES,
    "cifar10": {**_IMAGES, "samples": 6_000},
    "python-manual": {"samples": 1920, "batch": 16, "epochs": 2},
}
_SEEN = {1: "gain", 0: "no difference", -1: "loss", None: "too few seeds"}
_EMBEDDED = ("digits", "photographs", "python-manual")


def _study(
    architecture: str,
    data: str,
    optimizer: str,
    rates: tuple[float, int, int],
    **settings: Any,
) -> Study:
    given = {"methods": (NONE, CONTINUOUS, ENORM), "seeds": range(5)}
    given |= {**_BY_DATA.get(data, {}), **settings}
    return one_network(architecture, data, optimizer, factor_two(*rates), **given)


def _chosen(found: dict[str, Study], small: bool) -> dict[str, Study]:
    """All; small: those on embedded data."""
    return {s: v for s, v in found.items() if not small or v.grid["data"][0] in _EMBEDDED}


def studies(small: bool) -> dict[str, Study]:
    """Networks, data and optimisers that no run behind the rule had together; small: embedded."""
    kaiming, norm = {"initialization": "kaiming-normal"}, {"norm": True}
    mnist, fashion, manual = "mnist", "fashion-mnist", "python-manual"
    deep = "mlp:128-128-128-128-128-128"
    found = {
        "-deep-kaiming": _study(deep, "digits", "sgd", (0.1, 4, 3), **kaiming),
        "-convolutional": _study("convolutional:16", "digits", "sgd", (0.1, 2, 3), **kaiming),
        "-shallow-code": _study("autoencoder:256-32", mnist, "sgd", (2, 4, 3)),
        "-wide-code": _study("autoencoder:512-128-32", fashion, "sgd", (1, 4, 3)),
        "-narrow-code": _study("autoencoder:256-64-8", mnist, "sgd", (1, 4, 3)),
        "-photographs": _study("mlp:512-32-512", "cifar10", "sgd", (0.1, 4, 3)),
        "-bottleneck": _study("mlp:256-16-256", fashion, "sgd", (0.25, 4, 3)),
        "-narrowing": _study("mlp:512-256-128-64", mnist, "sgd", (0.25, 4, 3)),
        "-wide-middle": _study("mlp:32-512-32", mnist, "sgd", (0.25, 4, 3)),
        "-equal": _study("mlp:256-256-256", fashion, "sgd", (0.25, 4, 3)),
        "-norm-equal": _study("mlp:256-256-256", fashion, "sgd", (0.25, 4, 4), **norm),
        "-norm-bottleneck": _study("mlp:512-32-512", mnist, "sgd", (0.5, 4, 4), **norm),
        "-code-adam": _study("autoencoder:256-32", fashion, "adam", (0.002, 4, 3)),
        "-bottleneck-adamw": _study("mlp:256-16-256", fashion, "adamw", (0.002, 4, 3)),
        "-code-muon": _study("autoencoder:256-64-16", fashion, "muon", (0.008, 4, 3)),
        "-code-momentum": _study("autoencoder:256-64-16", fashion, "momentum", (0.125, 4, 3)),
        "-bottleneck-momentum": _study("mlp:256-16-256", mnist, "momentum", (0.05, 4, 3)),
        # The slowest last.
        "-wide-language": _study("transformer:64-1", manual, "adamw", (0.003, 4, 1)),
        "-language-sgd": _study("transformer:32-2", manual, "sgd", (0.5, 3, 2)),
    }
    return _chosen(found, small)


def studies_again(small: bool) -> dict[str, Study]:
    """A second set, left out of the rule that the first one changed; small: embedded."""
    kaiming, norm = {"initialization": "kaiming-normal"}, {"norm": True}
    mnist, fashion, photographs = "mnist", "fashion-mnist", "cifar10"
    deep, thin = "mlp:128-128-128-128", "convolutional:12"
    found = {
        "-convolutional-thin": _study(thin, "digits", "sgd", (0.1, 4, 2)),
        "-convolutional-norm": _study(thin, "digits", "sgd", (0.2, 3, 3), **norm),
        "-deep-bottleneck": _study("mlp:128-128-8-128-128", "digits", "sgd", (0.2, 4, 3)),
        "-code-middling": _study("autoencoder:384-128-24", fashion, "sgd", (1, 4, 3)),
        "-code-momentum-shallow": _study("autoencoder:128-32", mnist, "momentum", (0.25, 4, 3)),
        "-tight-bottleneck": _study("mlp:128-8-128", mnist, "sgd", (0.25, 4, 3)),
        "-tapering": _study("mlp:400-100-25", fashion, "sgd", (0.25, 4, 3)),
        "-wide-middle-momentum": _study("mlp:64-256-64", mnist, "momentum", (0.05, 4, 3)),
        "-code-kaiming": _study("autoencoder:200-50-20", mnist, "sgd", (1, 4, 3), **kaiming),
        "-code-adamw-shallow": _study("autoencoder:128-32", mnist, "adamw", (0.002, 4, 3)),
        "-equal-adam": _study("mlp:256-256", fashion, "adam", (0.002, 4, 3)),
        "-norm-deep": _study(deep, mnist, "sgd", (0.25, 4, 4), **norm),
        "-code-norm": _study("autoencoder:256-32", fashion, "sgd", (1, 4, 4), **norm),
        "-narrow-code-momentum": _study("autoencoder:256-32-4", fashion, "momentum", (0.125, 4, 3)),
        "-uneven": _study("mlp:512-64-512-64", mnist, "sgd", (0.25, 4, 3)),
        "-photographs-momentum": _study("mlp:256-32-256", photographs, "momentum", (0.02, 4, 3)),
        "-photographs-code": _study("autoencoder:256-32", photographs, "sgd", (1, 4, 3)),
    }
    return _chosen(found, small)


def studies_third(small: bool) -> dict[str, Study]:
    """A third set, left out of the rule that the first two changed; small: embedded."""
    norm = {"norm": True}
    mnist, fashion, colour = "mnist", "fashion-mnist", "cifar10"
    adaptive = (0.002, 4, 3)
    found = {
        "-patches": _study("autoencoder:64-16", "photographs", "sgd", (0.5, 4, 3), epochs=20),
        "-completion": _study("completion:256-32", mnist, "sgd", (1, 4, 3)),
        "-completion-momentum": _study("completion:128-16", fashion, "momentum", (0.125, 4, 3)),
        "-completion-equal": _study("completion:200-200", mnist, "sgd", (1, 4, 3)),
        "-completion-adam": _study("completion:256-64-256", fashion, "adam", adaptive),
        "-completion-adam-narrow": _study("completion:256-16", mnist, "adam", adaptive),
        "-code-equal": _study("autoencoder:128-128", mnist, "sgd", (1, 4, 3)),
        "-code-adam-deep": _study("autoencoder:300-60-12", mnist, "adam", adaptive),
        "-code-norm-deep": _study("autoencoder:512-64-16", mnist, "sgd", (1, 4, 4), **norm),
        "-tight-norm": _study("mlp:128-16-128", fashion, "sgd", (0.5, 4, 4), **norm),
        "-bottleneck-adam": _study("mlp:300-30-300", mnist, "adam", adaptive),
        "-halving": _study("mlp:1024-64", fashion, "sgd", (0.25, 4, 3)),
        "-tightest-code": _study("autoencoder:256-64-2", fashion, "sgd", (1, 4, 3)),
        "-colour-norm": _study("mlp:200-200-200-200", colour, "sgd", (0.1, 4, 4), **norm),
        "-colour-code-adamw": _study("autoencoder:128-16", colour, "adamw", adaptive),
    }
    return _chosen(found, small)


def studies_fourth(small: bool) -> dict[str, Study]:
    """A fourth set, left out of the rule that the first three changed; small: embedded."""
    mnist, fashion = "mnist", "fashion-mnist"
    adaptive, momentum = (0.002, 4, 3), (0.125, 4, 3)
    found = {
        "-digits-code": _study("autoencoder:48-12", "digits", "momentum", (0.125, 4, 3)),
        "-digits-completion": _study("completion:64-64", "digits", "sgd", (0.5, 4, 3)),
        "-one-layer": _study("autoencoder:64", mnist, "sgd", (1, 4, 3)),
        "-completion-level": _study("completion:64-64", fashion, "sgd", (1, 4, 3)),
        "-completion-one-layer": _study("completion:48", mnist, "momentum", momentum),
        "-completion-adamw": _study("completion:96-48", mnist, "adamw", adaptive),
        "-code-adam-small": _study("autoencoder:128-24", fashion, "adam", adaptive),
        "-code-momentum-small": _study("autoencoder:96-32", fashion, "momentum", momentum),
        "-falling": _study("mlp:128-32", fashion, "momentum", (0.05, 4, 3)),
        "-small-bottleneck": _study("mlp:64-16-64", fashion, "sgd", (0.25, 4, 3)),
        "-level-adam": _study("mlp:64-64-64", mnist, "adam", adaptive),
        "-small-norm": _study("mlp:128-32-128", mnist, "sgd", (0.5, 4, 4), norm=True),
    }
    return _chosen(found, small)


def told(study: Study, place: Place) -> Entry:
    """What the rule says of a setting, and what it says it from; nothing is trained.

    Imbalances are means over the seeds.
    """
    cell = study.cells()[0]
    data, _ = cell_data(cell, place)

    def imbalance(method: str) -> float:
        cells = (replace(cell, seed=seed, method=method) for seed in study.grid["seeds"])
        values = [start_of(c, data).imbalance for c in cells]
        return math.fsum(values) / len(values)

    facts: Entry = {
        "architecture": cell.architecture,
        "data": cell.data,
        "optimizer": cell.optimizer,
        "batch_norm": cell.norm,
        "initialization": cell.initialization,
        "width_ratio": width_ratio(cell.architecture),
        "imbalance_before": imbalance(NONE),
        "methods": {CONTINUOUS: {"imbalance_after": imbalance(CONTINUOUS)}},
    }
    return {**facts, "verdict": verdict_of(facts)}


def foretold(chosen: dict[str, Study], run: Run) -> dict[str, Entry]:
    """The verdicts by suffix: those in the file, and those added to it now."""
    path = run.output / FILE
    known: dict[str, Entry] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for suffix, study in chosen.items():
        if suffix not in known:
            run.progress(f"the rule on {study.cells()[0].architecture}")
            known[suffix] = plain(told(study, run.place))
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return {suffix: known[suffix] for suffix in chosen}


class Outcome(NamedTuple):
    """A setting's verdict, and what came of it."""

    told: Entry
    setting: Setting

    @property
    def verdict(self) -> str:
        """What the rule had said."""
        return str(self.told["verdict"])

    def sign(self, method: str = CONTINUOUS) -> int | None:
        """Of what a method gained at own best rates; None: too few seeds."""
        sign: int | None = self.gain(method)["sign"]
        return sign

    def gain(self, method: str = CONTINUOUS, rates: Sequence[int] | None = None) -> dict[str, Any]:
        """At own best rates of those numbered (None: all)."""
        every = range(len(self.setting.rates))
        return gain_of(self.setting, method, every if rates is None else rates)

    @property
    def right(self) -> bool | None:
        """Whether the verdict was; None: too few seeds to say."""
        sign = self.sign()
        return None if sign is None else sign in RIGHT[self.verdict]


def experiment(name: str, chosen: dict[str, Study], run: Run) -> Result:
    """Write the verdicts, train, and compare."""
    verdicts = foretold(chosen, run)
    outcomes = [
        Outcome(verdicts[suffix], setting)
        for suffix, study in chosen.items()
        for setting in settings_of(stored(study, run))
    ]
    return Result([], [_table(outcomes), _counts(outcomes)], _sentences(outcomes))


def _table(outcomes: Sequence[Outcome]) -> Table:
    head = (
        *("network", "data", "optimizer", "width ratio", "outputs / layer"),
        *("imbalance", "verdict", "seen", "right"),
        *("gain, continuous", "best rate / baseline's", "continuous, old rate"),
        *("gain, ENorm", "ENorm, old rate", "at the grid's edge"),
    )
    lines: list[Sequence[str]] = []
    for o in outcomes:
        t, rates = o.told, o.setting.rates
        best = {m: rate_of(o.setting, m) for m in (NONE, CONTINUOUS, ENORM)}
        old = [rates.index(best[NONE])]
        edge = [m for m, rate in best.items() if rate in (rates[0], rates[-1])]
        after = t["methods"][CONTINUOUS]["imbalance_after"]
        imbalances = (t["imbalance_before"], after)
        lines.append(
            (
                *(network_of(t), t["data"], t["optimizer"], f"{t['width_ratio']:.3g}"),
                f"{facts_of_entry(t).output_ratio:.3g}",
                " → ".join("not defined" if v is None else f"{v:.3f}" for v in imbalances),
                o.verdict,
                _SEEN[o.sign()],
                {True: "yes", False: "no", None: "too few seeds"}[o.right],
                shown(o.gain()),
                f"{best[CONTINUOUS] / best[NONE]:.2g}",
                shown(o.gain(CONTINUOUS, old)),
                shown(o.gain(ENORM)),
                shown(o.gain(ENORM, old)),
                ", ".join(LABELS[m] for m in edge),
            )
        )
    return Table(head, lines)


def _counts(outcomes: Sequence[Outcome]) -> Table:
    """Verdicts against what was seen."""
    head = ("verdict", "settings", "gained", "no difference shown", "lost", "right")
    lines: list[Sequence[str]] = []
    for verdict in VERDICTS:
        members = [o for o in outcomes if o.verdict == verdict and o.right is not None]
        signs = [o.sign() for o in members]
        counts = (
            len(members),
            *(signs.count(s) for s in (1, 0, -1)),
            sum(o.right is True for o in members),
        )
        lines.append((verdict, *map(str, counts)))
    return Table(head, lines)


def _sentences(outcomes: Sequence[Outcome]) -> list[str]:
    known = [o for o in outcomes if o.right is not None]
    right = sum(o.right is True for o in known)
    quality = rank_auc([(o.verdict, o.sign() == 1) for o in known])
    found = [
        f"Of {len(known)} settings told before they were trained, the rule is right on {right}; "
        f"a gain ranks above no gain with probability {quality:.2f} (AUC; ties count half)."
    ]
    for o in outcomes:
        if o.right is False:
            seen = {1: "a gain", 0: "no difference", -1: "a loss"}[o.sign() or 0]
            found.append(
                f"A miss: {o.setting.architecture} on {o.setting.data}, {o.setting.optimizer}: the "
                f"rule said {o.verdict}, and there was {seen}"
                f" ({shown(o.gain())} at own best rates)."
            )
    return found
