"""Which tensors of a running model share memory, and what a write to one does to the others.

A *root* is a tensor that owns memory; every other tensor is a *slot*: a chain of views of a root.
A write makes a new value of the root (through a view: the root with that part overwritten), and
slots that were made before are taken anew from it when they are read next. So the recorded program
is functional and holds whatever aliasing the model uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pathlift.capture.program import Symbol, call
from pathlift.errors import CaptureError

aten = torch.ops.aten

# Emits one call: operation, arguments, shape and dtype of the result; the result's symbol.
Emit = Callable[[Any, dict[str, Any], torch.Size, torch.dtype], Symbol]
# Names a known tensor.
Constant = Callable[[Tensor], Symbol]


@dataclass(eq=False)
class Root:
    """A tensor that owns memory.

    Attributes:
        value: its current value (None for a constant that nothing has read yet).
        external: what it is, where it outlives the call (a parameter, buffer, input, attribute).
        symbolic: whether its value depends on inputs, parameters or state.
        known: whether its value went into the program (a tensor from outside that no call changes).
        version: number of writes so far.
        constants: the symbols that stand for its value so far.
    """

    value: Symbol | None = None
    external: str | None = None
    symbolic: bool = True
    known: bool = False
    version: int = 0
    constants: list[Symbol] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Step:
    """One view: an operation, the argument that it views, and which of its results this is."""

    target: Any
    name: str
    arguments: dict[str, Any]
    viewed: str
    pick: int | None
    shape: torch.Size
    dtype: torch.dtype


@dataclass(eq=False)
class Slot:
    """One tensor object: a chain of views of a root, and its value as of a version of the root."""

    root: Root
    chain: tuple[Step, ...] = ()
    symbol: Symbol | None = None
    version: int = 0


_SAME = {"alias", "detach", "lift_fresh", "contiguous", "to", "expand", "expand_as", "positive"}
_SHAPED = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"}
_SHAPED |= {"view_as", "reshape_as", "_reshape_alias", "ravel", "atleast_1d", "atleast_2d"}
_TURNED = {"transpose", "t", "swapaxes", "swapdims", "mT", "adjoint", "matrix_H", "numpy_T"}


def overwritten(emit: Emit, constant: Constant, base: Symbol, step: Step, new: Symbol) -> Symbol:
    """``base`` with the part that ``step`` views replaced by ``new``.

    Raises:
        CaptureError: the view reads memory as another type.
    """
    arguments = step.arguments

    def made(target: Any, more: dict[str, Any]) -> Symbol:
        return emit(target, more, base.shape, base.dtype)

    def part(dim: int, start: int, stop: int, stride: int = 1) -> Symbol:
        more = {"self": base, "src": new, "dim": dim, "start": start, "end": stop, "step": stride}
        return made(aten.slice_scatter.default, more)

    if step.dtype != base.dtype or step.shape.numel() > base.shape.numel():
        raise CaptureError(
            f"the model writes into a tensor that '{step.name}' made of another one, whose type or "
            f"size differs; what such a write changes can't be followed. Write into a copy."
        )
    if step.name in _SAME and step.shape == base.shape:
        return new
    if step.name in _SHAPED:
        return made(aten.reshape.default, {"self": new, "shape": list(base.shape)})
    if step.name in _TURNED:
        return made(step.target, {**arguments, step.viewed: new})
    if step.name == "permute":
        order = [d % len(base.shape) for d in arguments["dims"]]
        back = [order.index(d) for d in range(len(order))]
        return made(aten.permute.default, {"self": new, "dims": back})
    if step.name in ("select", "diagonal") and step.viewed == "self":
        target = getattr(aten, f"{step.name}_scatter").default
        more = {k: v for k, v in arguments.items() if k != "self"}
        return made(target, {"self": base, "src": new, **more})
    if step.name == "slice":
        start = arguments["start"] or 0
        stop = arguments["end"] if arguments["end"] is not None else base.shape[arguments["dim"]]
        return part(arguments["dim"], start, stop, arguments["step"])
    if step.name == "unbind" and step.pick is not None:
        more = {"self": base, "src": new, "dim": arguments["dim"], "index": step.pick}
        return made(aten.select_scatter.default, more)
    return _by_positions(emit, constant, base, step, new)


def _by_positions(emit: Emit, constant: Constant, base: Symbol, step: Step, new: Symbol) -> Symbol:
    """Any view: run on element numbers, it says where in ``base`` its elements are."""
    numbers = torch.arange(base.shape.numel()).reshape(base.shape)
    found = call(step.target, {**step.arguments, step.viewed: numbers})
    where = (found if step.pick is None else found[step.pick]).reshape(-1)
    flat = torch.Size([base.shape.numel()])
    shaped = aten.reshape.default
    old = emit(shaped, {"self": base, "shape": list(flat)}, flat, base.dtype)
    size = torch.Size([where.numel()])
    values = emit(shaped, {"self": new, "shape": list(size)}, size, base.dtype)
    arguments = {"self": old, "indices": [constant(where)], "values": values, "accumulate": False}
    written = emit(aten.index_put.default, arguments, flat, base.dtype)
    return emit(shaped, {"self": written, "shape": list(base.shape)}, base.shape, base.dtype)
