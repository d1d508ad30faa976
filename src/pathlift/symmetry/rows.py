"""Which scales multiply which entries of a parameter, and few rows that span them all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathlift.symmetry.equations import Equations
from pathlift.symmetry.graphs import forest
from pathlift.symmetry.scales import axis_components, distinct, varying

# From this many entries on it pays to look for those that span the others.
_LARGE = 10_000


@dataclass(frozen=True)
class ParameterScales:
    """How one parameter is rescaled.

    ``exponent = sum_k coefficient_k * variables[ids_k]`` with each ``ids_k`` of a shape that
    broadcasts to the parameter's, and ``variables`` the log2 scales of :attr:`RescalingGroup.basis`
    rows. No terms: never rescaled.
    """

    name: str
    shape: torch.Size
    terms: tuple[tuple[int, Tensor], ...]
    why_pinned: str | None = None
    why_input: str | None = None
    uses: tuple[str, ...] = ()
    variables: tuple[Tensor, ...] = field(default=(), repr=False)  # as the equations name them

    def components(self) -> list[tuple[tuple[int, ...], list[tuple[int, Tensor]]]]:
        """Terms grouped by the axes they vary along: ``[(axes, terms), ...]``, axes disjoint."""
        return self._components

    @cached_property
    def _components(self) -> list[tuple[tuple[int, ...], list[tuple[int, Tensor]]]]:
        axes = [varying(ids) for _, ids in self.terms]
        found: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        for group in axis_components(axes):
            along = tuple(sorted(frozenset().union(*(axes[k] for k in group))))
            # Terms without axes share the key () although they share no axis.
            found.setdefault(along, []).extend(self.terms[k] for k in group)
        return list(found.items())


def distinct_rows(solution: sp.csr_array) -> tuple[NDArray[np.int64], sp.csr_array]:
    """Number the distinct rows of a sparse matrix, the zero row first."""
    solution = sp.csr_array(solution)
    solution.sort_indices()
    counts = np.diff(solution.indptr)
    label = np.zeros(solution.shape[0], dtype=np.int64)
    single = counts == 1
    first = solution.indptr[:-1][single]
    unit = solution.data[first] == 1
    simple = np.flatnonzero(single)[unit]
    label[simple] = solution.indices[solution.indptr[simple]] + 1
    count = solution.shape[1]
    row = [np.arange(1, count + 1)]
    column = [np.arange(count)]
    data = [np.ones(count, dtype=np.int64)]
    total = count + 1
    others = np.setdiff1d(np.flatnonzero(counts > 0), simple, assume_unique=True)
    for n in np.unique(counts[others]).tolist():
        several = others[counts[others] == n]
        at = solution.indptr[several][:, None] + np.arange(n)
        keys = np.concatenate([solution.indices[at], solution.data[at]], axis=1)
        distinct, which = np.unique(keys, axis=0, return_inverse=True)
        number = np.arange(total, total + len(distinct))
        label[several] = number[which.reshape(-1)]
        row.append(np.repeat(number, n))
        column.append(distinct[:, :n].reshape(-1))
        data.append(distinct[:, n:].reshape(-1))
        total += len(distinct)
    basis = sp.csr_array(
        (np.concatenate(data), (np.concatenate(row), np.concatenate(column))),
        shape=(total, count),
    )
    return label, basis


def spanning_rows(specs: Iterable[ParameterScales], basis: sp.csr_array) -> sp.csr_array:
    """Exponent rows of parameters that span all their rows (O + I of them each, not O * I)."""
    row: list[NDArray[np.int64]] = []
    variable: list[NDArray[np.int64]] = []
    coefficient: list[NDArray[np.int64]] = []
    count = 0
    for spec in specs:
        entries = []
        for _, terms in spec.components():
            grids = torch.broadcast_tensors(*(ids for _, ids in terms))
            flat = _spanning_entries([g.reshape(-1).numpy() for g in grids])
            entries.append([(c, ids) for (c, _), ids in zip(terms, flat, strict=True)])
        for k, component in enumerate(entries):
            n = len(component[0][1])
            # the other components stand at their first entry
            others = [
                (c, ids[:1].repeat(n)) for j, e in enumerate(entries) if j != k for c, ids in e
            ]
            for c, ids in [*component, *others]:
                row.append(np.arange(count, count + n))
                variable.append(ids)
                coefficient.append(np.full(n, c))
            count += n
    if not count:
        return sp.csr_array((0, basis.shape[1]), dtype=np.int64)
    index = (np.concatenate(row), np.concatenate(variable))
    forms = sp.csr_array((np.concatenate(coefficient), index), shape=(count, basis.shape[0]))
    return sp.csr_array(forms @ basis)


def _spanning_entries(ids: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Entries whose sums ``c_1 s[ids_1] + c_2 s[ids_2]`` span those of all entries.

    With one term, each scale once. With two terms every entry is an edge between a scale of the
    one and a scale of the other, and the edges around a cycle add up to zero in turn: a spanning
    forest is enough (a grouped convolution has O + I such edges among O * I / groups). With more
    terms, or few entries, all of them.
    """
    if len(ids) == 1:
        return [distinct(ids[0])]
    if len(ids) > 2 or len(ids[0]) < _LARGE:
        return ids
    size = 1 + max(int(i.max()) for i in ids)
    first, second = forest(2 * size, ids[0], ids[1] + size)
    return [first, second - size]


def restrict_to_effect(basis: sp.csr_array, specs: dict[str, ParameterScales]) -> sp.csr_array:
    """Drop free scales (and combinations of them) that change no parameter."""
    count = basis.shape[1]
    rows = spanning_rows((spec for spec in specs.values() if spec.terms), basis)
    rows.sum_duplicates()
    rows.eliminate_zeros()
    rows.sort_indices()
    # A combination d without effect solves rows @ d = 0; one variable per dimension of the
    # solutions is dropped, and the others still reach every effect.
    silent = Equations(size=count + 1)
    silent.add_matrix(rows)
    solution = silent.solve().tocsc()
    useful = np.ones(count, dtype=bool)
    useful[solution.indices[solution.indptr[:-1]] - 1] = False
    keep = np.flatnonzero(useful)
    return sp.csr_array(basis[:, keep]) if len(keep) else sp.csr_array((basis.shape[0], 0))
