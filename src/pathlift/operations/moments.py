"""Batch norms, and mean and variance of what they are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def averages_batches(arguments: Mapping[str, Any]) -> bool:
    """Whether a call with these arguments reads running statistics that may be rescaled along with
    its input.

    Instance norms are none: they have their own switch for what they divide by.
    """
    return arguments.get("running_mean") is not None and "use_input_stats" not in arguments


def batch_moments(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel of a batch norm's input, ``(channels,)`` in float64.

    A channel that does not vary keeps its running statistics.

    Args:
        arguments: of the call, by their schema names, with the values of this moment.
    """
    x = arguments["input"]
    old = arguments["running_mean"].double(), arguments["running_var"].double()
    if not x.numel():
        return old
    if x.dtype != torch.float64:
        x = x.to(torch.float32)
    # PyTorch's own pass for a norm in train mode, five times faster than var_mean over these axes.
    mean, variance = (t.double() for t in torch.batch_norm_update_stats(x, None, None, 0.0))
    varies = variance > 1e-12 * mean.square()
    return torch.where(varies, mean, old[0]), torch.where(varies, variance, old[1])
