"""Checks of a model, and the names of its tensors."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from pathlift.errors import ArgumentError, CaptureError
from pathlift.homes.differences import is_plain
from pathlift.tensors.shards import local_part


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and ``torch.compile`` wrappers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def named_tensors(
    model: nn.Module,
) -> tuple[dict[str, nn.Parameter], dict[str, Tensor], dict[str, str]]:
    """Parameters and buffers once each under their first name, and the other names' aliases."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    parameters: dict[str, nn.Parameter] = {}
    buffers: dict[str, Tensor] = {}

    def visit(named: Iterator[tuple[str, Any]], into: dict[str, Any]) -> None:
        for name, tensor in named:
            original = first.setdefault(id(tensor), name)
            if original == name:
                into[name] = tensor
            else:
                aliases[name] = original

    visit(model.named_parameters(remove_duplicate=False), parameters)
    visit(model.named_buffers(remove_duplicate=False), buffers)
    return parameters, buffers, aliases


# What a module keeps for itself.
_OWN = frozenset({"_parameters", "_buffers", "_modules"})


def attributes(model: nn.Module) -> dict[str, Tensor]:
    """Tensors in attributes, and in containers there, that are no parameters or buffers.

    Objects that are no containers are not looked into: a trainer or an optimiser that a module
    knows is not part of it.
    """
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if is_plain(value) or name in _OWN or name.endswith("_hooks"):
                continue
            _collect(f"{path}.{name}" if path else name, value, found, 4)
    return found


def _collect(name: str, value: Any, found: dict[str, Tensor], depth: int) -> None:
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter):
            found[name] = value
    elif depth and isinstance(value, (dict, Mapping)):
        for key, one in value.items():
            if not is_plain(one):
                _collect(f"{name}[{key!r}]", one, found, depth - 1)
    elif depth and isinstance(value, (list, tuple, set, frozenset)):
        for k, one in enumerate(value):
            if not is_plain(one):
                _collect(f"{name}[{k}]", one, found, depth - 1)


def check_model(model: object, meta: bool = False) -> nn.Module:
    """Raise unless ``model`` is a module with real, initialised, separately stored parameters.

    ``meta``: parameters on the meta device are allowed (their values come from elsewhere).
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"model must be a torch.nn.Module; found {type(model).__name__}. "
            f"Pass the module itself, not its state dict or its output."
        )
    model = unwrap(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"the model is a {type(model).__name__}; TorchScript modules can't be exported. "
            f"Pass the eager module it was made from."
        )
    parameters, buffers, _ = named_tensors(model)
    for name, tensor in [*parameters.items(), *buffers.items()]:
        if nn.parameter.is_lazy(tensor):
            raise CaptureError(
                f"'{name}' is not initialised: its module is lazy. Run the model once on an "
                f"example batch, then call again."
            )
        if tensor.is_meta and not (meta and name in parameters):
            raise CaptureError(
                f"'{name}' is on the meta device and holds no values. Materialise the model "
                f"(model.to_empty(device=...) and load or initialise weights), then call again."
            )
        if isinstance(tensor, FakeTensor) and not meta:
            raise CaptureError(
                f"'{name}' is a fake tensor and holds no values. Make the model outside "
                f"FakeTensorMode, then call again."
            )
        if tensor.is_inference() and name in parameters:
            raise CaptureError(
                f"'{name}' was made in inference mode, outside of which it can't be written. Make "
                f"the model outside torch.inference_mode(), then call again."
            )
        if tensor.layout != torch.strided and name in parameters:
            raise CaptureError(
                f"'{name}' has layout {tensor.layout}; only strided (dense) tensors are "
                f"supported. Convert it with .to_dense()."
            )
    _check_storage(parameters)
    return model


def _check_storage(parameters: Mapping[str, Tensor]) -> None:
    """Two parameters over the same memory would be multiplied twice: refuse them."""
    parts = {name: local_part(p) for name, p in parameters.items()}
    spans = sorted(
        (
            p.untyped_storage().data_ptr(),
            p.storage_offset() * p.element_size(),
            p.nbytes,
            name,
        )
        for name, p in parts.items()
        if p.numel() and p.untyped_storage().data_ptr()
    )
    for (base_a, start_a, size_a, a), (base_b, start_b, _, b) in itertools.pairwise(spans):
        if base_a == base_b and start_b < start_a + size_a:
            a, b = sorted((a, b))
            raise CaptureError(
                f"parameters '{a}' and '{b}' are different tensors over the same memory; "
                f"rescaling one would change the other. Register the same Parameter under both "
                f"names (that is supported), or give each its own storage."
            )


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Keep modes, random state, grad mode, buffers' values and gradients as they are."""
    modes = [(m, m.training) for m in model.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with (
        torch.random.fork_rng(devices=devices),
        torch.set_grad_enabled(torch.is_grad_enabled()),
    ):
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def module_paths(running: list[str], model: nn.Module) -> Iterator[None]:
    """Keep the path of the innermost running module of the model last in ``running``."""
    thread = threading.get_ident()
    paths = {id(m): name for name, m in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == thread and id(module) in paths:
            running.append(paths[id(module)])

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        if threading.get_ident() == thread and id(module) in paths and running:
            running.pop()

    hooks = nn.modules.module
    handles = [
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
