"""Abstract interpretation of a :class:`~pathlift.capture.program.Program` over scales.

The scales reading of each operation (:mod:`pathlift.operations`) takes the forms of its arguments,
adds equations and returns the forms of its results. An operation that the table does not describe
pins everything it touches: no symmetry is used there, and the group's report lists it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathlift import operations
from pathlift.capture.program import Call, Graph, Program, Symbol, symbols_in
from pathlift.capture.walk import walk
from pathlift.operations.table import TABLE, Undescribed, described
from pathlift.symmetry.equations import Equations
from pathlift.symmetry.scales import (
    Form,
    Leaf,
    Value,
    add_forms,
    axis_components,
    collapse,
    thin,
    values_in,
    varying,
)
from pathlift.symmetry.statistics import running_statistics

assert operations  # importing the package fills the table

# Beyond this many equations of one operation the operation is pinned instead.
_MAX_EQUATIONS = 20_000_000
# A sum of scales becomes one new scale per element up to this many elements.
_MAX_SINGLE = 300_000
# From this many ids of one tensor on it pays to look which of them are known to be zero.
_LARGE = 10_000


class Inference:
    """Walks the graphs of a program and collects equations; readings call its methods."""

    def __init__(self, program: Program, free_batch_norms: bool = False) -> None:
        self.program = program
        self.free_batch_norms = free_batch_norms
        self.equations = Equations()
        self.leaves = {
            name: Leaf(name, p.shape)
            for name, p in program.parameters.items()
            if p.is_floating_point()
        }
        if free_batch_norms:
            self.leaves |= {
                n: Leaf(n, program.buffers[n].shape) for n in running_statistics(program)
            }
        self.pinned_by: Counter[str] = Counter()
        self._call: Call | None = None
        self._place: str | None = None
        # Ids are kept alive so that views of them keep distinct addresses.
        self._keep: list[Tensor] = []
        # Calls of the first of several graphs, with their arguments, which are kept alive too.
        self._calls: dict[Any, tuple[Any, Any]] = {}
        for graph in program.graphs:
            values = walk(graph, self)
            self._call, self._place = None, None
            for symbol, why in graph.leaving.items():
                self._leave(graph, symbol, values[symbol], why)

    # ---------------------------------------------------------------- walking

    def source(self, graph: Graph, symbol: Symbol) -> Value:
        """A parameter, buffer, input or constant."""
        name = graph.tensors.get(symbol)
        if name in self.leaves:
            leaf = self.leaves[name]
            return Value(leaf.shape, None, leaf)
        if symbol in graph.constants:
            return self.constant(graph.constants[symbol].cpu())  # ids are on the host
        return self.fixed(symbol.shape, "the model's input" if name is None else "a buffer")

    def free(self, symbol: Symbol) -> None:
        """Nothing to let go: forms are small."""

    def call(self, call: Call, arguments: dict[str, Any]) -> list[Any]:
        """The values of a call's results."""
        self._call, self._place = call, None
        key = self._call_key(call, arguments)
        if key in self._calls:
            return self._calls[key][0]
        values = values_in(arguments)
        result = self._read(call, arguments, values)
        if key is not None:
            self._calls[key] = result, values
        return result

    def _leave(self, graph: Graph, symbol: Symbol, value: Value, why: str) -> None:
        name = graph.tensors.get(symbol)
        if name not in self.leaves or name in self.program.parameters:
            self.pin(value, why)

    def _call_key(self, call: Call, arguments: dict[str, Any]) -> Any:
        """What the result of a call depends on; None if the call is not worth remembering.

        In another mode nearly all calls are those of the first, on the same scales: their
        equations are there already. The place is part of it for the sake of messages.
        """
        if len(self.program.graphs) == 1:
            return None
        shapes = tuple(s.shape for s in symbols_in(call.outputs))
        with suppress(TypeError):  # an argument that can't be compared
            key = (call.target, shapes, frozen(sorted(arguments.items())), self._here())
            hash(key)
            return key
        return None

    def _read(self, call: Call, arguments: dict[str, Any], values: list[Value]) -> list[Any]:
        entry = TABLE.get(call.name)
        try:
            if entry is None:
                raise Undescribed
            self._check_dtype(call, entry.changes_dtype)
            result = entry.scales(self, call, **described(entry.scales, call, arguments))
            return self._outputs(call, result)
        except Undescribed:
            self.pin_all(call.label, values)
            return [
                [self.fixed(s.shape, self._here()) for s in o]
                if isinstance(o, list)
                else None
                if o is None
                else self.fixed(o.shape, self._here())
                for o in call.outputs
            ]

    @staticmethod
    def _check_dtype(call: Call, changes: bool) -> None:
        """Numbers with a scale become integers or booleans only where the entry says so."""
        outputs = list(symbols_in(call.outputs))
        if changes or not outputs or _has_scale(outputs[0]):
            return
        if any(_has_scale(s) for s in symbols_in(call.arguments)):
            raise Undescribed

    def _outputs(self, call: Call, result: Any) -> list[Any]:
        given = list(result) if isinstance(result, (list, tuple)) else [result]
        if len(given) != len(call.outputs):
            raise Undescribed  # an output that the entry says nothing of
        return [
            None if symbol is None else self._output(value, symbol.shape)
            for value, symbol in zip(given, call.outputs, strict=True)
        ]

    def _output(self, result: Any, shape: torch.Size) -> Value:
        if isinstance(result, Value):
            return result
        if not isinstance(result, Form):
            raise Undescribed
        if result.pinned and result.why is None:
            return self.fixed(shape, self._here())
        result = self._without_zeros(result)
        return Value(shape, result if result.shape == shape else result.expand(shape))

    def _without_zeros(self, form: Form) -> Form:
        """Drop what is known to be zero from terms that are large enough for it to matter.

        Where joined tensors (a class token before patches) have given every element an id of its
        own and a norm has then pinned them, what follows becomes small again.
        """
        terms = []
        for coefficient, ids in form.terms:
            small = collapse(ids)
            corner = small[tuple(slice(0, 4) for _ in range(small.dim()))]
            if (
                small.numel() > _LARGE
                and self.equations.is_zero(corner.numpy()).all()
                and self.equations.is_zero(small.numpy()).all()
            ):
                continue
            terms.append((coefficient, ids))
        return Form(form.shape, tuple(terms), form.why if terms else form.why or self._here())

    # ------------------------------------------------------- making values

    def constant(self, tensor: Tensor) -> Value:
        """A tensor that is known and never rescaled."""
        tensor = tensor.detach()
        zero = tensor.numel() > 0 and tensor.numel() <= 1_000_000 and not bool(tensor.any())
        form = Form(tensor.shape, why="a constant")
        return Value(tensor.shape, form, constant=tensor, zero=zero)

    def fixed(self, shape: Sequence[int], why: str | None = None) -> Value:
        """A tensor of scale 0."""
        return Value(torch.Size(shape), Form(torch.Size(shape), why=why))

    def fresh(self, shape: Sequence[int]) -> Tensor:
        """New variables, one per element of ``shape``."""
        size = int(np.prod(shape, dtype=np.int64))
        if size > _MAX_EQUATIONS:
            raise Undescribed
        ids = self.equations.fresh(size)
        tensor = torch.arange(ids.start, ids.stop).reshape(tuple(shape))
        self._keep.append(tensor)
        return tensor

    def fresh_form(self, shape: Sequence[int], dims: Sequence[int]) -> Form:
        """A form of ``shape`` with one new variable per index of ``dims``."""
        dims = [d % len(shape) for d in dims] if shape else []
        small = [n if d in dims else 1 for d, n in enumerate(shape)]
        return Form(torch.Size(shape), ((1, self.fresh(small).expand(tuple(shape))),))

    # ------------------------------------------------------ reading values

    def form(self, value: Value | None) -> Form:
        """The form of a value; a parameter not consumed before gets its general form here.

        A vector gets one variable per entry, a larger tensor a separable form: the sum of one
        variable per index of each dimension (all that rows and columns can carry).
        """
        if value is None:
            return Form(torch.Size())
        if value.form is not None:
            return value.form
        leaf = value.leaf
        assert leaf is not None
        if leaf.form is None:
            dims = [d for d, n in enumerate(leaf.shape) if n > 1]
            terms = []
            for k, d in enumerate(dims or [0] if leaf.shape else [0]):
                shape = [n if i == d else 1 for i, n in enumerate(leaf.shape)]
                ids = self.fresh(shape)
                if k:  # a constant moved between two terms changes nothing: fix it
                    self._add([(1, ids.flatten()[:1])])
                terms.append((1, ids.expand(leaf.shape)))
            leaf.form = Form(leaf.shape, tuple(terms))
        self._use(leaf)
        return leaf.form

    def elementwise_form(self, value: Value) -> Form:
        """Like :meth:`form`, with one variable per entry of an unconsumed parameter."""
        leaf = value.leaf
        if value.form is None and leaf is not None and leaf.form is None:
            leaf.form = Form(leaf.shape, ((1, self.fresh(leaf.shape)),))
        return self.form(value)

    def bind(self, value: Value | None, form: Form) -> None:
        """Demand that ``value`` (typically a parameter) has this form."""
        if value is None:
            return
        if value.form is None and value.leaf is not None and value.leaf.form is None:
            value.leaf.form = form
            self._use(value.leaf)
        else:
            self.equate(self.form(value), form)

    def note_input(self, value: Value, form: Form) -> None:
        """Remember why a new parameter has no scale to undo: its other factor is pinned."""
        if self.is_new(value) and form.pinned and value.leaf is not None:
            value.leaf.why_input = form.why

    def is_new(self, value: Value | None) -> bool:
        """Whether the value is a parameter that no operation has consumed yet."""
        return (
            value is not None
            and value.form is None
            and value.leaf is not None
            and value.leaf.form is None
        )

    def _use(self, leaf: Leaf) -> None:
        leaf.uses.append(self._here())

    def _here(self) -> str:
        """The operation at hand, for messages."""
        if self._place is None:
            self._place = self._call.place if self._call is not None else "the model's output"
        return self._place

    # ---------------------------------------------------- adding equations

    def equate(self, a: Form, b: Form) -> None:
        """All elements of the two forms (broadcast) have equal scales."""
        if a.shape != b.shape:
            shape = torch.broadcast_shapes(a.shape, b.shape)
            a, b = a.expand(shape), b.expand(shape)
        self.zero(add_forms(a, b.scaled(-1)))

    def zero(self, form: Form) -> None:
        """All elements have scale 0.

        Terms that vary along disjoint dimensions are separated first: ``f(o) + h(i) = 0`` for
        all o, i says ``f(o) = f(0)``, ``h(i) = h(0)`` and ``f(0) + h(0) = 0``, which is O + I
        equations instead of O * I.
        """
        terms = [(c, collapse(ids)) for c, ids in form.terms]
        if not terms or form.shape.numel() == 0:
            return
        groups = axis_components([varying(ids) for _, ids in terms])
        if len(groups) == 1:
            self._add(terms)
            return
        origin = []
        for group in groups:
            here = [terms[k] for k in group]
            corner = [(c, ids.flatten()[:1].reshape((1,) * ids.dim())) for c, ids in here]
            origin += corner
            if any(ids.numel() > 1 for _, ids in here):
                self._add(here + [(-c, ids) for c, ids in corner])
        self._add(origin)

    def tie(self, form: Form, dims: Sequence[int]) -> Form:
        """Equal scales along ``dims``; returns the form with size 1 there."""
        first = form.first(dims)
        if form.terms:
            self.equate(form, first.expand(form.shape))
        return first

    def pin(self, value: Value | None, why: str | None = None) -> None:
        """Every element of ``value`` has scale 0."""
        if value is None or (value.form is not None and value.form.pinned) or value.zero:
            return
        if value.leaf is not None and value.form is None and value.leaf.why_pinned is None:
            value.leaf.why_pinned = why if why in (None, self._here()) else f"{why}, {self._here()}"
        if self.is_new(value):
            self.bind(value, Form(value.shape))
        else:
            self.zero(self.form(value))

    def pin_all(self, name: str, values: Sequence[Value]) -> None:
        """Pin the inputs of an operation that is not homogeneous or not known."""
        free = [v for v in values if not (v.form is not None and v.form.pinned)]
        if free:
            self.pinned_by[name] += 1
        for value in free:
            self.pin(value, name)

    def single(self, value: Value) -> Tensor:
        """The form as one id tensor (new variables where it is a sum)."""
        form = self.form(value)
        if value.zero:
            return self.fresh([1] * len(value.shape)).expand(value.shape)
        if form.pinned:
            return torch.zeros((1,) * len(form.shape), dtype=torch.int64).expand(form.shape)
        if len(form.terms) == 1 and form.terms[0][0] == 1:
            return form.terms[0][1]
        dims = sorted(frozenset().union(*(varying(ids) for _, ids in form.terms)))
        # Per element only while that is affordable: the longest dimensions (positions) are tied.
        dims.sort(key=lambda d: form.shape[d])
        while np.prod([form.shape[d] for d in dims], dtype=np.int64) > _MAX_SINGLE:
            form = self.tie(form, [dims.pop()]).expand(form.shape)
        new = self.fresh_form(form.shape, dims)
        self.equate(new, form)
        return new.terms[0][1]

    def _add(self, terms: Sequence[tuple[int, Tensor]]) -> None:
        grids: Sequence[Tensor] = torch.broadcast_tensors(*(ids for _, ids in terms))
        if grids[0].numel() > _LARGE:
            grids = thin(grids)
        if grids[0].numel() > _MAX_EQUATIONS:
            raise Undescribed
        flat = [g.reshape(-1).numpy() for g in grids]
        self.equations.add([c for c, _ in terms], flat, self._here())


def _has_scale(symbol: Symbol) -> bool:
    return symbol.dtype.is_floating_point or symbol.dtype.is_complex


def frozen(nested: Any) -> Any:
    """Arguments of a call as something to look up by.

    Raises:
        TypeError: a value is too large to be kept alive for this.
    """
    if isinstance(nested, Value):
        if nested.key is None:
            raise TypeError
        return nested.key
    if isinstance(nested, (list, tuple)):
        return tuple(frozen(x) for x in nested)
    return type(nested), nested
