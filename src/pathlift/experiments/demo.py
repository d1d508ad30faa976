"""The main job on embedded data: condition, verify, train side by side, write one page."""

from __future__ import annotations

import copy
import html
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pathlift
from pathlift.experiments import figures
from pathlift.experiments.architectures import autoencoder, resnet18
from pathlift.experiments.data import digits
from pathlift.experiments.training import Curves, train_autoencoders
from pathlift.progress import Progress, Step

RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
METHODS = ("baseline", "conditioned")
COLOURS = {"baseline": "#D55E00", "conditioned": "#0072B2"}  # told apart by the colour-blind
TARGET = 0.3
NETWORK_HEADINGS = (
    *("network", "imbalance", "outputs", "scales", "parameters", "certificate", "seconds"),
)


@dataclass(frozen=True)
class Comparison:
    """Losses of every (method, rate, seed): tensor (methods, rates, seeds, epochs)."""

    loss: Tensor

    def best_rate(self, method: int) -> int:
        """Index of the rate with the lowest mean final loss."""
        return int(self.loss[method, :, :, -1].mean(1).argmin())

    def epochs(self, method: int, rate: int) -> Tensor:
        """(seeds,) epochs to the target loss."""
        return Curves(self.loss[method, rate]).epochs_to(TARGET)


def main(output: Path, quick: bool = False, progress: Progress = print) -> dict[str, Any]:
    """Run the demo and write ``index.html`` into ``output``.

    Returns:
        ``data``: page, networks and losses, ready for JSON; ``text``: the same to read.
    """
    output.mkdir(parents=True, exist_ok=True)
    progress("conditioning a ResNet-18 and an autoencoder")
    torch.manual_seed(0)
    table = [
        ("ResNet-18 (3x32x32)", *_condition_and_check(resnet18(), torch.randn(2, 3, 32, 32))),
        (
            "autoencoder 64-128-32-8-32-128-64",
            *_condition_and_check(autoencoder(), torch.randn(2, 64)),
        ),
    ]
    seeds, epochs = (2, 10) if quick else (5, 60)
    comparison = compare(seeds, epochs, progress)
    verdict = conclusion(comparison)
    page = output / "index.html"
    page.write_text(_page(table, comparison, verdict, quick), encoding="utf-8")
    reports = [
        f"{name}\n{report}\nchecked      outputs {_changed(change)}, eval and train"
        for name, report, change in table
    ]
    return {
        "data": {
            "page": str(page.resolve()),
            "networks": {name: {**r.to_dict(), "change": change} for name, r, change in table},
            "comparison": _numbers(comparison),
            "conclusion": verdict,
        },
        "text": "\n\n".join([*reports, verdict, f"The page is {page.resolve()}"]),
    }


def compare(seeds: int, epochs: int, progress: Progress = print) -> Comparison:
    """Train the digits autoencoder with and without conditioning, all seeds of a rate at once."""
    data = digits()
    plain: list[nn.Module] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        plain.append(autoencoder())
    conditioned = [copy.deepcopy(model) for model in plain]
    for model in conditioned:
        pathlift.condition_(model, data[:2])
    starts = [*plain, *conditioned]
    count = len(starts) * len(RATES)
    progress(f"training {count} autoencoders for {epochs} epochs")
    loss = []
    progress(Step(f"0 of {count} runs trained", 0, count, "runs"))
    for k, rate in enumerate(RATES):
        order = list(range(seeds)) * len(METHODS)
        curves = train_autoencoders(starts, order, [rate] * len(starts), data, epochs=epochs)
        loss.append(curves.loss.reshape(len(METHODS), seeds, epochs))
        done = len(starts) * (k + 1)
        progress(Step(f"{done} of {count} runs trained", done, count, "runs"))
    return Comparison(torch.stack(loss, 1))


def _numbers(comparison: Comparison) -> dict[str, Any]:
    """Final losses and epochs to the target, (rates, seeds) each; None where there is none."""

    def listed(values: Tensor) -> list[list[float | None]]:
        return [[float(v) if math.isfinite(v) else None for v in row] for row in values.tolist()]

    return {
        "rates": list(RATES),
        "target": TARGET,
        "methods": {
            name: {
                "best_rate": RATES[comparison.best_rate(m)],
                "final_loss": listed(comparison.loss[m, :, :, -1]),
                "epochs_to_target": listed(
                    torch.stack([comparison.epochs(m, k) for k in range(len(RATES))])
                ),
            }
            for m, name in enumerate(METHODS)
        },
    }


def conclusion(comparison: Comparison) -> str:
    """What the numbers say, whichever way they fall."""
    best = [comparison.best_rate(m) for m in range(2)]
    final = [comparison.loss[m, best[m], :, -1].numpy() for m in range(2)]
    difference = final[1] - final[0]
    low, high = _interval(difference)
    epochs = [float(comparison.epochs(m, best[m]).median()) for m in range(2)]
    if high < 0:
        word = "reached a lower final loss than the baseline"
    elif low > 0:
        word = "reached a higher final loss than the baseline"
    else:
        word = "made no difference to the final loss that these seeds can show"
    reached = (
        f"Median epochs to a loss of {TARGET:g}: {_count(epochs[1])} against {_count(epochs[0])}."
    )
    if not any(np.isfinite(epochs)):
        reached = f"Neither side reached a loss of {TARGET:g}."
    return (
        f"Each side at its own best rate ({RATES[best[0]]:g} and {RATES[best[1]]:g}): conditioning "
        f"{word}: {final[1].mean():.4f} against {final[0].mean():.4f} of the variance, paired "
        f"difference {difference.mean():+.4f}, 95% interval [{low:+.4f}, {high:+.4f}]. {reached}"
    )


def _condition_and_check(model: nn.Module, x: Tensor) -> tuple[pathlift.ConditioningReport, float]:
    """The report, and the largest change of an output relative to the largest output."""
    before = _outputs(model, x)
    report = pathlift.condition_(model, x)
    pairs = zip(before, _outputs(model, x), strict=True)
    return report, max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def _changed(change: float) -> str:
    return "identical" if change == 0 else f"changed by {change:.0e} of the largest"


def _outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs in eval and in train mode; runs on a copy, so batch-norm statistics stay."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        return [twin.eval()(x).clone(), twin.train()(x).clone()]


def _interval(values: Any, draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of the mean."""
    generator = np.random.default_rng(0)
    means = generator.choice(values, (draws, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _count(epochs: float) -> str:
    return f"{epochs:g}" if np.isfinite(epochs) else "never"


def _page(table: list[Any], comparison: Comparison, verdict: str, quick: bool) -> str:
    epochs = np.arange(1, comparison.loss.shape[-1] + 1)

    def curves(axes: Any) -> None:
        for m, method in enumerate(METHODS):
            best = comparison.best_rate(m)
            loss = comparison.loss[m, best].numpy()
            label = f"{method}, rate {RATES[best]:g}"
            every = (m, max(1, len(epochs) // 6))
            style = {**figures.line(m), "color": COLOURS[method], "marker": figures.MARKERS[m]}
            axes.plot(epochs, np.median(loss, 0), label=label, markevery=every, **style)
            axes.fill_between(epochs, loss.min(0), loss.max(0), color=COLOURS[method], alpha=0.2)
        axes.set(xlabel="epoch", ylabel="share of variance unexplained", yscale="log")
        figures.plain_ticks(axes)
        axes.legend(frameon=False)

    def sensitivity(axes: Any) -> None:
        for m, method in enumerate(METHODS):
            loss = comparison.loss[m, :, :, -1].numpy()
            finite = np.where(np.isfinite(loss), loss, np.nan)
            axes.plot(RATES, finite, ".", color=COLOURS[method], alpha=0.5)
            shown = np.where(np.isfinite(loss).all(1), loss.mean(1), np.nan)
            marker = figures.MARKERS[m]
            axes.plot(RATES, shown, color=COLOURS[method], marker=marker, label=method)
        axes.set(
            xlabel="learning rate",
            ylabel="final share of variance unexplained",
            yscale="log",
        )
        figures.ticks(axes, RATES)
        figures.plain_ticks(axes)
        axes.legend(frameon=False)

    networks = figures.table(
        NETWORK_HEADINGS,
        [
            (
                name,
                f"{r.imbalance_before:.3f} \u2192 {r.imbalance_after:.3f}",
                _changed(change),
                f"{r.num_scales:,}",
                f"{r.num_parameters:,}",
                f"{r.gradient_norm:.0e}",
                f"{sum(r.seconds.values()):.2f}",
            )
            for name, r, change in table
        ],
    )
    rows = []
    for k, rate in enumerate(RATES):
        final = [comparison.loss[m, k, :, -1].numpy() for m in range(2)]
        told = [f"{v.mean():.4f}" if np.isfinite(v).all() else "diverged" for v in final]
        reached = [_count(float(comparison.epochs(m, k).median())) for m in range(2)]
        rows.append((f"{rate:g}", *told, *reached))
    seeds = comparison.loss.shape[2]
    rate_headings = (
        *("rate", "loss, baseline", "loss, conditioned"),
        *("epochs, baseline", "epochs, conditioned"),
    )
    command = "pathlift demo" + (" --quick" if quick else "")
    body = f"""<h1>Same function, better start</h1>
<p>pathlift rescales the weights of a ReLU network. The outputs change by rounding errors only (with
<code>exact=True</code> by no bit); the path kernel moves towards a multiple of the identity.
{figures.PATH_KERNEL}
<em>Imbalance</em> is log(arithmetic mean / geometric mean) of its diagonal, per parameter: 0 is
perfect balance.</p>
{networks}
<p>Both networks are as constructed, with random weights. Outputs are compared in eval and in train
mode. <em>Certificate</em>: the largest derivative of the objective at its optimum, per
parameter.</p>
<h2>Does training gain?</h2>
<p>{html.escape(verdict)}</p>
<p>Digits autoencoder 64-128-32-8-32-128-64, PyTorch's default initialisation, SGD without
momentum, batch 128, {len(epochs)} epochs, {seeds} paired seeds. The loss is the mean squared
error over the data's variance, averaged over the batches of an epoch.</p>
{figures.embed(curves, "Training loss against epochs, each method at its own best learning rate")}
<p>Each method at its own best rate: median over seeds, band from lowest to highest.</p>
{figures.embed(sensitivity, "Final training loss against learning rate for both methods")}
<p>Final loss against the learning rate: dots are seeds, lines their mean; rates at which a run
diverged are left out of the line.</p>
{figures.table(rate_headings, rows)}
<p>Mean final loss, and median epochs to a loss of {TARGET:g}, at equal rates.</p>
<p>Made by <code>{command}</code>, pathlift {pathlift.__version__}.</p>"""
    return figures.page("pathlift: same function, better start", body)
