"""The rescaling group of a model: all its integer log2 scales, and what they do to parameters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from pathlift.capture import Program, capture
from pathlift.errors import ArgumentError
from pathlift.symmetry import rules
from pathlift.symmetry.equations import eliminate
from pathlift.symmetry.inference import Inference, axis_components
from pathlift.symmetry.scales import collapse, varying

assert rules  # importing the package registers every rule


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
    uses: tuple[str, ...] = ()

    def components(self) -> list[tuple[tuple[int, ...], list[tuple[int, Tensor]]]]:
        """Terms grouped by the axes they vary along: ``[(axes, terms), ...]``, axes disjoint."""
        axes = [varying(ids) for _, ids in self.terms]
        return [
            (
                tuple(sorted(frozenset().union(*(axes[k] for k in group)))),
                [self.terms[k] for k in group],
            )
            for group in axis_components(axes)
        ]


@dataclass(frozen=True)
class RescalingGroup:
    """Every rescaling of a model that the graph proves to leave its function unchanged.

    Attributes:
        num_scales: dimension ``H`` of the group.
        basis: sparse integer matrix (variables, H): log2 scale of each variable in terms of the
            free scales ``s``.
        parameters: per parameter, the variables its rows and columns carry.
        unsupported: operations that pinned something, with counts.
    """

    num_scales: int
    basis: sp.csr_array
    parameters: dict[str, ParameterScales]
    unsupported: dict[str, int] = field(default_factory=dict)

    def variables(self, log2_scales: Tensor | NDArray[np.generic]) -> NDArray[np.float64]:
        """Log2 scale of every variable, float64, shape (variables,)."""
        scales = np.asarray(torch.as_tensor(log2_scales).detach().cpu(), dtype=np.float64)
        if scales.shape != (self.num_scales,):
            raise ArgumentError(
                f"log2_scales has shape {tuple(scales.shape)}; this group has {self.num_scales} "
                f"scales. Pass a tensor of shape ({self.num_scales},), one log2 scale each."
            )
        if not np.isfinite(scales).all():
            raise ArgumentError(
                f"log2_scales has {int((~np.isfinite(scales)).sum())} entries that are not "
                f"finite. Pass finite log2 scales (integers for bit-exact rescaling)."
            )
        return np.asarray(self.basis @ scales)

    def parameter_exponents(self, name: str, variables: NDArray[np.float64]) -> list[Tensor]:
        """Log2 factors of a parameter: small float64 tensors whose broadcast sum is ``E s``.

        One per group of axes (rows, columns), zero ones left out.
        """
        table = torch.from_numpy(variables)
        found = []
        for _, terms in self._spec(name).components():
            total = sum(coefficient * table[ids] for coefficient, ids in terms)
            if isinstance(total, Tensor) and bool(total.any()):
                found.append(total)
        return found

    def exponents(self, name: str) -> Tensor:
        """The exponent rows ``E`` of a parameter.

        Returns:
            Integer tensor of the parameter's shape with one more dimension of size
            ``num_scales``: the parameter is multiplied by ``2 ** (exponents @ s)``. Dense, so
            for small models.
        """
        spec = self._spec(name)
        basis = torch.from_numpy(self.basis.toarray())
        total = torch.zeros((*spec.shape, self.num_scales), dtype=torch.int64)
        for coefficient, ids in spec.terms:
            total = total + coefficient * basis[ids]
        return total

    def rescale_(self, model: nn.Module, log2_scales: Tensor) -> None:
        """Rescale ``model`` in place by any element of the group; all parameters or none.

        Args:
            model: the model the group was computed for (or one of the same structure).
            log2_scales: tensor (num_scales,). Integers keep every bit of the outputs.

        Raises:
            ArgumentError: wrong shape, not finite, or a model whose parameters differ.
            RangeError: a parameter would leave the normal range of its dtype.
        """
        from pathlift.apply import rescale_

        rescale_(model, self, log2_scales)

    def summary(self) -> str:
        """A table: per parameter, how many rows and columns scale, or why none does."""
        lines = [f"{self.num_scales} free scales"]
        width = max((len(n) for n in self.parameters), default=0)
        for name, spec in self.parameters.items():
            shape = "x".join(map(str, spec.shape)) or "scalar"
            if not spec.terms:
                lines.append(f"  {name:<{width}}  {shape:<16} pinned: {spec.why_pinned}")
                continue
            parts = []
            for axes, terms in spec.components():
                count = len(np.unique(np.concatenate([ids.numpy().ravel() for _, ids in terms])))
                role = " and ".join(f"dim {d}" for d in axes) or "all entries"
                parts.append(f"{role}: {count} scales")
            lines.append(f"  {name:<{width}}  {shape:<16} " + "; ".join(parts))
        for operation, count in self.unsupported.items():
            lines.append(f"  pinned by {operation} ({count} calls)")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"RescalingGroup(num_scales={self.num_scales}, parameters={len(self.parameters)})"

    def _spec(self, name: str) -> ParameterScales:
        if name not in self.parameters:
            raise ArgumentError(
                f"'{name}' is not a parameter of this group; it has "
                f"{', '.join(map(repr, list(self.parameters)[:5]))}"
                f"{', …' if len(self.parameters) > 5 else ''}. Tied parameters stand under "
                f"their first name."
            )
        return self.parameters[name]


def rescaling_group(model: nn.Module, example_inputs: object) -> RescalingGroup:
    """The rescaling group of ``model``; nothing is changed.

    Args:
        model: any module that torch.export (or plain tracing) captures.
        example_inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.

    Raises:
        ArgumentError, CaptureError: see :func:`pathlift.capture.capture`.
    """
    return infer_group(capture(model, example_inputs))


def infer_group(program: Program) -> RescalingGroup:
    """The group of a captured program: inference, then a basis of the solutions."""
    inference = Inference(program)
    solution = inference.equations.solve()
    # Name variables by the distinct rows of the solution, 0 for those that are always zero.
    variable, basis = _distinct_rows(solution)
    specs: dict[str, ParameterScales] = {}
    table = torch.from_numpy(variable)
    for name, leaf in inference.leaves.items():
        terms = []
        if leaf.form is not None:
            for coefficient, ids in leaf.form.terms:
                small = table[collapse(ids)]
                if bool((small == small.flatten()[:1]).all() if small.numel() else True):
                    small = small.flatten()[:1].reshape((1,) * small.dim())
                if small.numel() and bool(small.any()):
                    terms.append((coefficient, small))
        specs[name] = ParameterScales(
            name, leaf.shape, _cancel(terms), _reason(leaf, not terms), tuple(leaf.uses)
        )
    basis = _restrict_to_effect(basis, specs)
    return RescalingGroup(basis.shape[1], basis, specs, dict(inference.pinned_by))


def _cancel(terms: list[tuple[int, Tensor]]) -> tuple[tuple[int, Tensor], ...]:
    """Merge terms that have become equal (a weight from a channel group to itself)."""
    merged: list[tuple[int, Tensor]] = []
    for coefficient, ids in terms:
        for k, (c, other) in enumerate(merged):
            if other.shape == ids.shape and torch.equal(other, ids):
                merged[k] = (c + coefficient, other)
                break
        else:
            merged.append((coefficient, ids))
    return tuple((c, ids) for c, ids in merged if c)


def _reason(leaf: object, pinned: bool) -> str | None:
    if not pinned:
        return None
    why = getattr(leaf, "why_pinned", None)
    if why:
        return str(why)
    uses = getattr(leaf, "uses", [])
    return f"its scales are pinned around {uses[0]}" if uses else "not used by the model"


def _distinct_rows(solution: sp.csr_array) -> tuple[NDArray[np.int64], sp.csr_array]:
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
    rows = [(i, 1) for i in range(solution.shape[1])]
    data = [np.ones(len(rows), dtype=np.int64)]
    row_index, col_index = [np.arange(1, len(rows) + 1)], [np.arange(len(rows))]
    extra: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    others = np.flatnonzero(counts > 0)
    others = np.setdiff1d(others, simple, assume_unique=True)
    for r in others.tolist():
        part = slice(solution.indptr[r], solution.indptr[r + 1])
        key = (
            tuple(solution.indices[part].tolist()),
            tuple(solution.data[part].tolist()),
        )
        if key not in extra:
            extra[key] = len(rows) + 1 + len(extra)
            row_index.append(np.full(len(key[0]), extra[key]))
            col_index.append(np.array(key[0], dtype=np.int64))
            data.append(np.array(key[1], dtype=np.int64))
        label[r] = extra[key]
    basis = sp.csr_array(
        (np.concatenate(data), (np.concatenate(row_index), np.concatenate(col_index))),
        shape=(len(rows) + 1 + len(extra), solution.shape[1]),
    )
    return label, basis


def spanning_rows(spec: ParameterScales, basis: sp.csr_array) -> sp.csr_array:
    """Exponent rows of a parameter that span all its rows (O + I of them, not O * I)."""
    components = spec.components()
    corners = []
    blocks = []
    for _, terms in components:
        shape = torch.broadcast_shapes(*(ids.shape for _, ids in terms))
        total = None
        for coefficient, ids in terms:
            part = coefficient * basis[ids.expand(shape).reshape(-1).numpy()]
            total = part if total is None else total + part
        assert total is not None
        blocks.append(sp.csr_array(total))
        corners.append(sp.csr_array(total[[0]]))
    rows = []
    for k, block in enumerate(blocks):
        rest = [c for j, c in enumerate(corners) if j != k]
        if rest:
            shift = rest[0]
            for c in rest[1:]:
                shift = shift + c
            ones = sp.csr_array(np.ones((block.shape[0], 1), dtype=np.int64))
            block = sp.csr_array(block + ones @ shift)
        rows.append(block)
    return sp.csr_array(sp.vstack(rows)) if rows else sp.csr_array((0, basis.shape[1]))


def _restrict_to_effect(basis: sp.csr_array, specs: dict[str, ParameterScales]) -> sp.csr_array:
    """Drop free scales (and combinations of them) that change no parameter."""
    count = basis.shape[1]
    blocks = [spanning_rows(spec, basis) for spec in specs.values() if spec.terms]
    rows = sp.csr_array(sp.vstack(blocks)) if blocks else sp.csr_array((0, count), dtype=np.int64)
    rows.sum_duplicates()
    rows.eliminate_zeros()
    rows.sort_indices()
    lengths = np.diff(rows.indptr)
    sums = np.asarray(rows.sum(axis=1)).ravel()
    largest = np.asarray(abs(rows).max(axis=1).todense()).ravel() if rows.shape[0] else lengths
    simple = (largest <= 1) & ((lengths <= 1) | ((lengths == 2) & (sums == 0)))
    if bool(simple.all()):
        # Rows +-a or a - b: a combination without effect is a component not joined to zero.
        start = rows.indptr[:-1]
        one, two = lengths == 1, lengths == 2
        left = np.concatenate([rows.indices[start[one]] + 1, rows.indices[start[two]] + 1])
        right = np.concatenate(
            [np.zeros(int(one.sum()), dtype=np.int64), rows.indices[start[two] + 1] + 1]
        )
        graph = sp.coo_array((np.ones(len(left)), (left, right)), (count + 1, count + 1))
        _, labels = connected_components(graph.tocsr(), directed=False)
        _, first = np.unique(labels, return_index=True)
        useless = {int(i) - 1 for i in first if i > 0}
    else:
        unique = {
            tuple(zip(rows.indices[a:b].tolist(), rows.data[a:b].tolist(), strict=True))
            for a, b in zip(rows.indptr[:-1], rows.indptr[1:], strict=True)
            if b > a
        }
        solved = eliminate([{v: int(c) for v, c in row} for row in unique])
        useless = {v for v in range(count) if v not in solved}
    keep = np.array([v for v in range(count) if v not in useless], dtype=np.int64)
    return sp.csr_array(basis[:, keep]) if len(keep) else sp.csr_array((basis.shape[0], 0))


def count_operations(unsupported: Counter[str]) -> dict[str, int]:
    """Plain dict, most frequent first."""
    return dict(unsupported.most_common())
