"""The part of a tensor that this process holds, and what the others hold of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pathlift.errors import CaptureError


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor, of which a process holds a part."""
    # No DTensor exists before its module is imported, and importing it costs time.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: a view, or the tensor itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def local_factors(tensor: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """The entries of broadcast factors that belong to this process's part of the tensor.

    Raises:
        CaptureError: the tensor is neither replicated nor cut along its dimensions.
    """
    if not is_sharded(tensor):
        return list(factors)
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    for placement in placements:
        if type(placement) not in (Replicate, Shard):
            raise CaptureError(
                f"a parameter of shape {tuple(tensor.shape)} is placed as {placement}. Supported: "
                f"Replicate and Shard. Redistribute it (tensor.redistribute) first."
            )
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    found = []
    for factor in factors:
        skipped = tensor.dim() - factor.dim()
        for d in range(factor.dim()):
            if factor.shape[d] > 1:
                start = min(offsets[d + skipped], factor.shape[d])
                factor = factor.narrow(d, start, sizes[d + skipped])
        found.append(factor)
    return found


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one on every process, all of which must ask."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


def groups_of(tensor: Tensor) -> list[Any]:
    """The groups of processes that a sharded tensor is spread over."""
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    return [mesh.get_group(d) for d in range(mesh.ndim)]


def largest(values: Sequence[int], groups: Sequence[Any], like: torch.device | None) -> list[int]:
    """The largest of every value over all processes."""
    import torch.distributed as dist

    tensor = torch.tensor(list(values), dtype=torch.int64, device=like or "cpu")
    for group in groups:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    return [int(v) for v in tensor.tolist()]


def largest_around(tensor: Tensor, values: Sequence[int]) -> list[int]:
    """The largest of every value over the processes that hold a part of the tensor."""
    if not is_sharded(tensor):
        return list(values)
    return largest(values, groups_of(tensor), local_part(tensor).device)
