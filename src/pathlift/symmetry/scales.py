"""The abstract value of an activation or parameter: which log2 scale each of its elements carries.

A scale is a *variable*, named by a positive integer id; id 0 is the scale that is always zero.
An element's scale is an integer combination of variables. A tensor's scales are therefore a
:class:`Form`: a sum of terms ``coefficient * ids`` with ``ids`` an integer tensor of the shape of
the value, nearly always an expanded (stride 0) view of one id per channel. Reshaping, slicing or
permuting an activation is reshaping, slicing or permuting its ids.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Values of more ids than this are not kept alive to be compared with later ones.
_LARGE = 1 << 20


def varying(ids: Tensor) -> frozenset[int]:
    """The dimensions along which ``ids`` may vary (size above 1 and not expanded)."""
    sizes = zip(ids.shape, ids.stride(), strict=True)
    return frozenset(d for d, (n, s) in enumerate(sizes) if n > 1 and s)


def distinct(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The different numbers, in order; fresh scales are numbered in order already."""
    return ids if bool((ids[1:] > ids[:-1]).all()) else np.unique(ids)


def collapse(ids: Tensor) -> Tensor:
    """``ids`` with size 1 along every dimension it does not vary in."""
    stride = ids.stride()
    size = [n if n > 1 and s else min(n, 1) for n, s in zip(ids.shape, stride, strict=True)]
    return ids.as_strided(size, stride, ids.storage_offset())


def compact(ids: Tensor) -> Tensor:
    """The same ids with stride 0 along every dimension in which all slices are equal.

    Operations that had to copy (``cat``, ``roll``, some reshapes) return to views here, so that
    positions and tokens do not multiply the ids.
    """
    if ids.numel() == 0:
        return ids
    small = collapse(ids)
    for d in sorted(varying(small), key=lambda d: -ids.shape[d]):
        first = small.narrow(d, 0, 1)
        if torch.equal(small.narrow(d, 1, 1), first) and bool((small == first).all()):
            small = first
    return small.expand(ids.shape)


def thin(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Drop, along every dimension, the positions at which all tensors repeat the one before.

    The tensors have one shape; what is dropped is an exact copy of what stays. One pass over the
    ids leaves a few rows of what joining a class token to ten thousand patches had copied.
    """
    grids = list(tensors)
    for d in sorted(range(grids[0].dim()), key=grids[0].size, reverse=True):
        n = grids[0].size(d)
        moved = [collapse(g) for g in grids if n > 1 and g.stride(d) != 0]
        new = torch.zeros(n, dtype=torch.bool)
        new[0] = True
        for g in moved:
            differs = g.narrow(d, 1, n - 1) != g.narrow(d, 0, n - 1)
            new[1:] |= differs.movedim(d, 0).reshape(n - 1, -1).any(1)
        if not bool(new.all()):
            keep = new.nonzero().flatten()
            grids = [_select(g, d, keep) for g in grids]
    return grids


def _select(ids: Tensor, dim: int, keep: Tensor) -> Tensor:
    """``ids.index_select`` that leaves expanded dimensions expanded."""
    shape = [keep.numel() if d == dim else n for d, n in enumerate(ids.shape)]
    small = collapse(ids)
    return (small.index_select(dim, keep) if small.size(dim) > 1 else small).expand(shape)


@dataclass(frozen=True)
class Form:
    """A sum of ``coefficient * ids``; no term at all means scale 0 everywhere (pinned).

    ``why`` says what pinned a form without terms, for the summary.
    """

    shape: torch.Size
    terms: tuple[tuple[int, Tensor], ...] = ()
    why: str | None = None

    @property
    def pinned(self) -> bool:
        """Whether every element has scale 0 by construction."""
        return not self.terms

    def map(self, function: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Form:
        """Apply a shape operation to the ids of every term."""
        return Form(torch.Size(shape), tuple((c, function(ids)) for c, ids in self.terms), self.why)

    def scaled(self, factor: int) -> Form:
        """``factor`` times this form (the scale of an integer power)."""
        terms = tuple((c * factor, ids) for c, ids in self.terms if factor)
        return Form(self.shape, terms, self.why)

    def expand(self, shape: Sequence[int]) -> Form:
        """Broadcast to ``shape``."""
        return self.map(lambda ids: ids.expand(torch.Size(shape)), shape)

    def first(self, dims: Iterable[int]) -> Form:
        """The slice at index 0 of ``dims`` (kept with size 1)."""
        dims = {d % max(len(self.shape), 1) for d in dims}
        shape = [1 if d in dims else n for d, n in enumerate(self.shape)]
        index = tuple(slice(0, 1) if d in dims else slice(None) for d in range(len(self.shape)))
        return self.map(lambda ids: ids[index], shape)


def add_forms(*forms: Form) -> Form:
    """The sum of forms of one shape; equal views are merged."""
    merged: dict[Hashable, tuple[int, Tensor]] = {}
    for form in forms:
        for coefficient, ids in form.terms:
            small = collapse(ids)
            key = _address(small)
            old = merged.get(key, (0, ids))[0]
            merged[key] = (old + coefficient, ids)
    terms = tuple((c, ids) for c, ids in merged.values() if c)
    return Form(forms[0].shape, terms, next((f.why for f in forms if f.why), None))


@dataclass
class Leaf:
    """A parameter, whose form is set by the first operation that consumes it.

    ``why_input``: what pins the other factor of its first product, where that is pinned.
    """

    name: str
    shape: torch.Size
    form: Form | None = None
    why_pinned: str | None = None
    why_input: str | None = None
    uses: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Value:
    """What is known of one node of the graph.

    Attributes:
        form: scales of the elements; ``None`` for a parameter no operation has consumed yet.
        leaf: the parameter itself where the node is one.
        constant: the concrete tensor where it depends on neither inputs nor parameters.
        zero: whether all elements are exactly zero (any scale is right).
    """

    shape: torch.Size
    form: Form | None
    leaf: Leaf | None = None
    constant: Tensor | None = None
    zero: bool = False

    @cached_property
    def key(self) -> Hashable | None:
        """Equal for values of equal scales, as long as both are alive; None for large ids."""
        if self.form is None:
            return self.leaf.name if self.leaf is not None else None
        terms = [(c, collapse(ids)) for c, ids in self.form.terms]
        if any(ids.numel() > _LARGE for _, ids in terms):
            return None
        known = () if self.constant is None else (_address(self.constant), self.constant.dtype)
        scales = tuple((c, *_address(ids)) for c, ids in terms)
        return self.shape, scales, self.form.why, known, self.zero


def _address(tensor: Tensor) -> tuple[Hashable, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def axis_components(axes: Sequence[frozenset[int]]) -> list[list[int]]:
    """Group terms that share a dimension, directly or through others."""
    groups: list[tuple[set[int], list[int]]] = []
    for k, own in enumerate(axes):
        touching = [g for g in groups if g[0] & own]
        merged: tuple[set[int], list[int]] = (set(own), [k])
        for g in touching:
            merged[0].update(g[0])
            merged[1].extend(g[1])
            groups.remove(g)
        groups.append(merged)
    return [sorted(members) for _, members in groups]


def values_in(nested: Any) -> list[Value]:
    """All values inside nested lists, tuples and dicts."""
    if isinstance(nested, Value):
        return [nested]
    if isinstance(nested, dict):
        return [v for x in nested.values() for v in values_in(x)]
    if isinstance(nested, (list, tuple)):
        return [v for x in nested for v in values_in(x)]
    return []
