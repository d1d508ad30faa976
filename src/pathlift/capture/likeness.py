"""What a program was captured from, in plain values, and whether another model is the same.

A program is a list of operations. It holds for another model if its forward would perform the same
ones, and what decides that is compared: the tree of modules and their classes, the code of their
forward methods, their attributes (numbers, strings, containers, functions, tensors by their bytes),
names, shapes, dtypes and devices of parameters and buffers, what is tied, what requires a gradient,
and the bytes of those buffers whose values went into the program. Values of parameters and of the
other buffers (running statistics) are free. Not seen: globals, closures of other functions, and the
code of what forward calls; verification runs the model afterwards all the same.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pathlift.capture.names import named_tensors
from pathlift.capture.program import Program
from pathlift.errors import ArgumentError
from pathlift.homes.differences import is_plain

# Kept elsewhere: tensors and modules by name.
_REGISTRIES = frozenset({"_parameters", "_buffers", "_modules"})
_TORCH_KINDS = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
_DEPTH = 6

# Section -> entry -> what it was: all strings, so that it can be written to a file.
Likeness = dict[str, dict[str, str]]


def likeness(model: nn.Module, folded: frozenset[str]) -> Likeness:
    """All that a program of this model depends on, besides its inputs.

    Args:
        folded: names of the buffers whose values went into the program.
    """
    parameters, buffers, aliases = named_tensors(model)
    tensors: dict[str, Tensor] = {**buffers, **parameters}
    return {
        "module": {path: _module(module) for path, module in model.named_modules()},
        "setting": {
            f"{path}.{key}" if path else key: text
            for path, module in model.named_modules()
            for key, text in _settings(module)
        },
        "tensor": {
            name: " ".join([_kind(t), "with gradient" * t.requires_grad]).rstrip()
            for name, t in tensors.items()
        },
        "tied tensor": dict(aliases),
        "values of buffer": {n: _bytes(b) for n, b in buffers.items() if n in folded},
    }


def check(model: nn.Module, captured: Likeness, folded: frozenset[str]) -> None:
    """Raise ArgumentError unless a program of the captured model is one of this model too."""
    found = likeness(model, folded)
    for section, then in captured.items():
        now = found[section]
        for name in [*then, *(n for n in now if n not in then)]:
            if then.get(name) != now.get(name):
                raise ArgumentError(
                    f"the model is not like the one that was captured: {section} '{name}' is "
                    f"{now.get(name, 'missing')}, and was {then.get(name, 'missing')}. A captured "
                    f"program holds for models of the same classes, settings, modes, names, shapes "
                    f"and dtypes, whatever their weights. Capture this one: "
                    f"Conditioner(model, example_inputs)."
                )


def rebound(program: Program, model: nn.Module) -> Program:
    """The program over the tensors of another model, which has been checked."""
    parameters, buffers, aliases = named_tensors(model)
    tensors: Mapping[str, Tensor] = {**buffers, **parameters}
    graphs = []
    for graph in program.graphs:
        constants = {
            s: tensors[graph.tensors[s]].detach() if s in graph.tensors else value
            for s, value in graph.constants.items()
        }
        graphs.append(_with(graph, constants=constants))
    return _with(
        program,
        graphs=tuple(graphs),
        parameters=parameters,
        buffers=buffers,
        aliases=aliases,
        source=None,
    )


def _with(record: Any, **changes: Any) -> Any:
    """A copy of a frozen dataclass without what it has cached."""
    names = type(record).__dataclass_fields__
    return type(record)(**{n: changes.get(n, getattr(record, n)) for n in names})


def _module(module: nn.Module) -> str:
    cls = type(module)
    registered = [
        *(f"{n}: none" for n, p in module._parameters.items() if p is None),
        *(f"{n}: none" for n, b in module._buffers.items() if b is None),
        *(f"{n}: none" for n, m in module._modules.items() if m is None),
    ]
    code = _code(getattr(cls.forward, "__code__", None))
    return " ".join([f"{cls.__module__}.{cls.__qualname__}", code, *registered])


def _settings(module: nn.Module) -> list[tuple[str, str]]:
    found = []
    for key, value in vars(module).items():
        if key in _REGISTRIES:
            continue
        if "_hooks" in key and isinstance(value, dict):
            if not value:
                continue
            value = list(value.values())  # the keys count all hooks of the process
        found.append((key, _text(value, _DEPTH)))
    return found


def _text(value: Any, depth: int) -> str:
    """A value in words that are the same for equal values, in any process."""
    if is_plain(value) or isinstance(value, _TORCH_KINDS):
        return repr(value)
    if isinstance(value, Tensor):
        return f"{_kind(value)} {_bytes(value)}"
    if isinstance(value, np.ndarray):
        return f"array {value.shape} {value.dtype} {_digest(value.tobytes())}"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, nn.Module) or depth == 0:
        return name
    if isinstance(value, (types.FunctionType, types.MethodType)):
        cells = [c.cell_contents for c in value.__closure__ or () if _filled(c)]
        inner = [_text(c, depth - 1) for c in [*cells, *(value.__defaults__ or ())]]
        return " ".join([f"function {value.__qualname__}", _code(value.__code__), *inner])
    if isinstance(value, types.BuiltinFunctionType):
        return f"function {value.__qualname__}"
    if isinstance(value, functools.partial):
        return _text((value.func, value.args, value.keywords), depth - 1)
    if isinstance(value, Mapping):
        pairs = [f"{_text(k, depth - 1)}: {_text(v, depth - 1)}" for k, v in value.items()]
        return f"{name} {{{', '.join(pairs)}}}"
    if isinstance(value, (set, frozenset)):
        return f"{name} {sorted(_text(v, depth - 1) for v in value)}"
    if isinstance(value, (list, tuple)):
        return f"{name} [{', '.join(_text(v, depth - 1) for v in value)}]"
    own = getattr(value, "__dict__", {})
    return f"{name} {{{', '.join(f'{k}: {_text(v, depth - 1)}' for k, v in own.items())}}}"


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _kind(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {tuple(tensor.shape)} on {tensor.device.type}"


def _bytes(tensor: Tensor) -> str:
    """A digest of a tensor's values; its class where there is no reading them."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        return type(tensor).__qualname__
    data = tensor.detach().cpu().contiguous().reshape(-1)
    return _digest(data.view(torch.uint8).numpy().tobytes())


def _code(code: Any) -> str:
    """A digest of what a function does, without where it stands."""
    if code is None:
        return "built in"
    return _digest(repr(_instructions(code)).encode())


def _instructions(code: types.CodeType) -> tuple[Any, ...]:
    constants = [
        _instructions(c)
        if isinstance(c, types.CodeType)
        else sorted(map(repr, c))
        if isinstance(c, frozenset)
        else repr(c)
        for c in code.co_consts
    ]
    return (code.co_code, code.co_names, code.co_varnames, constants)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
