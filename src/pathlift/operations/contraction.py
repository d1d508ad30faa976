"""What the products have in common: sums over labels.

Every tensor has one label per dimension, as in an Einstein sum, and the result is the sum over
the labels it lacks. :func:`contraction` reads that as scales (they add up over factors and are tied
over what is summed), :func:`joined` as tables of paths. The entries that build on it are in
``linear.py``, ``matrices.py`` and ``product.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathlift.lifting.tables import Indices, Listing, Table, constant, numbers
from pathlift.operations.gains import table
from pathlift.operations.table import Undescribed
from pathlift.symmetry.scales import Form, Value, add_forms, collapse, varying

# A sum over channels and positions that is not separable costs one general equation per entry;
# beyond this many the positions are tied instead.
_MAX_SEPARATED = 20_000
# Unit vectors are run through an operation in batches of this many numbers.
_BATCH_ENTRIES = 2**22

Labels = Sequence[int]
Operand = tuple[Value, Labels]


# ------------------------------------------------------------------------------- scales


def contraction(inf: Any, operands: Sequence[Operand], out: Labels, shape: torch.Size) -> Any:
    """``y[out] = sum over the other labels of the product of all operands``.

    ``s(y[out]) = sum_k s(x_k[labels_k])`` for all values of all labels.

    A parameter that nothing has consumed yet adapts: with ``R`` the scales of the other factors,
    split as ``R = a + c`` into a part that varies along the parameter's labels and one that does
    not, ``y = f + c`` and ``w = f - a`` with new free scales ``f`` along its output labels.
    """
    if any(v.zero for v, _ in operands):
        return Value(shape, Form(shape), zero=True)
    grid, sizes = _grid([(v.shape, labels) for v, labels in operands], out)
    if 0 in sizes:
        raise Undescribed  # nothing is multiplied: such a call shows nothing of other sizes
    new = [k for k, (v, _) in enumerate(operands) if inf.is_new(v)]
    weight = max(new, key=lambda k: operands[k][0].shape.numel()) if new else None
    full = torch.Size(sizes)

    def on_grid(form: Form, labels: Labels) -> Form:
        return form.map(lambda t: _spread(t, labels, grid, full), full)

    others = [on_grid(inf.form(v), labels) for k, (v, labels) in enumerate(operands) if k != weight]
    given = add_forms(Form(full), *others)
    contracted = list(range(len(out), len(grid)))
    if weight is None:
        return _on_output(inf.tie(given, contracted), len(out), shape)
    value, labels = operands[weight]
    size = dict(zip(grid, sizes, strict=True))
    own = [grid.index(k) for k, n in zip(labels, value.shape, strict=True) if n > 1 or size[k] == 1]
    given = inf.tie(given, [d for d in contracted if d not in own]).expand(full)
    along, across = _separate(inf, given, own)
    inf.note_input(value, along)
    fresh = inf.fresh_form(full, [d for d in own if d < len(out)])
    bound = add_forms(fresh, along.scaled(-1)).first([d for d in range(len(grid)) if d not in own])
    order = [grid.index(k) for k in labels]

    def back(t: Tensor) -> Tensor:
        rest = [d for d in range(t.dim()) if d not in order]
        return t.permute(*order, *rest).reshape(value.shape)

    inf.bind(value, bound.map(back, value.shape))
    return _on_output(add_forms(fresh, across).first(contracted), len(out), shape)


def _grid(
    operands: Sequence[tuple[Sequence[int], Labels]], out: Labels
) -> tuple[list[int], list[int]]:
    """All labels, those of the result first, and their sizes."""
    size: dict[int, int] = {}
    for shape, labels in operands:
        for label, n in zip(labels, shape, strict=True):
            size[label] = n if size.get(label, 1) == 1 else size[label]
    grid = [*out, *(k for k in size if k not in out)]
    return grid, [size[k] for k in grid]


def _spread(t: Tensor, labels: Labels, grid: Labels, full: Sequence[int]) -> Tensor:
    """A tensor as a view over all labels."""
    present = sorted(range(len(labels)), key=lambda d: grid.index(labels[d]))
    at = {grid.index(k) for k in labels}
    index = tuple(slice(None) if d in at else None for d in range(len(grid)))
    return t.permute(present)[index].expand(tuple(full))


def _on_output(form: Form, rank: int, shape: torch.Size) -> Form:
    """Drop the contracted labels (size 1) behind the first ``rank``."""
    return form.map(
        lambda t: t.flatten(rank)[..., 0].expand(shape) if t.dim() > rank else t.expand(shape),
        shape,
    )


def _separate(inf: Any, form: Form, own: Sequence[int]) -> tuple[Form, Form]:
    """``form = a + c``: ``a`` varies along ``own`` only, ``c`` along the other dimensions."""
    inside = frozenset(own)
    along: list[tuple[int, Tensor]] = []
    across: list[tuple[int, Tensor]] = []
    mixed: list[tuple[int, Tensor]] = []
    for term in form.terms:
        dims = varying(term[1])
        (along if dims <= inside else mixed if dims & inside else across).append(term)
    a = Form(form.shape, tuple(along), form.why)
    c = Form(form.shape, tuple(across), form.why)
    if not mixed:
        return a, c
    rest = Form(form.shape, tuple(mixed))
    other = [d for d in range(len(form.shape)) if d not in inside]
    if max(collapse(t).numel() for _, t in mixed) > _MAX_SEPARATED:
        return add_forms(a, inf.tie(rest, other).expand(form.shape)), c
    row = rest.first(other).expand(form.shape)
    corner = rest.first(range(len(form.shape))).expand(form.shape)
    column = add_forms(rest.first(list(own)).expand(form.shape), corner.scaled(-1))
    inf.zero(add_forms(rest, row.scaled(-1), column.scaled(-1)))
    return add_forms(a, row), add_forms(c, column)


def plus(inf: Any, result: Any, b: Value | None, shape: torch.Size) -> Any:
    """Add a term that broadcasts: equal scales."""
    if b is None or b.zero:
        return result
    if isinstance(result, Value) and result.zero:
        return inf.form(b).expand(shape)
    form = (result if isinstance(result, Form) else inf.form(result)).expand(shape)
    if inf.is_new(b):
        offset = len(shape) - len(b.shape)
        dims = [d for d in range(len(shape)) if d < offset or b.shape[d - offset] != shape[d]]
        inf.bind(b, inf.tie(form, dims).map(lambda t: t.reshape(b.shape), b.shape))
    else:
        inf.equate(form, inf.form(b))
    return form


# ------------------------------------------------------------------------------- paths


def scaled(x: Table, factor: float) -> Table:
    """A fixed coefficient; 0 holds no path."""
    return x.times(factor) if factor else constant(torch.zeros(x.shape))


def with_bias(c: Listing, x: Table, b: Any, axis: int) -> Table:
    """``x + b`` along dimension ``axis`` (counted from the end)."""
    if b is None:
        return x
    b = table(c, b)
    shape = [1] * len(x.shape)
    shape[axis] = b.size
    return c.sum(x, b.reshaped(shape))


def joined(c: Listing, operands: Sequence[tuple[Table, Labels]], out: Labels) -> Table:
    """:func:`contraction` of tables: one product for every value of every label."""
    grid, sizes = _grid([(t.shape, labels) for t, labels in operands], out)
    shape = tuple(sizes[: len(out)])

    def places(size: Sequence[int], labels: Labels) -> Indices:
        index = torch.arange(math.prod(size)).reshape(tuple(size))
        return np.asarray(_spread(index, labels, grid, sizes).reshape(-1).numpy())

    every = np.arange(math.prod(sizes))
    (total, labels), *rest = operands
    at = places(total.shape, labels)
    for other, labels in rest:
        total = c.joined(sizes, every, total, at, other, places(other.shape, labels))
        at = every
    return c.mapped(total, shape, places(shape, out), at)


def bilinear(c: Listing, function: Callable[[Tensor, Tensor], Tensor], x: Table, w: Table) -> Table:
    """An operation linear in each argument, where an entry of ``w`` meets at most one entry of
    ``x`` per output element: run on the element numbers of x and one unit vector of w, it returns
    the number of the entry it meets."""
    counts = (torch.from_numpy(t.counts()).double().reshape(t.shape) for t in (x, w))
    total = function(*counts)
    c.check(float(total.sum()))
    places = numbers(x.shape)
    step = max(1, _BATCH_ENTRIES // max(total.numel(), w.size, 1))
    found = []
    for start in range(0, w.size, step):
        entries = torch.arange(start, min(start + step, w.size))
        units = torch.nn.functional.one_hot(entries, w.size).double().reshape(-1, *w.shape)
        met = torch.func.vmap(lambda unit: function(places, unit))(units).flatten(1)
        entry, position = met.nonzero(as_tuple=True)
        found.append(torch.stack([position, met[entry, position].long() - 1, entry + start]))
    out, i, j = torch.cat(found, 1).numpy() if found else np.zeros((3, 0), np.int64)
    return c.joined(tuple(total.shape), out, x, i, w, j)
