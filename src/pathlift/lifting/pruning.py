"""Pruning masks from path magnitudes, in the format of ``torch.nn.utils.prune``."""

from __future__ import annotations

import torch
import torch.nn.utils.prune
from torch import Tensor, nn

from pathlift.errors import ArgumentError
from pathlift.lifting.metrics import path_magnitude


def path_magnitude_masks(
    model: nn.Module, example_inputs: object, amount: float, p: float = 1
) -> dict[str, Tensor]:
    """Masks that keep the entries of largest path magnitude, over all weights together.

    Args:
        model: a network of the supported operations.
        example_inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
        amount: share of the entries to prune, at least 0 and below 1. Vectors (biases, norms) are
            not pruned.
        p: exponent of the path magnitude.

    Returns:
        name -> mask of ones and zeros in the parameter's dtype and shape.

    Raises:
        ArgumentError: ``amount`` out of range.
        UnsupportedOperationError, CaptureError: see :func:`pathlift.path_norm`.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> x = torch.zeros(2, 4)
    >>> masks = pathlift.path_magnitude_masks(model, x, amount=0.75)
    >>> int(sum(m.sum() for m in masks.values())), sum(m.numel() for m in masks.values())
    (48, 192)
    """
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 <= amount < 1:
        raise ArgumentError(f"amount must be a share of at least 0 and below 1; found {amount!r}.")
    parameters = dict(model.named_parameters())
    magnitude = {n: m for n, m in path_magnitude(model, example_inputs, p).items() if m.dim() > 1}
    if not magnitude:
        return {}
    joined = torch.cat([m.reshape(-1).cpu() for m in magnitude.values()])
    pruned = int(amount * joined.numel())
    keep = torch.ones_like(joined)
    keep[joined.argsort(stable=True)[:pruned]] = 0
    masks = {}
    start = 0
    for name, m in magnitude.items():
        own = keep[start : start + m.numel()].reshape(m.shape)
        masks[name] = own.to(parameters[name])
        start += m.numel()
    return masks


def prune_by_path_magnitude_(
    model: nn.Module, example_inputs: object, amount: float, p: float = 1
) -> nn.Module:
    """Prune ``model`` in place with :func:`path_magnitude_masks`; returns it.

    Uses ``torch.nn.utils.prune.custom_from_mask``: parameters become ``<name>_orig`` with a buffer
    ``<name>_mask``, and ``prune.remove`` makes the zeros permanent.

    Raises:
        ArgumentError, UnsupportedOperationError, CaptureError: see :func:`path_magnitude_masks`.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> x = torch.zeros(2, 4)
    >>> _ = pathlift.prune_by_path_magnitude_(model, x, amount=0.75)
    >>> int((model[0].weight != 0).sum() + (model[2].weight != 0).sum())
    48
    """
    masks = path_magnitude_masks(model, example_inputs, amount, p)
    for name, mask in masks.items():
        path, _, own = name.rpartition(".")
        torch.nn.utils.prune.custom_from_mask(model.get_submodule(path), own, mask)
    return model
