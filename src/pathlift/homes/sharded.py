"""Models spread over processes: replicas (DDP) and shards (FSDP2, any DTensor by rows or columns).

A sharded model is conditioned where it lies. Its group is found from a copy of its structure on the
meta device; the criterion gathers one parameter at a time and lets it go; and every process
multiplies its own part of the parameters and of the optimiser's state. Every process computes the
same scales from the same numbers, and those of the first are taken by all.

All of it is collective: every process of the model calls ``condition_``, with inputs of one shape.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pathlift.capture.names import check_model
from pathlift.errors import ArgumentError
from pathlift.homes.module import ModuleHome
from pathlift.tensors.shards import groups_of, is_sharded, whole

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def has_shards(model: nn.Module) -> bool:
    """Whether any parameter of the model is sharded."""
    return any(is_sharded(p) for p in model.parameters())


def gather(parameters: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    """A source of whole parameters, one at a time; every process must ask for the same ones."""

    def gathered(name: str) -> Tensor:
        return whole(parameters[name].detach())

    return gathered


def home_of(model: nn.Module) -> ModuleHome:
    """Where the parameters of a module in memory live: here, or in parts on several processes.

    Raises:
        ArgumentError, CaptureError: see :func:`pathlift.capture.check_model`.
    """
    inner = check_model(model)
    reshard(inner)
    return ShardedHome(model) if has_shards(inner) else ModuleHome(model)


def whole_home(model: nn.Module) -> ModuleHome:
    """The home of a module whose parameters all lie on this process.

    Raises:
        ArgumentError: they are sharded.
        ArgumentError, CaptureError: see :func:`pathlift.capture.check_model`.
    """
    if has_shards(check_model(model)):
        raise ArgumentError(
            "the model's parameters are sharded; what was captured can be reused, saved and loaded "
            "for models that are whole on one process. Make a Conditioner of this one."
        )
    return ModuleHome(model)


class ShardedHome(ModuleHome):
    """A module whose parameters are DTensors; see :class:`pathlift.homes.home.Home`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.structure = structure(self.model)
        self._whole = gather(self.parameters)
        sharded = next(p for p in self.parameters.values() if is_sharded(p))
        self._groups = self._groups or groups_of(sharded)

    def value(self, name: str) -> Tensor:
        """A whole parameter; every process must ask for the same ones."""
        return self._whole(name)

    def settle(self) -> None:
        """Put away the whole parameters that a forward pass has gathered."""
        reshard(self.model)


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
            new.__dict__["_buffers"] = {
                n: None if b is None else whole(b) for n, b in module._buffers.items()
            }
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
