"""What each optimiser holds after given gradients: the formulas of its paper, entry by entry.

Written out plainly, one parameter at a time, with nothing known of powers or rescalings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class History:
    """What one parameter went through, and the options of its parameter group.

    Attributes:
        gradients: per step, already negated where the optimiser maximises.
        weights: per step, the parameter after it.
        log2_units: per step, ``k`` of the coordinates that step is expressed in: the parameter
            times ``2^k``. A constant added to a gradient (eps) is expressed in them too.
        rows: per step, mask of the rows that have a gradient (None: all).
        options: ``lr``, ``betas`` and so on.
    """

    gradients: list[Tensor]
    weights: list[Tensor]
    log2_units: list[Tensor]
    rows: list[Tensor | None]
    options: dict[str, Any]


def sgd(h: History) -> dict[str, Tensor]:
    if not h.options["momentum"]:
        return {}
    buffer = h.gradients[0]
    for g in h.gradients[1:]:
        buffer = h.options["momentum"] * buffer + (1 - h.options["dampening"]) * g
    return {"momentum_buffer": buffer}


def muon(h: History) -> dict[str, Tensor]:
    buffer, m = torch.zeros_like(h.gradients[0]), h.options["momentum"]
    for g in h.gradients:
        buffer = m * buffer + (1 - m) * g
    return {"momentum_buffer": buffer}


def adam(h: History) -> dict[str, Tensor]:
    b1, b2 = h.options["betas"]
    first = second = largest = torch.zeros_like(h.gradients[0])
    for g, rows in zip(h.gradients, h.rows, strict=True):
        new_first, new_second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g**2
        first = new_first if rows is None else torch.where(rows, new_first, first)
        second = new_second if rows is None else torch.where(rows, new_second, second)
        largest = torch.maximum(largest, second)
    found = {"exp_avg": first, "exp_avg_sq": second, "step": torch.tensor(len(h.gradients))}
    return {**found, "max_exp_avg_sq": largest} if h.options.get("amsgrad") else found


def nadam(h: History) -> dict[str, Tensor]:
    b1, decay = h.options["betas"][0], h.options["momentum_decay"]
    product = 1.0
    for t in range(1, len(h.gradients) + 1):
        product *= b1 * (1 - 0.5 * 0.96 ** (t * decay))
    return {**adam(h), "mu_product": torch.tensor(product)}


def adamax(h: History) -> dict[str, Tensor]:
    b1, b2 = h.options["betas"]
    first = norm = torch.zeros_like(h.gradients[0])
    for g, k in zip(h.gradients, h.log2_units, strict=True):
        first = b1 * first + (1 - b1) * g
        norm = torch.maximum(b2 * norm, g.abs() + h.options["eps"] * 2.0**-k)
    return {"exp_avg": first, "exp_inf": norm, "step": torch.tensor(len(h.gradients))}


def adagrad(h: History) -> dict[str, Tensor]:
    squares = [g**2 for g in h.gradients]
    return {"sum": sum(squares[1:], squares[0]), "step": torch.tensor(len(squares))}


def rmsprop(h: History) -> dict[str, Tensor]:
    o = h.options
    a = o["alpha"]
    square = mean = buffer = torch.zeros_like(h.gradients[0])
    for g, k in zip(h.gradients, h.log2_units, strict=True):
        square = a * square + (1 - a) * g**2
        mean = a * mean + (1 - a) * g
        size = (square - mean**2 if o["centered"] else square).sqrt() + o["eps"] * 2.0**-k
        buffer = o["momentum"] * buffer + g / size
    found = {"square_avg": square, "step": torch.tensor(len(h.gradients))}
    if o["centered"]:
        found["grad_avg"] = mean
    if o["momentum"]:
        found["momentum_buffer"] = buffer
    return found


def adadelta(h: History) -> dict[str, Tensor]:
    rho, eps = h.options["rho"], h.options["eps"]
    square = change = torch.zeros_like(h.gradients[0])
    for g, k in zip(h.gradients, h.log2_units, strict=True):
        square = rho * square + (1 - rho) * g**2
        # The eps under the first root is a squared weight, the other a squared gradient.
        update = (change + eps * 4.0**k).sqrt() / (square + eps * 4.0**-k).sqrt() * g
        change = rho * change + (1 - rho) * update**2
    return {"square_avg": square, "acc_delta": change, "step": torch.tensor(len(h.gradients))}


def asgd(h: History) -> dict[str, Tensor]:
    o, average, t = h.options, torch.zeros_like(h.gradients[0]), 0
    eta, mu = o["lr"], 1.0
    for w in h.weights:
        average = average + mu * (w - average)
        t += 1
        eta = o["lr"] / (1 + o["lambd"] * o["lr"] * t) ** o["alpha"]
        mu = float(torch.tensor(1 / max(1, t - o["t0"])))  # kept in single precision
    return {
        "ax": average,
        "eta": torch.tensor(eta),
        "mu": torch.tensor(mu),
        "step": torch.tensor(t),
    }


def rprop(h: History) -> dict[str, Tensor]:
    (down, up), (least, most) = h.options["etas"], h.options["step_sizes"]
    before = torch.zeros_like(h.gradients[0])
    size = torch.full_like(before, h.options["lr"])
    for g in h.gradients:
        agree = (g * before).sign()
        factor = torch.ones_like(g)
        factor[agree > 0], factor[agree < 0] = up, down
        size = (size * factor).clamp(least, most)
        before = torch.where(agree < 0, 0.0, g)
    return {"prev": before, "step_size": size, "step": torch.tensor(len(h.gradients))}


def adafactor(h: History) -> dict[str, Tensor]:
    many = h.gradients[0].dim() > 1
    mean_of = (
        {
            "row_var": lambda s: s.mean(-1, keepdim=True),
            "col_var": lambda s: s.mean(-2, keepdim=True),
        }
        if many
        else {"variance": lambda s: s}
    )
    found: dict[str, Tensor] = {"step": torch.tensor(len(h.gradients))}
    for key, mean in mean_of.items():
        value = torch.zeros_like(mean(h.gradients[0]))
        for t, g in enumerate(h.gradients, 1):
            weight = t ** h.options["beta2_decay"]
            value = (1 - weight) * value + weight * mean(g**2)
        found[key] = value
    return found


FORMULAS: dict[str, Callable[[History], dict[str, Tensor]]] = {
    "SGD": sgd,
    "Muon": muon,
    "Adam": adam,
    "AdamW": adam,
    "RAdam": adam,
    "SparseAdam": adam,
    "NAdam": nadam,
    "Adamax": adamax,
    "Adagrad": adagrad,
    "RMSprop": rmsprop,
    "Adadelta": adadelta,
    "ASGD": asgd,
    "Rprop": rprop,
    "Adafactor": adafactor,
}
