"""PyTorch's own operator samples as small modules: a rescalable layer feeds one argument.

A case is one floating tensor argument of one sample of one operator. Its module computes

    argument = Linear(x) reshaped       (every entry of the argument has a scale of its own)
    results  = operator(..., argument, ...)       (the other tensors are buffers)
    outputs  = Linear(result) for every floating result, anything else as it is

so that a scale which the operator lets through is taken back by the second layer, entry by entry.
The first layer's weights are chosen such that the argument has the sample's own values: what needs
a domain (log, acos, cholesky) stays in it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_unflatten

# Layers this wide cost time and show nothing that narrow ones don't.
WIDEST = 20_000
INPUT = (1.0, 0.5)


@dataclass(frozen=True)
class Operator:
    """One entry of the database."""

    name: str
    call: Callable[..., Any]
    info: Any = field(repr=False, compare=False)


@dataclass(frozen=True)
class Case:
    """One argument of one sample: ``leaves[argument]`` of ``(args, kwargs)`` is fed."""

    operator: Operator
    sample: int
    argument: int
    leaves: tuple[Any, ...] = field(repr=False)
    structure: Any = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.sample}.{self.argument}"

    def module(self) -> nn.Module:
        return Sandwich(self)


@cache
def database() -> dict[str, Operator]:
    """Every operator that takes float32, by name (and variant, after a dot)."""
    from torch.testing._internal.common_methods_invocations import op_db

    found: dict[str, Operator] = {}
    for info in op_db:
        if torch.float32 not in info.dtypes:
            continue
        variant = f".{info.variant_test_name}" if info.variant_test_name else ""
        found[info.name + variant] = Operator(info.name + variant, info.op, info)
    return found


def seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def cases(operator: Operator) -> Iterator[Case]:
    """The operator's cases; a sample that repeats the shapes and options of another stands once."""
    seed()
    seen: set[str] = set()
    for k, sample in enumerate(operator.info.sample_inputs("cpu", torch.float32)):
        leaves, structure = tree_flatten(((sample.input, *sample.args), dict(sample.kwargs)))
        kind = str(structure) + " ".join(map(_kind, leaves))
        if kind in seen:
            continue
        seen.add(kind)
        for j, leaf in enumerate(leaves):
            if feedable(leaf):
                yield Case(operator, k, j, tuple(leaves), structure)


def feedable(leaf: object) -> bool:
    return (
        isinstance(leaf, Tensor)
        and leaf.dtype == torch.float32
        and leaf.layout == torch.strided
        and leaf.numel() <= WIDEST
    )


def _kind(leaf: object) -> str:
    if isinstance(leaf, Tensor):
        layout = (leaf.dtype, tuple(leaf.shape), leaf.layout)
        return repr((*layout, leaf.stride() if leaf.layout == torch.strided else None))
    return repr(leaf)


class Feed(nn.Module):
    """A linear layer of ``INPUT`` whose output is ``values``, up to rounding."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        flat = values.detach().reshape(-1, 1).clone()
        self.shape = values.shape
        # INPUT @ (v/2, v/2) + v/4 = v
        self.weight = nn.Parameter(flat * torch.full((1, 2), 0.5))
        self.bias = nn.Parameter(flat[:, 0] * 0.25)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias).view(self.shape)


class Use(nn.Module):
    """What consumes a result: a linear layer, or entry by entry where NaNs must not spread."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.whole = bool(result.isfinite().all())
        count = result.numel()
        shape = (2, count) if self.whole else (count,)
        self.weight = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, result: Tensor) -> Tensor:
        flat = result.reshape(-1)
        return functional.linear(flat, self.weight) if self.whole else flat * self.weight


class Sandwich(nn.Module):
    """Feed, operator, uses. Raises what the operator raises on these arguments."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.feed = Feed(case.leaves[case.argument])
        self.fixed = [k for k, leaf in enumerate(case.leaves) if isinstance(leaf, Tensor)]
        self.fixed.remove(case.argument)
        for k in self.fixed:
            self.register_buffer(f"fixed_{k}", case.leaves[k].detach().clone())
        seed()
        with torch.no_grad():
            results = self.results(torch.tensor(INPUT))
        self.uses = nn.ModuleList(Use(r) if usable(r) else nn.Identity() for r in results)

    def results(self, x: Tensor) -> list[Any]:
        leaves = list(self.case.leaves)
        leaves[self.case.argument] = self.feed(x)
        for k in self.fixed:
            leaves[k] = getattr(self, f"fixed_{k}")
        args, kwargs = tree_unflatten(leaves, self.case.structure)
        return [real(r) for r in tree_flatten(self.case.operator.call(*args, **kwargs))[0]]

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        results = self.results(x)
        return tuple(use(r) for use, r in zip(self.uses, results, strict=True))


def real(result: Any) -> Any:
    """A result as the dense real tensor of its numbers; other things as they are."""
    if not isinstance(result, Tensor):
        return result
    dense = result if result.layout == torch.strided else result.to_dense()
    return torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense


def usable(result: Any) -> bool:
    return (
        isinstance(result, Tensor)
        and result.dtype == torch.float32
        and 0 < result.numel() <= WIDEST
    )
