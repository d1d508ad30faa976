"""A captured program as a file: ``.safetensors`` with the operations as JSON in its metadata.

Operations stand under their schema names, tensors under numbers. Nothing in the file is code, and
reading it runs none. It holds for the versions of PyTorch, Python and pathlift that wrote it: what
an operation's entry says and how code is compiled may change with them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pathlift
from pathlift.capture.likeness import Likeness, check, rebound
from pathlift.capture.names import check_model
from pathlift.capture.program import Call, Graph, Inputs, Program, Symbol
from pathlift.checkpoint.reading import open_checkpoint
from pathlift.checkpoint.writing import Shard, as_bytes, write_file
from pathlift.errors import CheckpointError

_FORMAT = "2"
# Kinds of values that JSON has no word for -> what torch calls them.
_NAMED: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def save(path: Path, program: Program, like: Likeness) -> None:
    """Write a program, and what it was captured from.

    Raises:
        CheckpointError: it holds something that is neither a tensor nor a plain value, or the file
            can't be written; what was there before is as it was.
    """
    writer = _Writer()
    text = json.dumps(
        {
            "graphs": [writer.graph(g) for g in program.graphs],
            "inputs": writer.value((program.inputs.args, program.inputs.kwargs)),
            "examples": [
                [mode, writer.value((e.args, e.kwargs))] for mode, e in program.examples.items()
            ],
            "derived": sorted(program.derived),
            "folded": sorted(program.folded),
            "written": sorted(program.written),
            "reads": program.reads,
            "like": like,
            "symbols": writer.symbols,
        }
    )
    about = {"pathlift_program": _FORMAT, "program": text, **_versions()}
    named = {str(k): t for k, t in enumerate(writer.tensors)}

    def pieces() -> Iterator[Tensor]:
        yield from map(as_bytes, named.values())

    write_file(path, Shard([(n, t.dtype, tuple(t.shape)) for n, t in named.items()], pieces, about))


def load(path: Path, model: nn.Module) -> Program:
    """Read a program for a model that is like the one it was captured from.

    Raises:
        CheckpointError: no program, or one of other versions.
        ArgumentError: the model is not like the captured one.
    """
    model = check_model(model)
    with open_checkpoint(path) as checkpoint:
        about = checkpoint.files[0].about
        _check_versions(path, about)
        read = json.loads(about["program"])
        reader = _Reader([checkpoint.read(n) for n in _numbered(checkpoint.tensors)], read)
    folded = frozenset(read["folded"])
    check(model, read["like"], folded)
    program = Program(
        tuple(reader.graph(g) for g in read["graphs"]),
        {},
        {},
        {},
        Inputs(*reader.value(read["inputs"])),
        None,
        {mode: Inputs(*reader.value(e)) for mode, e in read["examples"]},
        frozenset(read["derived"]),
        folded,
        frozenset(read["written"]),
        read["reads"],
    )
    return rebound(program, model)


def _numbered(names: Mapping[str, Any]) -> list[str]:
    return sorted(names, key=int)


def _versions() -> dict[str, str]:
    return {
        "torch": torch.__version__.partition("+")[0],
        "python": ".".join(map(str, sys.version_info[:2])),
        "pathlift": pathlift.__version__,
    }


def _check_versions(path: Path, about: Mapping[str, str]) -> None:
    if about.get("pathlift_program") != _FORMAT or "program" not in about:
        raise CheckpointError(
            f"'{path}' holds no captured program of format {_FORMAT}. Pass a file that "
            f"Conditioner.save has written."
        )
    for what, now in _versions().items():
        if about.get(what) != now:
            raise CheckpointError(
                f"'{path}' was written with {what} {about.get(what)}, and this is {what} {now}; a "
                f"captured program holds for the versions it was captured with. Capture the model "
                f"again and save it."
            )


class _Writer:
    """Nested values of a program as JSON; tensors and symbols are collected on the way."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.symbols: list[Any] = []
        self._numbers: dict[Symbol, int] = {}
        self._places: dict[int, int] = {}

    def graph(self, graph: Graph) -> Any:
        return {
            "calls": [self._call(c) for c in graph.calls],
            "training": graph.training,
            "tensors": [[self._symbol(s), n] for s, n in graph.tensors.items()],
            "inputs": [self._symbol(s) for s in graph.inputs],
            # Of what stands under a name, the model that it is read for has the values.
            "constants": [
                [self._symbol(s), None if s in graph.tensors else self.value(t)]
                for s, t in graph.constants.items()
            ],
            "outputs": [self._symbol(s) for s in graph.outputs],
            "leaving": [[self._symbol(s), why] for s, why in graph.leaving.items()],
        }

    def _call(self, call: Call) -> Any:
        return [
            str(call.target._schema),
            call.name,
            {name: self.value(v) for name, v in call.arguments.items()},
            self.value(call.outputs),
            call.several,
            call.module,
        ]

    def _symbol(self, symbol: Symbol) -> int:
        if symbol not in self._numbers:
            self._numbers[symbol] = len(self.symbols)
            self.symbols.append([list(symbol.shape), self.value(symbol.dtype)])
        return self._numbers[symbol]

    def value(self, value: Any) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Symbol):
            return {"symbol": self._symbol(value)}
        if isinstance(value, Tensor) and value.layout == torch.strided:
            k = self._places.setdefault(id(value), len(self.tensors))
            if k == len(self.tensors):
                self.tensors.append(value)
            return {"tensor": k, "device": str(value.device)}
        if type(value) is complex:
            return {"complex": [value.real, value.imag]}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        for name, kind in _NAMED.items():
            if isinstance(value, kind):
                return {name: str(value).removeprefix("torch.")}
        if isinstance(value, list):
            return [self.value(v) for v in value]
        if type(value) in (tuple, torch.Size):
            return {"tuple": [self.value(v) for v in value]}
        if type(value) is dict:
            return {"dict": [[self.value(k), self.value(v)] for k, v in value.items()]}
        raise CheckpointError(
            f"the captured program can't be saved: it holds a {type(value).__name__}. Supported: "
            f"tensors, numbers, strings, None, and lists, tuples and dicts of them."
        )


class _Reader:
    """The same backwards."""

    def __init__(self, tensors: list[Tensor], read: Mapping[str, Any]) -> None:
        self.tensors = tensors
        self.symbols = [
            Symbol(torch.Size(shape), self.value(dtype)) for shape, dtype in read["symbols"]
        ]

    def graph(self, read: Mapping[str, Any]) -> Graph:
        symbols = self.symbols
        return Graph(
            tuple(self._call(*c) for c in read["calls"]),
            read["training"],
            {symbols[s]: name for s, name in read["tensors"]},
            tuple(symbols[s] for s in read["inputs"]),
            {symbols[s]: self.value(t) for s, t in read["constants"]},
            tuple(symbols[s] for s in read["outputs"]),
            {symbols[s]: why for s, why in read["leaving"]},
        )

    def _call(
        self, schema: str, name: str, arguments: Any, outputs: Any, several: bool, module: str
    ) -> Call:
        found = {k: self.value(v) for k, v in arguments.items()}
        return Call(_operation(schema), name, found, self.value(outputs), several, module)

    def value(self, read: Any) -> Any:
        if isinstance(read, list):
            return [self.value(v) for v in read]
        if not isinstance(read, dict):
            return read
        if "tensor" in read:
            return self.tensors[read["tensor"]].to(read["device"])
        ((kind, value),) = read.items()
        if kind == "symbol":
            return self.symbols[value]
        if kind == "tuple":
            return tuple(self.value(v) for v in value)
        if kind == "dict":
            return {self.value(k): self.value(v) for k, v in value}
        if kind == "complex":
            return complex(*value)
        return torch.device(value) if kind == "device" else getattr(torch, value)


def _operation(schema: str) -> Any:
    """The registered operation of a schema."""
    full = schema.partition("(")[0]
    space, _, rest = full.partition("::")
    name, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, space), name, None)
    found = getattr(packet, overload or "default", None)
    if found is None or str(found._schema) != schema:
        raise CheckpointError(
            f"the captured program calls {full}, which is not registered here, or not with the "
            f"same arguments. Import the library that defines it, then load again."
        )
    return found
