"""The error of one quantised tensor at the output, as a function of the group's log2 scales.

A weight ``w`` of a format with ``steps`` steps has, per tensor (or per output channel), the error

    N(s) = floor * max_i (|w_i| 2^((E s)_i))^2 * sum_i G_i 2^(-2 (E s)_i),   floor = 1/(12 steps^2)

since every entry's error has the variance ``step^2 / 12`` and sensitivities move against the
weights (:mod:`pathlift.quantization.measure`). Maxima and sums of exponentials of linear forms are
convex in their logarithm, so N is convex in s, and so is the sum over all tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathlift.solve.matrix import Array
from pathlift.solve.sums import Classes, classes_of, reduce_to
from pathlift.symmetry.rows import ParameterScales

IntArray = NDArray[np.int64]
_Terms = list[tuple[int, Tensor]]


class Forms(NamedTuple):
    """Exponents as sums of variables (:attr:`RescalingGroup.basis` has what they are).

    Attributes:
        coefficients: ``(k,)``.
        variables: ``(n, k)``, for each of n exponents the k variables it is a sum of.
    """

    coefficients: IntArray
    variables: IntArray


# What no sample has shown to matter still counts for this part of its tensor's mean.
_LEAST = 1e-3


@dataclass(frozen=True)
class Term:
    """One quantised tensor.

    Attributes:
        name: of the tensor (of an activation: of the weight that reads it).
        kind: ``"weight"``, ``"bias"`` or ``"activation"``.
        logs: ``(R, C)`` log2 of the largest magnitudes of entries with equal scales, float32.
        rows, columns: their R and C exponents.
        by_row, by_column: ``(R,)`` and ``(C,)``: sums of G along the other axis. G itself is taken
            for their product over the total, as where errors of inputs and outputs are independent.
        group: ``(R,)``, which of ``groups`` largest magnitudes a row counts for.
        groups: how many largest magnitudes the tensor has: 1, or one per output channel.
        floor: see the module.
        fixed: the part of the error that no scale moves (floating point).
    """

    name: str
    kind: str
    logs: NDArray[np.float32]
    rows: Forms
    columns: Forms
    by_row: Array
    by_column: Array
    group: IntArray
    groups: int
    floor: float
    fixed: float = 0.0


def term(
    spec: ParameterScales,
    kind: str,
    values: Tensor,
    sensitivity: Tensor,
    *,
    steps: float,
    factor: float = 1.0,
    relative: float = 0.0,
    axis: int | None = None,
) -> Term:
    """The term of one tensor, every entry of which has the error of a step.

    Args:
        spec: how it is rescaled.
        values: of its shape; magnitudes are taken.
        sensitivity: ``G``, of its shape.
        steps, relative: of the format.
        factor: by which its error counts.
        axis: the dimension of the channels that have a largest magnitude of their own; None: one
            for the whole tensor.
    """
    size, weight = _magnitudes(values), sensitivity.cpu()
    parts, classes = _layout(spec, tuple(values.shape), axis)
    maxima = reduce_to(size, parts, classes, maxima=True).reshape(len(classes[0].tuples), -1)
    forms = [_forms(terms, found) for (_, terms), found in zip(parts, classes, strict=True)]
    if len(forms) == 1:
        forms.append(Forms(np.zeros(0, np.int64), np.zeros((1, 0), np.int64)))
    member = np.zeros(len(maxima), dtype=np.int64)
    if axis is not None:
        axes = parts[0][0]
        shape = [values.shape[d] for d in axes]
        member = np.unravel_index(np.arange(math.prod(shape)), shape)[axes.index(axis)]
    fixed = relative * float((weight * size.square()).sum(dtype=torch.float64)) if relative else 0.0
    by_row, by_column = _both_sums(weight, parts, classes)
    return Term(
        name=spec.name,
        kind=kind,
        logs=torch.log2(maxima.float()).numpy(),
        rows=forms[0],
        columns=forms[1],
        by_row=by_row,
        by_column=by_column,
        group=member.astype(np.int64),
        groups=int(member.max(initial=0)) + 1,
        floor=factor / (12.0 * steps**2),
        fixed=factor * fixed,
    )


def thinned(
    known: Term,
    spec: ParameterScales,
    values: Tensor,
    sensitivity: Tensor,
    moved: Sequence[Tensor],
    *,
    steps: float,
    factor: float = 1.0,
    axis: int | None = None,
) -> Term:
    """A term that counts which entries become 0, once the tensor is multiplied by ``2^moved``.

    Those are then below half a step: their error is their own square, whatever the step, and no
    scale moves it.

    Args:
        known: what :func:`term` makes of the other arguments.
    """
    size, weight = _magnitudes(values), sensitivity.cpu()
    alive = _survive(size, moved, steps, axis)
    kept = weight * alive
    lost = (weight - kept).mul_(size).mul_(size)
    dead = float(lost.reshape(len(lost), -1).sum(1).sum(dtype=torch.float64))
    parts, classes = _layout(spec, tuple(values.shape), axis)
    by_row, by_column = _both_sums(kept, parts, classes)
    fixed = known.fixed + factor * dead
    return replace(known, by_row=by_row, by_column=by_column, fixed=fixed)


def flattened(known: Term, power: float) -> Term:
    """The term with sums of G to this power, of the same mean: less (0: nothing) depends on G."""

    def flat(sums: Array) -> Array:
        mean = float(sums.mean())
        return mean * (sums / mean) ** power if mean > 0 else sums

    return replace(known, by_row=flat(known.by_row), by_column=flat(known.by_column))


def _magnitudes(values: Tensor) -> Tensor:
    """In float32 at least."""
    size = values.detach().abs().cpu()
    return size.float() if size.dtype.itemsize < 4 else size


def _layout(
    spec: ParameterScales, shape: tuple[int, ...], axis: int | None
) -> tuple[list[tuple[tuple[int, ...], _Terms]], list[Classes]]:
    parts = _parts(spec, axis)
    classes = []
    for axes, terms in parts:
        whole = axis is None or axis not in axes
        classes.append(_labelled(shape, axes, terms, merge=whole))
    return parts, classes


def _both_sums(
    weight: Tensor, parts: Sequence[tuple[tuple[int, ...], _Terms]], classes: Sequence[Classes]
) -> tuple[Array, Array]:
    """Sums of G over columns and over rows."""
    sums = reduce_to(weight, parts, classes).reshape(len(classes[0].tuples), -1)
    row, column = (sums.sum(k, dtype=torch.float64).numpy() for k in (1, 0))
    return _positive(row), _positive(column)


def _survive(size: Tensor, moved: Sequence[Tensor], steps: float, axis: int | None) -> Tensor:
    """1 for entries of more than half a step, once moved, and 0 for others, in their own dtype.

    Products with booleans are several times slower.
    """
    for exponent in moved:
        size = size * torch.exp2(exponent).to(size.dtype)
    others = [d for d in range(size.dim()) if d != axis]
    top = size.max() if axis is None else size.amax(others, keepdim=True)
    half_steps = size * (2.0 * steps / top.clamp(min=torch.finfo(size.dtype).tiny))
    return torch.nn.functional.threshold(half_steps, 1.0, 0.0, inplace=True).sign_()


def input_scales(spec: ParameterScales, groups: int) -> ParameterScales | None:
    """How the input of a linear layer or convolution is rescaled, from its weight's scales.

    A weight (O, I / groups, ...) is multiplied by the scale of its output and divided by that of
    its input, channel ``(o // (O / groups)) (I / groups) + i``. None where the weight has no such
    form (its own scales are of another kind).
    """
    outputs, inside = spec.shape[0], spec.shape[1]
    channel = (torch.arange(outputs) // (outputs // groups))[:, None] * inside
    channel = (channel + torch.arange(inside)).reshape(-1)
    found: _Terms = []
    for coefficient, ids in spec.terms:
        if coefficient >= 0:
            continue
        if any(n > 1 for n in ids.shape[2:]):
            return None
        flat = ids.expand(outputs, inside, *ids.shape[2:]).reshape(-1)
        by_channel = torch.zeros(groups * inside, dtype=torch.int64)
        by_channel[channel] = flat
        if not torch.equal(by_channel[channel], flat):
            return None
        found.append((-coefficient, by_channel))
    shape = torch.Size([groups * inside])
    return ParameterScales(spec.name, shape, tuple(found))


def _positive(sums: Array) -> Array:
    """The sums with a least part of their mean; ones where all are 0."""
    mean = float(sums.mean()) if sums.size else 0.0
    return np.asarray(sums + _LEAST * mean if mean > 0 else np.zeros_like(sums))


def _parts(spec: ParameterScales, axis: int | None) -> list[tuple[tuple[int, ...], _Terms]]:
    """One or two groups of axes with their terms; the first has ``axis``, where it is given."""
    found = [(axes, list(terms)) for axes, terms in spec.components()]
    constants = [t for axes, terms in found if not axes for t in terms]
    parts = [(axes, terms) for axes, terms in found if axes]
    if axis is not None and not any(axis in axes for axes, _ in parts):
        parts.append(((axis,), []))
    if not parts:
        return [((), constants)]
    first = max(
        range(len(parts)),
        key=lambda k: axis in parts[k][0] if axis is not None else _size(spec, parts[k][0]),
    )
    head = (parts[first][0], parts[first][1] + constants)
    rest = [p for k, p in enumerate(parts) if k != first]
    if not rest:
        return [head]
    axes = tuple(sorted(d for along, _ in rest for d in along))
    return [head, (axes, [t for _, terms in rest for t in terms])]


def _size(spec: ParameterScales, axes: Sequence[int]) -> int:
    return math.prod(spec.shape[d] for d in axes)


def _labelled(shape: tuple[int, ...], axes: Sequence[int], terms: _Terms, merge: bool) -> Classes:
    """Indices along a part's axes, in classes of equal scale (``merge``) or each its own."""
    count = math.prod(shape[d] for d in axes)
    if not terms:
        return Classes(np.zeros((count, 0), np.int64), np.arange(count), np.ones(count, np.int64))
    if merge:
        return classes_of(torch.Size(shape), axes, terms)
    sizes = [n if d in axes else 1 for d, n in enumerate(shape)]
    order = [*axes, *(d for d in range(len(shape)) if d not in axes)]
    columns = [ids.expand(sizes).permute(order).reshape(-1).numpy() for _, ids in terms]
    return Classes(np.stack(columns, 1), np.arange(count), np.ones(count, np.int64))


def _forms(terms: _Terms, classes: Classes) -> Forms:
    coefficients = np.asarray([c for c, _ in terms], dtype=np.int64)
    return Forms(coefficients, classes.tuples)
