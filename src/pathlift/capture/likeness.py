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
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pathlift.capture.names import named_tensors
from pathlift.capture.program import Program
from pathlift.errors import ArgumentError
from pathlift.homes.differences import is_plain
from pathlift.homes.faces import is_record, package

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
    packages = frozenset(package(type(m)) for m in model.modules()) - {"torch"}
    words = _Words(packages)
    return {
        "module": {path: _module(module) for path, module in model.named_modules()},
        "setting": {
            f"{path}.{key}" if path else key: text
            for path, module in model.named_modules()
            for key, text in _settings(module, words)
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


def _settings(module: nn.Module, words: _Words) -> list[tuple[str, str]]:
    found = []
    for key, value in vars(module).items():
        if key in _REGISTRIES:
            continue
        if "_hooks" in key and isinstance(value, dict):
            if not value:
                continue
            value = list(value.values())  # the keys count all hooks of the process
        found.append((key, words.of(value, _DEPTH)))
    return found


class _Words:
    """Values in words that are the same for equal values, in any process.

    Of objects that are not the model's own (a trainer, a process group) only the class is told.

    Args:
        packages: see :func:`pathlift.homes.faces.faces`.
    """

    def __init__(self, packages: frozenset[str]) -> None:
        self.packages = packages
        self._told: dict[int, object] = {}

    def of(self, value: Any, depth: int) -> str:
        if is_plain(value) or isinstance(value, _TORCH_KINDS):
            return repr(value)
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        if id(value) in self._told:
            return f"{name} again"
        self._told[id(value)] = value
        return self._whole(value, name, depth)

    def _whole(self, value: Any, name: str, depth: int) -> str:
        if isinstance(value, Tensor):
            return f"{_kind(value)} {_bytes(value)}"
        if isinstance(value, np.ndarray):
            plain = value.dtype.kind != "O"
            return f"array {value.shape} {value.dtype} {_digest(value.tobytes()) if plain else ''}"
        if isinstance(value, type):
            return f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, nn.Module) or depth == 0:
            return name
        if isinstance(value, (types.FunctionType, types.MethodType)):
            cells = [c.cell_contents for c in value.__closure__ or () if _filled(c)]
            inner = self._each([*cells, *(value.__defaults__ or ())], depth)
            return " ".join([f"function {value.__qualname__}", _code(value.__code__), *inner])
        if isinstance(value, types.BuiltinFunctionType):
            return f"function {value.__qualname__}"
        if isinstance(value, functools.partial):
            return " ".join([name, *self._each((value.func, value.args, value.keywords), depth)])
        if isinstance(value, Mapping):
            pairs = [f"{k}: {v}" for k, v in self._pairs(value.items(), depth)]
            return f"{name} {{{', '.join(pairs)}}}"
        if isinstance(value, (set, frozenset)):
            return f"{name} {sorted(self._each(value, depth))}"
        if isinstance(value, (list, tuple)):
            return f"{name} [{', '.join(self._each(value, depth))}]"
        if not is_record(type(value), self.packages):
            return name
        own = getattr(value, "__dict__", {})
        return f"{name} {{{', '.join(f'{k}: {v}' for k, v in self._pairs(own.items(), depth))}}}"

    def _each(self, values: Iterable[Any], depth: int) -> list[str]:
        return [self.of(v, depth - 1) for v in values]

    def _pairs(self, pairs: Iterable[tuple[Any, Any]], depth: int) -> list[tuple[str, str]]:
        return [(self.of(k, depth - 1), self.of(v, depth - 1)) for k, v in pairs]


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
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
    if not plain or tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
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
