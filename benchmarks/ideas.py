"""Can conditioning be made to help more? Two ideas on data, and why Fisher coefficients diverge.

Run: ``python benchmarks/ideas.py [--seeds 5] [--json FILE]``. The digits autoencoder with SGD, each
start at its own best rate of a grid a factor 1.5 apart. Starts: as constructed; the path kernel's
optimum; *progress*: layers' scales that make ``|grad|^2 / L`` largest, what a step at the largest
stable rate takes off the loss (``L``: top eigenvalue of the Gauss-Newton matrix); *path, same L*:
among multiples of the optimum with layers' scales added, the least imbalance whose ``L`` is the
old one; the empirical Fisher's optimum. About five minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import pathlift
from pathlift.criteria import fisher
from pathlift.curvature import curvature
from pathlift.experiments.architectures import build
from pathlift.experiments.data import Data, load
from pathlift.experiments.training import train

ARCHITECTURE, BATCH, EPOCHS = "autoencoder:128-32-8", 128, 40
RATES = [float(f"{1.5**k:.3g}") for k in range(-4, 5)]
STEPS = (-1.0, -0.5, 0.5, 1.0)

Batches = list[tuple[Tensor, Tensor]]


def layers_of(model: nn.Module, group: pathlift.RescalingGroup) -> list[Tensor]:
    """(num_scales,) of ones and zeros, one for each hidden layer."""
    found = []
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear)][:-1]:
        count = layer.out_features
        start = sum(int(v.sum()) for v in found)
        found.append(torch.zeros(group.num_scales, dtype=torch.float64))
        found[-1][start : start + count] = 1
    return found


def moved(model: nn.Module, group: pathlift.RescalingGroup, scales: Tensor) -> nn.Module:
    """A copy, rescaled."""
    other = copy.deepcopy(model)
    group.rescale_(other, scales)
    return other


def climbed(
    score: Callable[[Tensor], float], directions: Sequence[Tensor], sweeps: int = 3
) -> Tensor:
    """Scales of the highest score by steps along one direction at a time, from no rescaling."""
    best = torch.zeros_like(directions[0])
    value = score(best)
    for _ in range(sweeps):
        before = value
        for direction in directions:
            tried = [(score(best + s * direction), s) for s in STEPS]
            top, step = max(tried)
            if top > value:
                value, best = top, best + step * direction
        if value <= before:
            break
    return best


def starts(seed: int, data: Data) -> dict[str, nn.Module]:
    """Equal networks, by the name of how they were chosen."""
    model, x = build(ARCHITECTURE, data, seed=seed), data.inputs[:2]
    batches: Batches = [(b, b) for b in data.inputs[: 4 * BATCH].split(BATCH)]
    group = pathlift.rescaling_group(model, x)
    layers = layers_of(model, group)
    diagonal = pathlift.path_kernel_diagonal(model, x)

    def measured(scales: Tensor) -> Any:
        return curvature(moved(model, group, scales), batches, mse_loss)

    def imbalance(scales: Tensor) -> float:
        exponents = group.parameter_exponents(group.variables(scales))
        return pathlift.imbalance(
            {
                n: g * torch.exp2(-2 * sum(exponents.get(n, [torch.zeros(())])))
                for n, g in diagonal.items()
            }
        )

    chosen = copy.deepcopy(model)
    report = pathlift.condition_(chosen, x, exact=False, verify=False)
    optimum, old = report.log2_scales, measured(torch.zeros_like(report.log2_scales)).largest
    # The least imbalance at the old curvature: the latter as a penalty.
    kept = climbed(
        lambda s: -imbalance(s) - abs(math.log(measured(s).largest / old)),
        [0.5 * optimum, *layers],
    )
    sampled = copy.deepcopy(model)
    pathlift.condition_(
        sampled,
        x,
        criterion=fisher(model, [(data.inputs[:256],) * 2], mse_loss),
        exact=False,
        verify=False,
    )
    return {
        "none": model,
        "path kernel": chosen,
        "progress": moved(model, group, climbed(lambda s: measured(s).progress, layers)),
        "path, same L": moved(model, group, kept),
        "Fisher": sampled,
    }


def facts(model: nn.Module, first: nn.Module, data: Data) -> dict[str, float]:
    """Imbalance, and curvature and progress relative to the network as constructed."""
    batches: Batches = [(b, b) for b in data.inputs[: 4 * BATCH].split(BATCH)]
    now, then = (curvature(m, batches, mse_loss) for m in (model, first))
    pairs = zip(model.parameters(), first.parameters(), strict=True)
    logs = torch.cat([(p / q).abs().log2().flatten().detach() for p, q in pairs])
    logs = logs[torch.isfinite(logs)]
    return {
        "imbalance": pathlift.imbalance(pathlift.path_kernel_diagonal(model, data.inputs[:2])),
        "largest curvature": now.largest / then.largest,
        "progress": now.progress / then.progress,
        "span": float(logs.max() - logs.min()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load("digits-pixelwise").reconstruction()
    made = [starts(seed, data) for seed in range(args.seeds)]
    rows = []
    for name in made[0]:
        models = [m[name] for m in made for _ in RATES]
        seeds = [s for s in range(args.seeds) for _ in RATES]
        curves = train(models, seeds, RATES * args.seeds, data, epochs=EPOCHS, batch=BATCH)
        final = curves.loss[:, -1].reshape(args.seeds, len(RATES))
        best = int(final.mean(0).argmin())
        found = [facts(m[name], m["none"], data) for m in made]
        row = {key: sum(f[key] for f in found) / len(found) for key in found[0]}
        rows.append({"start": name, **row, "rate": RATES[best], "loss": final[:, best].tolist()})
        mean = float(final[:, best].mean())
        text = ", ".join(f"{k} {v:.3g}" for k, v in row.items())
        print(f"{name:<14} {text}; best rate {RATES[best]:g}, loss {mean:.4f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
