"""Example inputs: one form inside, and the tensors in whatever the model takes or returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathlift.capture.program import Inputs
from pathlift.errors import ArgumentError


def as_inputs(example_inputs: object) -> Inputs:
    """Normalise a tensor, a tuple or list of arguments, or a dict of keyword arguments."""
    if isinstance(example_inputs, Tensor):
        return Inputs((example_inputs,), {})
    if isinstance(example_inputs, (tuple, list)):
        return Inputs(tuple(example_inputs), {})
    if isinstance(example_inputs, Mapping):
        if not all(isinstance(k, str) for k in example_inputs):
            raise ArgumentError(
                "example_inputs is a dict whose keys are not all strings; a dict is passed as "
                "keyword arguments. Wrap it in a tuple to pass it as one positional argument."
            )
        return Inputs((), dict(example_inputs))
    raise ArgumentError(
        f"example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments; "
        f"found {type(example_inputs).__name__}. Pass one batch as the model's forward takes it."
    )


def copied(inputs: Inputs) -> Inputs:
    """Inputs that a call may write into."""
    return Inputs(*pytree.tree_map_only(Tensor, _copy, (inputs.args, inputs.kwargs)))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if tensor.layout == torch.strided else tensor


def describe(inputs: Inputs) -> str:
    """Shapes and dtypes of the inputs, for messages."""

    def one(value: object) -> str:
        if isinstance(value, Tensor):
            return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        return type(value).__name__

    parts = [one(a) for a in inputs.args] + [f"{k}={one(v)}" for k, v in inputs.kwargs.items()]
    return "[" + ", ".join(parts) + "]"


def doubled(inputs: Inputs) -> Inputs | None:
    """The batch twice, where all tensors have one common leading size of 1."""
    tensors = [t for t in pytree.tree_leaves((inputs.args, inputs.kwargs)) if _is_tensor(t)]
    if not tensors or any(t.dim() == 0 or t.shape[0] != 1 for t in tensors):
        return None
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: torch.cat([t, t]), (inputs.args, inputs.kwargs)
    )
    return Inputs(args, kwargs)


def rolled(inputs: Inputs) -> Inputs:
    """Other values of the same range: every tensor's entries moved on by one."""

    def moved(tensor: Tensor) -> Tensor:
        plain = tensor.layout == torch.strided and tensor.numel() > 1 and not tensor.is_quantized
        return tensor.detach().roll(1) if plain else tensor

    return Inputs(*pytree.tree_map_only(Tensor, moved, (inputs.args, inputs.kwargs)))


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors inside nested containers and objects with attributes or slots, each once."""
    found: dict[int, Tensor] = {}
    seen: dict[int, Any] = {}
    _collect(value, found, seen)
    return list(found.values())


def _collect(value: Any, found: dict[int, Tensor], seen: dict[int, Any]) -> None:
    if isinstance(value, Tensor):
        found.setdefault(id(value), value)
        return
    if value is None or isinstance(value, (str, bytes, int, float, complex, type)):
        return
    if id(value) in seen or isinstance(value, (torch.nn.Module, torch.dtype, torch.device)):
        return
    seen[id(value)] = value
    for inner in _inside(value):
        _collect(inner, found, seen)


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if not name.startswith("__") and hasattr(value, name):
                yield getattr(value, name)
    if hasattr(value, "__dict__") and not callable(value):
        yield from vars(value).values()
