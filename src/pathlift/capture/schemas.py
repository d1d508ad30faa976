"""What the schema of an operation says: its arguments by name, what it writes, what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pathlift.capture.kernels import PARTS

# Arguments of norms that hold running averages: an update leaves them what they are to the norm.
_AVERAGES = frozenset({"running_mean", "running_var"})
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


@dataclass(frozen=True)
class Plan:
    """What the schema of an operation says."""

    name: str
    full: str
    arguments: tuple[Any, ...]
    mutated: tuple[str, ...]
    functional: Any
    aliases: bool
    composite: bool
    compiled: bool
    seeded: bool
    reshaped: bool
    uninitialised: bool


@cache
def plan_of(func: Any) -> Plan:
    schema = func._schema
    full = str(schema.name)
    space, _, plain = full.partition("::")
    in_place = plain.endswith("_") and not plain.endswith("__")
    base = plain[:-1] if in_place else plain
    if base.startswith("__i") and base.endswith("__"):
        base = f"__{base[3:]}"
    mutated = tuple(
        a.name
        for a in schema.arguments
        if a.alias_info is not None and a.alias_info.is_write and a.name not in _AVERAGES
    )
    functional = _functional(func, space, base, mutated) if mutated else func
    known = space == "aten" and functional is not None
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE)
    composite = compiled or _COMPOSITE in func.py_kernels
    return Plan(
        name=base if known else full,
        full=full,
        arguments=tuple(schema.arguments),
        mutated=mutated,
        functional=functional or func,
        aliases=composite or any(r.alias_info is not None for r in schema.returns),
        composite=composite,
        compiled=compiled,
        seeded=torch.Tag.nondeterministic_seeded in func.tags,
        reshaped=torch.Tag.inplace_view in func.tags,
        uninitialised=base.startswith(("empty", "new_empty", "resize")),
    )


def taken_apart(
    func: Any, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], real: bool = False
) -> Any:
    """Call what an operation is composed of; NotImplemented if it can't be taken apart.

    Args:
        real: by the kernel that a model outside of a recording has. PyTorch's decompositions in
            Python may choose other operations: for ``lstm`` in bfloat16 one that not every machine
            has.
    """
    if plan.name in PARTS:
        return PARTS[plan.name](*args, **kwargs)
    if real and plan.compiled:
        return func._op_dk(_COMPOSITE, *args, **kwargs)
    return func.decompose(*args, **kwargs) if plan.composite else NotImplemented


def _functional(func: Any, space: str, base: str, mutated: tuple[str, ...]) -> Any:
    """The overload that returns what ``func`` writes."""
    packet = getattr(getattr(torch.ops, space), base, None)
    if packet is None:
        return None
    schema = func._schema
    outs = {a.name for a in schema.arguments if a.name in mutated and a.kwarg_only}
    wanted = [a.name for a in schema.arguments if a.name not in outs]
    names = list(packet.overloads())
    own = func._overloadname
    for overload in sorted(names, key=lambda n: n != own):
        candidate = getattr(packet, overload)
        other = candidate._schema
        plain = all(a.alias_info is None or not a.alias_info.is_write for a in other.arguments)
        if plain and [a.name for a in other.arguments] == wanted:
            return candidate
    return None


def bound_arguments(plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound: dict[str, Any] = {}
    for k, argument in enumerate(plan.arguments):
        if k < len(args) and not argument.kwarg_only:
            bound[argument.name] = args[k]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def tensors_of(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, dict):
        for value in nested.values():
            yield from tensors_of(value)
    elif isinstance(nested, (list, tuple)):
        for value in nested:
            yield from tensors_of(value)


def mapped(nested: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(nested, Tensor):
        return function(nested)
    if isinstance(nested, dict):
        return {k: mapped(v, function) for k, v in nested.items()}
    if isinstance(nested, (list, tuple)):
        return [mapped(v, function) for v in nested]
    return nested


def _returns(func: Any, result: Any) -> list[tuple[Any, Any]]:
    """What was returned, each with what the schema says of it."""
    returns = func._schema.returns
    several = list(result) if len(returns) > 1 else [result]
    return list(zip(returns, several, strict=True)) if returns else []


def unwritten(func: Any, result: Any) -> list[Any]:
    """What was returned besides the tensors that were written."""
    return [
        value
        for schema, value in _returns(func, result)
        if schema.alias_info is None or not schema.alias_info.is_write
    ]


def restored(func: Any, result: Any, bound: dict[str, Any]) -> Any:
    """The result with the tensors that were written as they were given."""
    given: dict[str, Any] = {}
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            given.update((name, bound[argument.name]) for name in argument.alias_info.before_set)
    found = []
    for schema, value in _returns(func, result):
        written = schema.alias_info is not None and schema.alias_info.is_write
        names = schema.alias_info.before_set if written else ()
        found.append(next((given[n] for n in names if n in given), value))
    if len(func._schema.returns) > 1:
        return tuple(found)
    return found[0] if found else result
