"""Which tensors of a model are quantised, and a copy of the model that holds rounded ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pathlift.capture.names import check_model
from pathlift.errors import unknown
from pathlift.quantization.formats import format_of

Convolution = nn.modules.conv._ConvNd
_TRANSPOSED = nn.modules.conv._ConvTransposeNd
_TARGETS = ("tensor", "channel")


def checked_target(per: object) -> str:
    """``"tensor"`` or ``"channel"``.

    Raises:
        ArgumentError: something else.
    """
    if not isinstance(per, str) or per not in _TARGETS:
        raise unknown("per", per, _TARGETS)
    return per


class Weight(NamedTuple):
    """A weight that is quantised, and the module that holds it."""

    name: str
    module: nn.Module
    parameter: nn.Parameter

    @property
    def bias(self) -> str:
        """Name of the bias beside it; empty where there is none."""
        if not isinstance(self.module._parameters.get("bias"), Tensor):
            return ""
        return f"{self.name.rpartition('.')[0]}.bias".lstrip(".")

    def axis(self, per: str) -> int | None:
        """The dimension along which every slice has a step of its own; None: one for all."""
        return channel_axis(self.module) if per == "channel" else None


def weights(model: nn.Module) -> Iterator[Weight]:
    """Every weight that is quantised, each parameter once.

    These are the floating-point parameters of two dimensions or more that are called ``weight``
    or have it in their name (``in_proj_weight``, ``weight_ih_l0``); biases and tables of
    embeddings stay as they are, also where a layer shares its weight with one.
    """
    tables = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    seen = {id(p) for m in tables for p in m._parameters.values()}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or "weight" not in name or id(parameter) in seen:
                continue
            if parameter.dim() > 1 and parameter.numel() and parameter.is_floating_point():
                seen.add(id(parameter))
                yield Weight(f"{path}.{name}" if path else name, module, parameter)


def channel_axis(module: nn.Module) -> int:
    """The dimension of a weight along which its output channels lie."""
    return 1 if isinstance(module, _TRANSPOSED) else 0


def quantised(model: nn.Module, format: str = "int8", per: str = "tensor") -> nn.Module:
    """A copy of the model whose weights hold only values of a number format, for measuring.

    Args:
        model: any module.
        format: ``"int8"``, ``"int4"`` (symmetric whole numbers) or ``"float8_e4m3"``.
        per: one largest magnitude per ``"tensor"`` or per output ``"channel"``.

    Returns:
        The copy; weights keep their dtype, everything else is as in the model.

    Raises:
        ArgumentError: an unknown format or target.
    """
    chosen, target = format_of(format), checked_target(per)
    made = copy.deepcopy(check_model(model))
    with torch.no_grad():
        for one in weights(made):
            chosen.rounded(one.parameter, one.axis(target), out=one.parameter.data)
    return made
