"""How an optimiser's state changes when a parameter ``theta`` becomes ``theta * 2^k``.

The gradient becomes ``g * 2^-k``, so state that is linear in past gradients takes ``2^-k``, a
mean of their squares ``2^-2k``, a mean of past weights ``2^k``, and what depends on ratios of
these nothing. The *power* of an entry is that multiple of ``k``. It belongs to an optimiser and
a key, not to the key alone: ``momentum_buffer`` sums gradients in SGD (-1) but gradients divided
by their own size in RMSprop (0).

Every entry is covariant in this way up to two constants the user chose: ``eps`` where it enters
the state (Adamax, Adadelta), and a coupled ``weight_decay``, which adds multiples of ``theta`` to
the gradient and is itself not invariant under rescaling. Both are treated as part of the gradient.
Learning rates and step sizes adapted from them (Rprop, ASGD) stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, optim

from pathlift.errors import ArgumentError, RangeError
from pathlift.tensors.extents import Extent, Factors, Joined, Span, exponent_limits, extents
from pathlift.tensors.rules import (
    NEVER,
    NO_STATE_FOLLOWS,
    RULES,
    WHOLE,
    Rule,
    reason,
    rule_for,
)
from pathlift.tensors.shards import largest_around, local_factors, local_part

Optimizers = optim.Optimizer | Sequence[optim.Optimizer] | None


@dataclass(frozen=True)
class _Change:
    """One entry of the state, the factors it takes, and how to speak of it."""

    value: Tensor
    factors: Factors
    power: int
    label: str


def declare_state(optimizer_class: type[optim.Optimizer], powers: Mapping[str, int]) -> None:
    """Say how the state of an optimiser of your own transforms, for this process.

    Subclasses inherit what is declared for their bases. Declaring a key again replaces it.

    Args:
        optimizer_class: the class, not an instance.
        powers: key of ``optimizer.state[parameter]`` -> power ``q``: the state is multiplied by
            ``2^(q k)`` when the parameter is by ``2^k``. -1 for what is linear in gradients, -2
            for their squares, 1 for weights, 0 for what stays (counters, ratios). State with a
            power other than 0 must be a tensor of the parameter's shape.

    Raises:
        ArgumentError: not an optimiser class, or a power that is not an integer.

    >>> import torch
    >>> from pathlift.training import declare_state
    >>> class Signs(torch.optim.Optimizer):
    ...     '''Keeps a mean of gradients and a counter.'''
    >>> declare_state(Signs, {"mean": -1, "count": 0})
    """
    if not isinstance(optimizer_class, type) or not issubclass(optimizer_class, optim.Optimizer):
        raise ArgumentError(
            f"optimizer_class must be a subclass of torch.optim.Optimizer; found "
            f"{optimizer_class!r}. Pass the class, not an instance."
        )
    if not isinstance(powers, Mapping):
        raise ArgumentError(
            f"powers must be a dict from state keys to integers; found {type(powers).__name__}."
        )
    for key, power in powers.items():
        if not isinstance(key, str) or isinstance(power, bool) or not isinstance(power, int):
            raise ArgumentError(
                f"powers must map state keys to integers; found {key!r}: {power!r}. Use -1 for "
                f"what scales like a gradient, -2 for its square, 1 like a parameter, 0 to keep."
            )
    rules = RULES.setdefault(optimizer_class, {})
    rules.update({key: Rule(power) for key, power in powers.items()})


def state_changes(
    optimizer: Optimizers,
    changes: Iterable[tuple[str, Tensor, Factors]],
) -> list[tuple[Tensor, Factors, int]]:
    """The state tensors to multiply when parameters are rescaled; nothing is changed here.

    Args:
        optimizer: an optimiser, several (each holding some of the parameters), or None. Wrappers
            of Accelerate and Lightning are looked through.
        changes: per rescaled parameter its name, itself, and log2 factors that broadcast to its
            shape.

    Returns:
        Tuples of a state tensor, log2 factors that broadcast to its shape, and the power: the
        tensor is to be multiplied by ``2 ** (power * sum(factors))``. Entries that fall below the
        normal range of their dtype round; nothing overflows.

    Raises:
        ArgumentError: state whose transformation is not known or can't be expressed.
        RangeError: state that would overflow.

    >>> import torch
    >>> from pathlift.training import state_changes
    >>> weight = torch.nn.Parameter(torch.ones(2, 3))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> rows = torch.tensor([[1.0], [2.0]])  # log2 factors of the rows
    >>> ((buffer, _, power),) = state_changes(optimizer, [("w", weight, [rows])])
    >>> buffer.shape, power  # to be multiplied by 2 ** -rows
    (torch.Size([2, 3]), -1)
    """
    changes = list(changes)
    found: list[_Change] = []
    several = optimizers_of(optimizer)
    _check_own(several, [parameter for _, parameter, _ in changes])
    for one in several:
        _refuse_state(one)
        for name, parameter, exponents in changes:
            state = one.state.get(parameter, {})
            if not _has_stepped(state):
                continue
            for key, value in state.items():
                label = f"{type(one).__name__} keeps state '{key}' for '{name}'"
                change = _entry(one, key, value, parameter, exponents, label)
                if change is not None:
                    found.append(change)
    # All at once: they are many, and most of them small.
    known = extents({str(k): change.value for k, change in enumerate(found)})
    spans = iter(Joined.of([e for change in found for e in change.factors]).spans())
    return [
        (c.value, _in_range(c, known[str(k)], [next(spans) for _ in c.factors]), c.power)
        for k, c in enumerate(found)
    ]


def holding_state(optimizer: Optimizers) -> Optimizers:
    """Those of the optimisers that have taken a step: none, one, or a list of them."""
    found = [one for one in optimizers_of(optimizer) if any(map(_has_stepped, one.state.values()))]
    return found if len(found) > 1 else found[0] if found else None


# Where the wrappers of Accelerate and Lightning, and Lookahead, keep the optimiser they wrap.
_WRAPPED = ("optimizer", "_base_optimizer")


def optimizers_of(optimizer: Any) -> list[optim.Optimizer]:
    """The optimisers that hold the state, out of their wrappers.

    Raises:
        ArgumentError: not an optimiser, or one that trains copies of the weights.
    """
    if optimizer is None:
        return []
    found = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    for k, one in enumerate(found):
        one = _unwrapped(one)
        if not isinstance(one, optim.Optimizer):
            raise ArgumentError(
                f"optimizer must be a torch.optim.Optimizer, a list of them or None; found "
                f"{type(one).__name__}."
            )
        found[k] = one
    return found


def _unwrapped(one: Any) -> Any:
    while True:
        inner = [getattr(one, name, None) for name in _WRAPPED]
        for each in (one, *inner):
            why = reason(type(each), NEVER)
            if why is not None:
                raise ArgumentError(f"{type(each).__name__} {why}.")
        wrapped = [w for w in inner if isinstance(w, optim.Optimizer)]
        if not wrapped:
            return one
        one = wrapped[0]


def _check_own(several: Sequence[optim.Optimizer], parameters: Sequence[Tensor]) -> None:
    """State that belongs to none of the parameters would be left behind without a word."""
    own = {id(p) for one in several for group in one.param_groups for p in group["params"]}
    stepped = [one for one in several if any(map(_has_stepped, one.state.values()))]
    if stepped and parameters and not any(id(p) in own for p in parameters):
        raise ArgumentError(
            f"{type(stepped[0]).__name__} holds none of the model's parameters that move, so its "
            f"state can't follow them. Pass the optimiser that trains this very model; one that "
            f"trains flat copies of its parameters can't be carried along."
        )


def _refuse_state(optimizer: optim.Optimizer) -> None:
    if not any(map(_has_stepped, optimizer.state.values())):
        return
    why = reason(type(optimizer), NO_STATE_FOLLOWS)
    if why is not None:
        raise ArgumentError(
            f"{type(optimizer).__name__} {why}. Condition before the first step, or condition "
            f"without optimizer= and start a new {type(optimizer).__name__}."
        )
    # All of its state stands under its first parameter, so the loop over parameters may miss it.
    if isinstance(optimizer, optim.LBFGS) and any(optimizer.state.values()):
        raise ArgumentError(
            f"{type(optimizer).__name__} scales its first guess of the Hessian by one number for "
            f"all parameters, so its history (state 'old_dirs') can't be carried through a "
            f"rescaling. Condition before the first step, or condition without optimizer= and "
            f"start a new {type(optimizer).__name__}."
        )


def _has_stepped(state: Mapping[str, Any]) -> bool:
    """Whether there is state of past gradients: Adagrad's initial value is a constant, not one."""
    step = state.get("step")
    return bool(state) and not (isinstance(step, (Tensor, int, float)) and float(step) == 0)


def _entry(
    optimizer: optim.Optimizer,
    key: str,
    value: Any,
    parameter: Tensor,
    exponents: Factors,
    label: str,
) -> _Change | None:
    """The change of one entry of the state; None if it stays."""
    if value is None:
        return None
    rule = rule_for(type(optimizer), optimizer.state[parameter], key)
    if rule is None:
        raise ArgumentError(
            f"{label}, and how it transforms under rescaling is not known. Say it with "
            f"pathlift.training.declare_state({type(optimizer).__name__}, {{'{key}': power}}), "
            f"where power is -1 for what scales like a gradient, -2 for its square, 1 like a "
            f"parameter, 0 for what stays; or condition before the first step."
        )
    if rule.power == 0:
        return None
    factors = _averaged(exponents, rule.averaged, label)
    shape = list(parameter.shape)
    if rule.averaged == WHOLE:
        shape = list(getattr(value, "shape", shape))
    elif isinstance(rule.averaged, int):
        shape[rule.averaged] = 1
    _check_entry(value, shape, rule.power, label)
    return _Change(value, factors, rule.power, label)


def _averaged(exponents: Factors, axis: int | str | None, label: str) -> Factors:
    """The factors with ``axis`` reduced to size 1; raises where they differ along it."""
    if axis is None:
        return exponents
    if isinstance(axis, str):
        first = [e.flatten()[0] for e in exponents]
        where = "several entries of the parameter, between which"
    else:
        first = [e.narrow(axis, 0, 1) if e.dim() >= -axis else e for e in exponents]
        where = f"dimension {axis} of the parameter, along which"
    if all(bool((e == f).all()) for e, f in zip(exponents, first, strict=True)):
        return first
    raise ArgumentError(
        f"{label}, a mean over {where} the rescaling "
        f"differs: the new mean is not known. Condition before the first step, or use an "
        f"optimiser whose state is not factored."
    )


def _check_entry(value: Any, shape: Sequence[int], power: int, label: str) -> None:
    wrong = (
        f"a {type(value).__name__}"
        if not isinstance(value, Tensor)
        else f"a tensor of layout {value.layout}"
        if value.layout != torch.strided
        else f"a tensor of shape {tuple(value.shape)}"
        if value.shape != torch.Size(shape)
        else f"a tensor of {value.dtype}"
        if not value.is_floating_point()
        else None
    )
    if wrong is not None:
        raise ArgumentError(
            f"{label}, {wrong}; with power {power} it must be a dense floating-point tensor of "
            f"shape {tuple(shape)}. Declare power 0 if it stays, or condition before the first "
            f"step."
        )


def _in_range(change: _Change, known: Extent, spans: Sequence[Span]) -> Factors:
    """The factors in an order without needless rounding; raises if the result overflows.

    Underflow is let pass: momentum of a unit that died decays through the subnormal numbers, and
    what is lost there is far below ``eps``.

    ``spans``: the smallest and largest entry of every factor.
    """
    value, power, found = change.value, change.power, known.exponents
    if found is None or not change.factors:
        return change.factors
    low, high = exponent_limits(value.dtype)
    up = sum(max(power * bottom, power * top, 0.0) for bottom, top in spans)
    down = sum(min(power * bottom, power * top, 0.0) for bottom, top in spans)
    if found[1] + up < high and (len(spans) == 1 or found[0] + down >= low):
        return change.factors
    joined = sum(change.factors[1:], change.factors[0])
    part, (moved,) = local_part(value.detach()), local_factors(value, [power * joined])
    logs = part.double().abs().log2() + moved.to(part.device)
    top = int(logs.max().floor().clamp(-5000, 5000)) if logs.numel() else -5000
    (largest,) = largest_around(value, (top,))
    if largest > high:
        raise RangeError(
            f"{change.label}, which would overflow {str(value.dtype).removeprefix('torch.')}: its "
            f"largest entry would be 2**{largest}. Nothing was changed. Use smaller scales, "
            f"or condition before the first step."
        )
    return [joined]
