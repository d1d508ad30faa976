"""Tensors that pretend to lie on an accelerator, for machines without one.

A :class:`Pretend` reports a device of its own and computes on the host. As on a real accelerator,
an operation must find all its tensors there (except host numbers of no dimension, and host
indices), results stay there, and only ``.cpu()``, ``.to(...)`` and ``float(...)`` bring values
back: those are counted.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from pathlift.capture.program import Graph, Program

DEVICE = torch.device("lazy")
aten = torch.ops.aten
_INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
_MOVES = {aten._to_copy.default, aten.copy_.default}


class Unpretended(NotImplementedError):
    """A real device can do this; a tensor that pretends can't."""


class Pretend(torch.Tensor):
    """A tensor that reports :data:`DEVICE` and whose values are those of ``host``."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> Pretend:
        if host.layout != torch.strided:
            raise Unpretended(f"a tensor of layout {host.layout}")
        made: Pretend = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
        )
        made.host = host.detach()
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pretend({self.host})"

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, Counter())


class Accelerator(TorchDispatchMode):
    """Runs a block on the pretended accelerator.

    Attributes:
        transfers: how often values came back to the host, by operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.transfers: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.transfers)


def _run(func: Any, args: Any, kwargs: Any, transfers: Counter[str]) -> Any:
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    there = [isinstance(t, Pretend) for t in tensors]
    target = kwargs.get("device")
    if func is aten._local_scalar_dense.default and any(there):
        transfers["number"] += 1
    if any(there) and func not in _MOVES:
        checked = [args[0]] if func in _INDEXED else tensors
        for t in checked:
            if not isinstance(t, Pretend) and t.dim():
                raise AssertionError(
                    f"{func}: a host tensor of shape {tuple(t.shape)} among others"
                )
    if target is not None:
        target = torch.device(target)
        kwargs = {**kwargs, "device": torch.device("cpu")}
        if target.type == "cpu" and any(there):
            transfers["tensor"] += 1
    elif any(there):
        target = DEVICE
    if func is aten.copy_.default and there == [False, True]:
        transfers["tensor"] += 1
    out = func(*tree_map(_host, args), **tree_map(_host, kwargs))
    if func._schema.arguments and _writes(func):
        return kwargs.get("out", args[0])
    if target is not None and target.type == DEVICE.type:
        return tree_map(lambda t: Pretend(t) if isinstance(t, Tensor) else t, out)
    return out


def _writes(func: Any) -> bool:
    return any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)


def _host(value: Any) -> Any:
    return value.host if isinstance(value, Pretend) else value


def moved_model(model: nn.Module) -> nn.Module:
    """The model itself, its parameters and buffers moved."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(Pretend(p), p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = Pretend(b)
    return model


def moved_program(program: Program) -> Program:
    """The program as if its model had been captured on the accelerator."""

    def there(value: Any) -> Any:
        return Pretend(value) if isinstance(value, Tensor) else value

    def graph(one: Graph) -> Graph:
        calls = tuple(
            dataclasses.replace(
                c,
                arguments={
                    k: DEVICE if isinstance(v, torch.device) else v for k, v in c.arguments.items()
                },
            )
            for c in one.calls
        )
        constants = {s: there(v) for s, v in one.constants.items()}
        return dataclasses.replace(one, calls=calls, constants=constants)

    inputs = dataclasses.replace(
        program.inputs,
        args=tree_map(there, program.inputs.args),
        kwargs=tree_map(there, program.inputs.kwargs),
    )
    return dataclasses.replace(
        program,
        graphs=tuple(graph(g) for g in program.graphs),
        parameters={
            n: nn.Parameter(Pretend(p), p.requires_grad) for n, p in program.parameters.items()
        },
        buffers={n: Pretend(b) for n, b in program.buffers.items()},
        inputs=inputs,
    )
