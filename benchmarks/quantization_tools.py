"""The tools that ``benchmarks/quantization.py`` compares, one function each.

Every function takes a model in evaluation mode and example inputs, and returns a model of the same
function (ReLU6 stays) with batch norms folded and ranges equalised. Brevitas and AIMET are no part
of the package; :func:`tools` has those that can be imported.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from typing import Any

from torch import Tensor, nn

from pathlift.absorption import fold_batch_norms_
from pathlift.quantization import equalize_
from peers import prepare_torchvision

Tool = Callable[[nn.Module, Tensor], nn.Module]
# Iterations of Brevitas' equalization, as its own example of post-training quantisation has them.
ITERATIONS = 20


def folded(model: nn.Module, x: Tensor) -> nn.Module:
    """Batch norms folded, nothing else: what everything is compared with."""
    made = copy.deepcopy(model)
    fold_batch_norms_(made, x)
    return made


def here(**options: Any) -> Tool:
    """``pathlift.quantization.equalize_``."""

    def tool(model: nn.Module, x: Tensor) -> nn.Module:
        made = copy.deepcopy(model)
        equalize_(made, x, **options)
        return made

    return tool


def here_with_activations(**options: Any) -> Tool:
    """The same, calibrated on the example inputs for activations too."""

    def tool(model: nn.Module, x: Tensor) -> nn.Module:
        made = copy.deepcopy(model)
        equalize_(made, x, activations=[x], **options)
        return made

    return tool


def _brevitas(merge_bias: bool) -> Tool:
    from brevitas.graph.quantize import preprocess_for_quantize

    def tool(model: nn.Module, x: Tensor) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: nn.Module = preprocess_for_quantize(
                copy.deepcopy(model),
                relu6_to_relu=False,
                equalize_iters=ITERATIONS,
                equalize_merge_bias=merge_bias,
            )
        return made

    return tool


def _aimet() -> Tool:
    from aimet_torch.cross_layer_equalization import equalize_model

    def tool(model: nn.Module, x: Tensor) -> nn.Module:
        made = copy.deepcopy(model)
        logging.disable(logging.CRITICAL)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                equalize_model(made, dummy_input=x)
        finally:
            logging.disable(logging.NOTSET)
        return made

    return tool


def versions() -> dict[str, str]:
    """Versions of the tools that are installed."""
    found = {}
    for package in ("brevitas", "aimet-torch"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def tools() -> dict[str, Tool]:
    """Name -> tool, of those that are installed."""
    prepare_torchvision()
    found: dict[str, Tool] = {}
    makers: dict[str, Callable[[], Tool]] = {
        "AIMET": _aimet,
        "Brevitas": lambda: _brevitas(True),
        "Brevitas, no biases": lambda: _brevitas(False),
    }
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return found
