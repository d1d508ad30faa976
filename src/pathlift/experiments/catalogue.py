"""The paper's experiments as studies: which networks, data, methods, rates and seeds."""

from __future__ import annotations

from typing import Any

from pathlift.experiments.study import Study
from pathlift.experiments.summary import Target


def two_moons(small: bool) -> dict[str, Study]:
    exponents = range(-6, 1) if small else range(-8, 1)
    settings = {
        "methods": ("baseline", "path", "enorm"),
        "data": ("two-moons",),
        "optimizers": ("sgd",),
        "rates": [float(f"{10 ** (k / 2):.1g}") for k in exponents],
        "seeds": range(10 if small else 30),
        "epochs": 30 if small else 300,
        "batch": 32,
        "initialization": "kaiming-normal",
    }
    family = {float(w): "mlp:" + "-".join([str(w)] * 5) for w in (2, 4, 8, 16, 32)}
    target = Target("accuracy", 0.99)
    return {"": Study("width of the 5 hidden layers", family, settings, target, 8.0, True)}


_PAPER = ("baseline", "path", "enorm")
_FEW = ("baseline", "path-continuous", "enorm-continuous")
_FINE = ("baseline", "path", "path-continuous", "enorm", "enorm-continuous")


def fully_connected(small: bool) -> dict[str, Study]:
    settings: dict[str, Any]
    if small:
        settings = {
            "methods": _PAPER,
            "data": ("digits",),
            "rates": (0.01, 0.03, 0.1, 0.3),
            "epochs": 40,
            "norm": True,
        }
        depths = [3, 4, 5, 6, 7, 8]
        kinds = {"": settings}
    else:
        settings = {
            "methods": [m for m in _FINE if m != "enorm"],
            "data": ("cifar10",),
            "rates": (0.02, 0.05, 0.125, 0.3, 0.8),
            "epochs": 30,
        }
        depths = [3, 8, 5]  # the ends first
        # Without norms PyTorch's initialisation leaves a deep network at chance for long.
        plain = {**settings, "initialization": "kaiming-normal"}
        kinds = {"": {**settings, "norm": True}, "-plain": plain}
    width = 32 if small else 500
    family = {float(d): "mlp:" + "-".join([str(width)] * d) for d in depths}
    target = Target("accuracy", 0.99)
    return {
        suffix: Study(
            "hidden layers",
            family,
            {"optimizers": ("sgd",), "seeds": range(5), **kind},
            target,
            5.0,
        )
        for suffix, kind in kinds.items()
    }


def fully_convolutional(small: bool) -> dict[str, Study]:
    settings = {"optimizers": ("sgd",), "seeds": range(5), "initialization": "kaiming-normal"}
    if small:
        found = {"methods": _PAPER, "data": ("digits",), "rates": (0.01, 0.03, 0.1, 0.3)}
        family = {4.0: "convolutional:4", 8.0: "convolutional:8"}
        return {"": Study("channels", family, {**settings, **found, "epochs": 20}, None, 8.0)}
    found = {"methods": _FEW, "data": ("cifar10",), "rates": (0.02, 0.05, 0.125)}
    family = {32.0: "convolutional:32"}
    return {"": Study("channels", family, {**settings, **found, "epochs": 5}, None, 32.0)}


def resnet(small: bool) -> dict[str, Study]:
    settings: dict[str, Any] = {"optimizers": ("sgd",)}
    if small:
        found = {"methods": _PAPER, "data": ("digits",), "rates": (0.01, 0.03, 0.1, 0.3, 1.0)}
        settings |= {**found, "seeds": range(3), "epochs": 8}
    else:
        found = {"methods": _FEW, "data": ("cifar10",), "rates": (0.05, 0.15, 0.45)}
        settings |= {**found, "seeds": range(5), "epochs": 5}
    width = 6 if small else 16
    return {"": Study("channels", {float(width): f"resnet18:{width}"}, settings, None, width)}


def autoencoder(small: bool) -> dict[str, Study]:
    axis, shared = "compression factor", {"optimizers": ("sgd",), "seeds": range(5)}
    if not small:
        growing = {**shared, "methods": _FINE, "rates": factor_two(0.5, 4, 4), "epochs": 20}
        # The code of 16 first: the network of the other experiments on MNIST.
        family = {784.0 / c: f"autoencoder:256-64-{c}" for c in (16, 4, 64)}
        return {
            suffix: Study(axis, family, {**growing, "data": (data,)}, None, 49.0, True)
            for suffix, data in (("", "mnist"), ("-fashion", "fashion-mnist"))
        }
    growing = {
        **shared,
        "methods": _PAPER,
        "data": ("digits",),
        "rates": (0.3, 1.0, 3.0),
        "epochs": 40,
    }
    family = {64.0 / c: f"autoencoder:128-32-{c}" for c in (32, 16, 8, 4, 2)}
    claim = {**shared, "methods": _PAPER, "seeds": range(20), "epochs": 60, "held_out": False}
    as_one = {"data": ("digits",), "rates": (0.1, 0.3, 1.0, 3.0, 10.0)}
    by_pixel = {"data": ("digits-pixelwise",), "rates": (0.1, 0.3, 1.0, 2.0, 3.0, 10.0)}
    return {
        "": Study(axis, family, growing, None, max(family), True),
        **{
            suffix: Study(axis, {8.0: "autoencoder:128-32-8"}, {**claim, **source}, target, 8.0)
            for suffix, source, target in (
                ("-20-seeds", as_one, Target("loss", 0.4)),
                ("-20-seeds-pixelwise", by_pixel, Target("loss", 0.25)),
            )
        },
    }


def factor_two(centre: float, below: int, above: int) -> list[float]:
    """Rates a factor 2 apart: so many below the centre and above it."""
    return [float(f"{centre * 2.0**k:.3g}") for k in range(-below, above + 1)]


def optimizers(small: bool) -> dict[str, Study]:
    """The optimisers whose steps don't grow with the gradient, each with criteria made for it."""
    architecture = "autoencoder:128-32-8" if small else "autoencoder:256-64-16"
    shared = {
        "data": ("digits-pixelwise" if small else "mnist",),
        "seeds": range(5),
        "epochs": 40 if small else 10,
    }
    own = {"adamw": "path-first", "muon": "spectral"}
    centres = {"adamw": 0.004 if small else 0.002, "muon": 0.016 if small else 0.008}
    return {
        f"-{name}": Study(
            "network",
            {1.0: architecture},
            {
                **shared,
                "methods": ("baseline", "path", "path-continuous", "enorm-continuous", own[name]),
                "optimizers": (name,),
                "rates": factor_two(centres[name], 3, 3),
            },
            None,
            1.0,
        )
        for name in own
    }
