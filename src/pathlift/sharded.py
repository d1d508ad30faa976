"""Models spread over processes: replicas (DDP) and shards (FSDP2, any DTensor by rows or columns).

A sharded model is conditioned where it lies. Its group is found from a copy of its structure on the
meta device; the criterion gathers one parameter at a time and lets it go; and every process
multiplies its own part of the parameters and of the optimiser's state. Every process computes the
same scales from the same numbers, and those of the first are taken by all.

All of it is collective: every process of the model calls ``condition_``, with inputs of one shape.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathlift.errors import CaptureError

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor, of which a process holds a part."""
    # No DTensor exists before its module is imported, and importing it costs time.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def has_shards(model: nn.Module) -> bool:
    """Whether any parameter of the model is sharded."""
    return any(is_sharded(p) for p in model.parameters())


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


def gather(parameters: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    """A source of whole parameters, one at a time; every process must ask for the same ones."""

    def whole(name: str) -> Tensor:
        found = _whole(parameters[name].detach())
        assert found is not None
        return found

    return whole


def _whole(tensor: Tensor | None) -> Tensor | None:
    """All of a tensor on every process."""
    if tensor is None or not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


def process_groups(model: nn.Module) -> list[Any]:
    """The groups of processes among which the model is replicated or sharded (none: one process).

    ``model``: as the user has it, DDP wrapper included.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return [model.process_group]
    for parameter in model.parameters():
        if is_sharded(parameter):
            return _groups_of(parameter)
    return []


def _groups_of(tensor: Tensor) -> list[Any]:
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    return [mesh.get_group(d) for d in range(mesh.ndim)]


def from_first(
    values: NDArray[Any], groups: Sequence[Any], like: torch.device | None
) -> NDArray[Any]:
    """The first process's values, on every process."""
    import torch.distributed as dist

    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(like or "cpu")
    for group in groups:
        dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)
    return np.asarray(tensor.cpu().numpy())


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
    return largest(values, _groups_of(tensor), local_part(tensor).device)


def reshard(model: nn.Module) -> None:
    """Let FSDP put away the whole parameters that its last forward pass has left in memory."""
    for module in model.modules():
        if _is_fsdp(type(module)):
            module.reshard()  # type: ignore[operator]


def structure(model: nn.Module) -> nn.Module:
    """The model as it was before sharding, with its parameters on the meta device.

    Modules are copied without running their constructors; buffers (gathered where they are sharded)
    and everything else are shared with the model. Hooks and classes that ``fully_shard`` put in
    place are left out.
    """
    modules: dict[int, nn.Module] = {}
    parameters: dict[int, nn.Parameter] = {}

    def stripped(parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None:
            return None
        if id(parameter) not in parameters:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            parameters[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
        return parameters[id(parameter)]

    def copied(module: nn.Module | None) -> nn.Module | None:
        if module is None:
            return None
        if id(module) not in modules:
            cls = _class_before_sharding(type(module))
            new: nn.Module = object.__new__(cls)
            modules[id(module)] = new
            new.__dict__.update(module.__dict__)
            new.__dict__["_parameters"] = {n: stripped(p) for n, p in module._parameters.items()}
            new.__dict__["_modules"] = {n: copied(m) for n, m in module._modules.items()}
            new.__dict__["_buffers"] = {n: _whole(b) for n, b in module._buffers.items()}
            for name in _HOOKS:
                hooks = module.__dict__.get(name, {})
                kept = ((k, hook) for k, hook in hooks.items() if not _distributed(hook))
                new.__dict__[name] = OrderedDict(kept)
        return modules[id(module)]

    found = copied(model)
    assert found is not None
    return found


def _is_fsdp(cls: type) -> bool:
    return any(base.__module__.startswith("torch.distributed") for base in cls.__bases__)


def _class_before_sharding(cls: type[nn.Module]) -> type[nn.Module]:
    """``fully_shard`` derives a class from its own and the module's."""
    if not _is_fsdp(cls):
        return cls
    return next(b for b in cls.__bases__ if not b.__module__.startswith("torch.distributed"))


def _distributed(hook: Any) -> bool:
    """Whether a hook belongs to torch's own sharding."""
    owner = type(getattr(hook, "__self__", None)).__module__
    function = getattr(hook, "__func__", hook)
    home = getattr(function, "__module__", "") or ""
    return owner.startswith("torch.distributed") or home.startswith("torch.distributed")
