"""Tables of paths: activations of the listing by definition, and what its readings work with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathlift.capture.program import Call
from pathlift.errors import PathliftError, UnsupportedOperationError

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Table:
    """The paths that end in the elements of one activation.

    ``shape`` is the activation's; ``owner`` ``(n,)`` the flat element each path ends in, ascending;
    ``coefficient`` ``(n,)``; ``entries`` ``(n, longest)`` as in :class:`Paths`.
    """

    shape: tuple[int, ...]
    owner: Indices
    coefficient: Array
    entries: Indices

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def counts(self) -> Indices:
        """``(size,)``: paths per element."""
        return np.bincount(self.owner, minlength=self.size).astype(np.int64)

    def reshaped(self, shape: Sequence[int]) -> Table:
        return Table(tuple(shape), self.owner, self.coefficient, self.entries)

    def times(self, factor: float) -> Table:
        return Table(self.shape, self.owner, self.coefficient * factor, self.entries)


class Unknown:
    """A value that no path runs through and that is not known either (a mask, a random draw)."""


UNKNOWN = Unknown()


def sorted_table(
    shape: Sequence[int], owner: Indices, coefficient: Array, entries: Indices
) -> Table:
    order = np.argsort(owner, kind="stable")
    return Table(tuple(shape), owner[order], coefficient[order], entries[order])


def constant(value: Tensor) -> Table:
    """One path without parameters per element that is not 0."""
    flat = value.detach().to("cpu", torch.float64).reshape(-1).numpy()
    owner = np.flatnonzero(flat)
    return Table(tuple(value.shape), owner, flat[owner], np.zeros((len(owner), 0), np.int64))


def leaf(shape: Sequence[int], first: int) -> Table:
    """A parameter whose entries are numbered from ``first``."""
    size = math.prod(shape)
    entries = np.arange(first, first + size, dtype=np.int64)[:, None]
    return Table(tuple(shape), np.arange(size), np.ones(size), entries)


# One path without parameters.
UNIT = Table((), np.zeros(1, np.int64), np.ones(1), np.zeros((1, 0), np.int64))


def _widened(entries: Indices, width: int) -> Indices:
    return np.pad(entries, ((0, 0), (0, width - entries.shape[1])), constant_values=-1)


def stacked(tables: Sequence[Table]) -> Table:
    """Tables one after the other, as one flat activation."""
    width = max(t.entries.shape[1] for t in tables)
    starts = np.cumsum([0, *(t.size for t in tables)])
    return Table(
        (int(starts[-1]),),
        np.concatenate([t.owner + s for t, s in zip(tables, starts[:-1], strict=True)]),
        np.concatenate([t.coefficient for t in tables]),
        np.concatenate([_widened(t.entries, width) for t in tables]),
    )


def first_sample(table: Table, batch: int) -> Table:
    keep = table.owner < table.size // batch
    return Table(
        (table.size // batch,), table.owner[keep], table.coefficient[keep], table.entries[keep]
    )


def numbers(shape: Sequence[int]) -> Tensor:
    """Element numbers from 1, as float64 (exact) because not every operation takes integers."""
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(tuple(shape))


@dataclass
class Listing:
    """What a listing reading sees: the call at hand and the bound on the number of paths.

    A reading ``listing(context, call, **arguments)`` gets :class:`Table` for activations,
    :data:`UNKNOWN` for what is neither known nor made of paths (a mask, a random draw), plain
    tensors for constants, and numbers; it returns a :class:`Table` (a list where the operation
    returns several values).
    """

    max_paths: int
    batch: int
    total: Callable[[], str]
    node: Call = field(init=False)

    def check(self, count: float) -> None:
        """Raise if an activation of the whole batch has too many paths."""
        if count / self.batch <= self.max_paths:
            return
        raise PathliftError(
            f"{count / self.batch:,.0f} paths end in the output of '{self.node.label}' "
            f"(in module '{self.node.module}'), more than max_paths={self.max_paths:,}; the "
            f"whole model has about {self.total()}. Listing is for small networks: use "
            f"path_norm and path_kernel_diagonal, which list nothing, or raise max_paths."
        )

    def refuse(self, reason: str) -> UnsupportedOperationError:
        return UnsupportedOperationError(
            f"paths can't be listed through '{self.node.label}' "
            f"(in module '{self.node.module}'): {reason}. Supported: linear maps, "
            f"convolutions, ReLU and its kin, pooling, sums, products, shape operations and batch "
            f"norm with running statistics."
        )

    def table(self, value: Any) -> Table:
        """A number or a known tensor as an activation that starts paths of its own."""
        if isinstance(value, Table):
            return value
        return constant(torch.as_tensor(value, dtype=torch.float64))

    def joined(
        self,
        shape: Sequence[int],
        out: Indices,
        left: Table,
        i: Indices,
        right: Table,
        j: Indices,
        coefficients: Array | float = 1.0,
    ) -> Table:
        """``out[k] += coefficients[k] * left[i[k]] * right[j[k]]``: every pair of their paths."""
        counts, others = left.counts(), right.counts()
        pairs = counts[i] * others[j]
        # In float64 first: the number of pairs may leave the integers.
        self.check(float((counts[i].astype(np.float64) * others[j]).sum()))
        triple = np.repeat(np.arange(len(out)), pairs)
        local = np.arange(len(triple)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
        inner = others[j][triple]
        row = (np.cumsum(counts) - counts)[i][triple] + local // np.maximum(inner, 1)
        col = (np.cumsum(others) - others)[j][triple] + local % np.maximum(inner, 1)
        scale = np.broadcast_to(coefficients, len(out))[triple]
        return sorted_table(
            shape,
            out[triple],
            scale * left.coefficient[row] * right.coefficient[col],
            np.hstack([left.entries[row], right.entries[col]]),
        )

    def mapped(
        self,
        x: Table,
        shape: Sequence[int],
        out: Indices,
        source: Indices,
        coefficients: Array | float = 1.0,
    ) -> Table:
        """``out[k] += coefficients[k] * x[source[k]]``."""
        return self.joined(shape, out, x, source, UNIT, np.zeros_like(source), coefficients)

    def picked(self, x: Table, numbers: Tensor) -> Table:
        """``x`` at element numbers that count from 1, of the result's shape; 0 stands for none."""
        flat = numbers.to(torch.int64).reshape(-1).numpy()
        out = np.flatnonzero(flat)
        return self.mapped(x, numbers.shape, out, flat[out] - 1)

    def sum(self, left: Table, right: Table) -> Table:
        """Sum with broadcasting: the paths of both."""
        shape = np.broadcast_shapes(left.shape, right.shape)
        parts = [self.expanded(t, shape) for t in (left, right)]
        self.check(float(sum(len(t.owner) for t in parts)))
        both = stacked(parts)
        return sorted_table(
            shape, both.owner % max(math.prod(shape), 1), both.coefficient, both.entries
        )

    def product(self, left: Table, right: Table) -> Table:
        """Element-wise product with broadcasting."""
        shape = np.broadcast_shapes(left.shape, right.shape)
        i, j = (np.broadcast_to(np.arange(t.size).reshape(t.shape), shape) for t in (left, right))
        out = np.arange(math.prod(shape))
        return self.joined(shape, out, left, i.reshape(-1), right, j.reshape(-1))

    def expanded(self, x: Table, shape: Sequence[int]) -> Table:
        if x.shape == tuple(shape):
            return x
        return self.picked(x, numbers(x.shape).expand(tuple(shape)))
