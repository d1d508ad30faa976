"""Predicted and solved log2 scales at random initialisations, over widths, depths and gains.

Run: ``python benchmarks/theory.py [--seeds 3] [--figures docs/figures] [--json FILE]``. For every
network the solution of ``condition_(exact=False)`` on a sample stands beside the prediction of
``pathlift.theory.expected_log2_scales``, which knows widths, initialisation and gain alone. A
second table does the same for two torchvision models, from their second moments alone. A last one
compares the criterion F with the exact divergence on networks whose paths can be listed. Needs
torchvision, and matplotlib for the figures. About two and a half minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from torch import Tensor, nn

import pathlift
from conditioning import torchvision_model
from pathlift.lifting.paths import list_paths, logdet_divergence
from pathlift.theory import INITIALIZATIONS, expected_log2_scales, predict_log2_scales

Array = NDArray[np.float64]

DRAW: dict[str, Callable[[Tensor], Tensor]] = {
    "pytorch": lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)),
    "kaiming_normal": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"),
    "kaiming_uniform": lambda w: nn.init.kaiming_uniform_(w, nonlinearity="relu"),
    "xavier": nn.init.xavier_normal_,
    "orthogonal": nn.init.orthogonal_,
}

RATIOS = [2.0**k for k in range(-4, 5)]
DEPTHS = [2, 3, 4, 6, 8, 12, 16]
GAINS = [10.0 ** (k / 2) for k in range(-4, 5)]


def network(widths: tuple[int, ...], initialization: str, gain: float, bias: bool) -> nn.Module:
    """A fully connected ReLU network; biases as PyTorch draws them."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layer = nn.Linear(a, b, bias=bias)
        with torch.no_grad():
            DRAW[initialization](layer.weight).mul_(gain)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Trial:
    """One sampled network. Arrays have one entry per hidden channel, layer after layer.

    ``predicted`` knows the distribution, ``moments`` the sample's mean square per tensor, and
    ``solved`` the sample. ``layer``: the hidden layer, from 0. ``imbalances``: before, after the
    prediction, after the solution.
    """

    sweep: str
    initialization: str
    x: float
    predicted: Array
    moments: Array
    solved: Array
    layer: NDArray[np.int64]
    imbalances: tuple[float, float, float]


def imbalance_at(
    diagonal: dict[str, Tensor], group: pathlift.RescalingGroup, scales: Array
) -> float:
    """``log(AM/GM)`` of ``g'`` after rescaling by any (also fractional) scales."""
    exponents = group.parameter_exponents(group.variables(scales))
    moved = {
        name: g * torch.exp2(-2 * sum(exponents.get(name, []), torch.zeros(())))
        for name, g in diagonal.items()
    }
    return pathlift.imbalance(moved)


def trial(
    sweep: str, x: float, widths: tuple[int, ...], initialization: str, gain: float, bias: bool
) -> Trial:
    model, inputs = network(widths, initialization, gain, bias), torch.zeros(1, widths[0])
    group = pathlift.rescaling_group(model, inputs)
    diagonal = pathlift.path_kernel_diagonal(model, inputs)
    moments = predict_log2_scales(model, inputs).numpy()
    solved = pathlift.condition_(model, inputs, exact=False, verify=False).log2_scales.numpy()
    layer = np.repeat(np.arange(len(widths) - 2), widths[1:-1])
    chain = expected_log2_scales(
        widths, initialization, gain=gain, bias="pytorch" if bias else "none"
    )
    predicted = chain[layer]
    return Trial(
        sweep,
        initialization,
        x,
        predicted,
        moments,
        solved,
        layer,
        (
            imbalance_at(diagonal, group, np.zeros(group.num_scales)),
            imbalance_at(diagonal, group, predicted),
            imbalance_at(diagonal, group, solved),
        ),
    )


def points() -> Iterator[tuple[str, float, tuple[int, ...], float, bool]]:
    """(sweep, x, widths, gain, bias)"""
    for r in RATIOS:
        yield "width ratio", r, (64, 64, round(64 * r), 64, 10), 1.0, True
    for depth in DEPTHS:
        yield "depth", depth, (*[64] * depth, 10), 1.0, True
    for gain in GAINS:
        yield "gain", gain, (64, 64, 64, 64, 10), gain, True
    for gain in GAINS:
        yield "gain, no biases", gain, (64, 64, 64, 64, 10), gain, False


def run(seeds: int) -> list[Trial]:
    found = []
    for sweep, x, widths, gain, bias in points():
        for initialization in INITIALIZATIONS:
            for seed in range(seeds):
                torch.manual_seed(seed)
                found.append(trial(sweep, x, widths, initialization, gain, bias))
    return found


# --------------------------------------------------------------------------- tables


def rms(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2)))


def layer_means(values: Array, layer: NDArray[np.int64]) -> Array:
    return np.asarray(np.bincount(layer, values) / np.bincount(layer))


def summary(trials: Iterable[Trial]) -> dict[str, float]:
    """One row: all channels of all networks of a sweep together; log2 units."""
    group = list(trials)
    predicted = np.concatenate([t.predicted for t in group])
    solved = np.concatenate([t.solved for t in group])
    moments = np.concatenate([t.moments for t in group])
    means = np.concatenate([layer_means(t.predicted - t.solved, t.layer) for t in group])
    spread = np.concatenate([t.solved - layer_means(t.solved, t.layer)[t.layer] for t in group])
    before, after, best = (np.array([t.imbalances[k] for t in group]) for k in range(3))
    return {
        "channels": float(len(solved)),
        "scales": rms(solved),
        "correlation": float(np.corrcoef(predicted, solved)[0, 1]),
        "error": rms(predicted - solved),
        "layer error": rms(means),
        "spread in layer": rms(spread),
        "error, own moments": rms(moments - solved),
        "imbalance before": float(before.mean()),
        "predicted": float(after.mean()),
        "solved": float(best.mean()),
    }


def print_table(rows: dict[tuple[str, ...], dict[str, float]], names: tuple[str, ...]) -> None:
    columns = list(next(iter(rows.values())))
    print("| " + " | ".join([*names, *columns]) + " |")
    print("|" + "---|" * len(names) + "---:|" * len(columns))
    for key, row in rows.items():
        cells = [f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.3g}" for v in row.values()]
        print("| " + " | ".join([*key, *cells]) + " |")
    print(flush=True)


def exact_divergence(widths: tuple[int, ...], bias: bool, seeds: int) -> dict[str, float]:
    """The divergence of K on its range before, at F's minimiser and at its own; mean over seeds."""
    rows = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = network(widths, "pytorch", 1.0, bias).double()
        x = torch.zeros(1, widths[0], dtype=torch.float64)
        group = pathlift.rescaling_group(model, x)
        paths = list_paths(model, x)
        jacobian = paths.jacobian().toarray()
        exponents = np.concatenate(
            [group.exponents(n).reshape(-1, group.num_scales).numpy() for n in paths.columns]
        )
        rank = len(paths.theta) - group.num_scales

        def eigenvalues(s: Array, jacobian=jacobian, exponents=exponents, rank=rank) -> Array:  # type: ignore[no-untyped-def]
            moved = jacobian * 2.0 ** -(exponents @ s)
            return np.asarray(np.linalg.svd(moved, compute_uv=False)[:rank] ** 2)

        def divergence(s: Array, of=eigenvalues) -> float:  # type: ignore[no-untyped-def]
            values = of(s)
            return float(len(values) * np.log(values.mean()) - np.log(values).sum())

        conditioned = copy.deepcopy(model)
        found = pathlift.condition_(conditioned, x, exact=False).log2_scales.numpy()
        best = optimize.minimize(divergence, found, method="BFGS")
        condition = [float(v[0] / v[-1]) for v in map(eigenvalues, (0 * found, found, best.x))]
        rows.append(
            {
                "parameters": len(paths.theta),
                "scales": group.num_scales,
                "D before": logdet_divergence(model, x),
                "D at F's": logdet_divergence(conditioned, x),
                "D at best": float(best.fun),
                "distance": rms(best.x - found),
                "cond. before": condition[0],
                "cond. at F's": condition[1],
                "cond. at best": condition[2],
            }
        )
    return {k: float(np.median([r[k] for r in rows])) for k in rows[0]}


SMALL = [
    ((4, 5, 3), True),
    ((4, 5, 3), False),
    ((6, 6, 6, 4), True),
    ((8, 2, 8, 4), True),
    ((4, 6, 2, 6, 3), True),
    ((4, 6, 2, 6, 3), False),
]


def any_network(name: str) -> dict[str, float]:
    """The prediction from second moments alone for a torchvision model as constructed."""
    torch.manual_seed(0)
    model, x = torchvision_model(name), torch.zeros(2, 3, 224, 224)
    predicted = predict_log2_scales(model, x).numpy()
    solved = pathlift.condition_(model, x, exact=False, verify=False).log2_scales.numpy()
    return {
        "channels": float(len(solved)),
        "scales": rms(solved),
        "correlation": float(np.corrcoef(predicted, solved)[0, 1]),
        "error": rms(predicted - solved),
    }


# --------------------------------------------------------------------------- figures


def layer_points(trials: Iterable[Trial], layer: int) -> tuple[Array, Array, Array, Array]:
    """x, predicted, mean and standard deviation of the solved scales of one hidden layer."""
    grouped: dict[float, list[Trial]] = {}
    for t in trials:
        grouped.setdefault(t.x, []).append(t)
    xs = sorted(grouped)
    solved = [np.concatenate([t.solved[t.layer == layer] for t in grouped[x]]) for x in xs]
    predicted = [float(grouped[x][0].predicted[grouped[x][0].layer == layer][0]) for x in xs]
    return (
        np.array(xs),
        np.array(predicted),
        np.array([s.mean() for s in solved]),
        np.array([s.std() for s in solved]),
    )


def panels(trials: list[Trial], sweep: str, draw: Callable[[Any, list[Trial]], None]) -> Any:
    """One panel per initialisation, equal axes, one legend below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(INITIALIZATIONS), figsize=(15, 3.9), sharey=True, layout="constrained"
    )
    for axis, name in zip(axes, INITIALIZATIONS, strict=True):
        draw(axis, [t for t in trials if t.sweep == sweep and t.initialization == name])
        axis.set_title(name)
        axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("log2 scale")
    marks = {"color": "0.35", "fmt": "o", "markersize": 4, "capsize": 2, "linewidth": 1}
    axes[0].errorbar([], [], [], label="solved: mean ± sd of channels", **marks)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def draw_by_layer(axis: Any, trials: list[Trial]) -> None:
    from matplotlib import pyplot as plt

    for layer in range(3):
        x, predicted, mean, spread = layer_points(trials, layer)
        color = plt.get_cmap("viridis")(0.1 + 0.38 * layer)
        axis.plot(x, predicted, color=color, label=f"hidden layer {layer + 1}, predicted")
        axis.errorbar(
            x * 1.06 ** (layer - 1),
            mean,
            spread,
            color=color,
            fmt="o",
            markersize=4,
            capsize=2,
            linewidth=1,
        )


def draw_by_depth(axis: Any, trials: list[Trial]) -> None:
    from matplotlib import pyplot as plt

    shown = [2, 4, 8, 16]
    for k, depth in enumerate(shown):
        group = [t for t in trials if t.x == depth]
        color = plt.get_cmap("viridis")(0.05 + 0.28 * k)
        position = np.arange(1, depth) / depth
        predicted = layer_means(group[0].predicted, group[0].layer)
        solved = np.stack([layer_means(t.solved, t.layer) for t in group])
        # One point makes no line: a two-layer network shows as a dash.
        marker = "_" if depth == 2 else None
        axis.plot(
            position,
            predicted,
            color=color,
            marker=marker,
            markersize=16,
            label=f"{depth} layers, predicted",
        )
        axis.errorbar(
            position,
            solved.mean(0),
            np.sqrt(np.mean([(t.solved - layer_means(t.solved, t.layer)[t.layer]) ** 2
                             for t in group])),
            color=color, fmt="o", markersize=4, capsize=2, linewidth=1,
        )  # fmt: skip
    axis.set_xlabel("hidden layer / number of layers")


def draw_figures(trials: list[Trial], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for sweep, file, label in (
        ("width ratio", "width", "width of hidden layer 2 / 64"),
        ("gain", "gain", "gain of the weights"),
        ("gain, no biases", "gain-no-biases", "gain of the weights"),
    ):
        figure = panels(trials, sweep, draw_by_layer)
        for axis in figure.axes:
            axis.set_xlabel(label)
            if sweep == "width ratio":
                axis.set_xscale("log", base=2)
                axis.set_xticks(RATIOS[::2], ["1/16", "1/4", "1", "4", "16"])
            else:
                axis.set_xscale("log")
        figure.savefig(folder / f"theory-{file}.png", dpi=110)
    panels(trials, "depth", draw_by_depth).savefig(folder / "theory-depth.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--figures", type=Path, help="folder for theory-*.png")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    trials = run(args.seeds)
    sweeps = list(dict.fromkeys(t.sweep for t in trials))
    rows = {
        (sweep, name): summary(t for t in trials if (t.sweep, t.initialization) == (sweep, name))
        for sweep in sweeps
        for name in INITIALIZATIONS
    }
    print_table(rows, ("sweep", "initialisation"))
    zoo = {(name,): any_network(name) for name in ("resnet18", "vgg11")}
    print_table(zoo, ("model",))
    exact = {
        ("-".join(map(str, widths)), "yes" if bias else "no"): exact_divergence(
            widths, bias, max(args.seeds, 5)
        )
        for widths, bias in SMALL
    }
    print_table(exact, ("widths", "biases"))
    if args.json:
        tables = {"scales": rows, "zoo": zoo, "divergence": exact}
        plain = {k: {" / ".join(key): r for key, r in v.items()} for k, v in tables.items()}
        args.json.write_text(json.dumps(plain, indent=1))
    if args.figures:
        draw_figures(trials, args.figures)


if __name__ == "__main__":
    main()
