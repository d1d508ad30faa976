"""Lifted parameters: where they come from, how long they stay, and where their gradients go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from pathlift.capture.program import Program
from pathlift.tensors.alike import fetched
from pathlift.tensors.pieces import entries_at_a_time
from pathlift.tensors.product import Product


def _placed(q: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A parameter for the lifted network, where layouts of the model's kernels (channels last) buy
    nothing."""
    return q.to(device, dtype).contiguous()


def _power(
    q: Tensor, p: float, device: torch.device, dtype: torch.dtype, unit: int | None
) -> tuple[Tensor, int]:
    """``|q * 2**-unit|^p`` and the unit (found if not given); never the memory of ``q``."""
    unit = unit_exponent(q) if unit is None else unit
    x = _placed(q, device, dtype)
    if unit:
        x = x * 2.0**-unit
    return _raised(x, p, torch.empty_like(x) if x.data_ptr() == q.data_ptr() else x), unit


class KeptParameters:
    """Lifted parameters made at once and kept, each a leaf (or a function of the model's own)."""

    def __init__(
        self, program: Program, p: float, dtype: torch.dtype, differentiable: bool = False
    ) -> None:
        self.leaves: dict[str, Tensor] = {}
        self.units: dict[str, int] = {}
        device = program.device
        for name, q in program.parameters.items():
            if not q.is_floating_point():
                continue
            if differentiable:
                self.units[name] = unit_exponent(q)
                scaled = _placed(q, device, dtype) * 2.0 ** -self.units[name]
                self.leaves[name] = scaled.square() if p == 2 else scaled.abs() ** p
            else:
                value = program.value(name)
                self.leaves[name], self.units[name] = _power(value, p, device, dtype, None)
                self.leaves[name].requires_grad_(torch.is_grad_enabled())

    def has(self, name: str) -> bool:
        """Whether the name is that of a lifted parameter."""
        return name in self.leaves

    def open(self, name: str, by_rows: bool) -> Tensor:
        """The lifted parameter."""
        return self.leaves[name]

    def unit(self, name: str) -> int:
        """The power of two taken out of the parameter."""
        return self.units[name]

    def close(self, name: str) -> None:
        """The forward pass needs the parameter no more."""


class PassingParameters:
    """Lifted parameters made when the pass first reads them and let go after: nothing to derive."""

    def __init__(self, program: Program, p: float, dtype: torch.dtype) -> None:
        self.leaves: dict[str, Tensor] = {}
        self.units: dict[str, int] = {}
        self.token = torch.zeros(())
        self.p, self.dtype, self.device = p, dtype, program.device
        self._program = program
        self._names = {n for n, q in program.parameters.items() if q.is_floating_point()}

    def has(self, name: str) -> bool:
        """Whether the name is that of a lifted parameter."""
        return name in self._names

    def value(self, name: str) -> Tensor:
        """A parameter's values, not to be written to."""
        return self._program.value(name).to(self.device)

    def lifted(self, name: str) -> Tensor:
        """The lifted parameter (in its unit), made now."""
        q = self._program.value(name)
        value, _ = _power(q, self.p, self.device, self.dtype, self._unit_of(name, q))
        return value

    def _unit_of(self, name: str, q: Tensor) -> int:
        """Found from the largest entry where that is known, so that the tensor is not read."""
        if name not in self.units:
            peak = (self._program.peaks or {}).get(name)
            self.units[name] = unit_exponent(q) if peak is None else _unit(peak)
        return self.units[name]

    def open(self, name: str, by_rows: bool) -> Tensor | LiftedRows:
        """The lifted parameter. ``by_rows``: the weight of one linear map and used nowhere else."""
        if not by_rows:
            return self.lifted(name)
        value = self.value(name)
        self._unit_of(name, value)
        return LiftedRows(self, name, value)

    def unit(self, name: str) -> int:
        """The power of two taken out of the parameter."""
        return self.units[name]

    def close(self, name: str) -> None:
        """The forward pass needs the parameter no more."""


class DroppedParameters(PassingParameters):
    """Squared parameters made when the forward pass first reads them and dropped after.

    The backward pass needs them again. What autograd would save of a squared parameter (or of a
    view of it) is saved as its name, and made anew when it is read; the gradient goes to ``sink``
    as soon as it is complete and is not kept. So no more than a few squares and gradients exist at
    a time, whatever the size of the model. A square is made by the same elementwise operations
    each time: nothing changes in the result.

    What an operation computes from parameters alone (a copy, a product of two) is an activation
    like others: kept if the backward pass needs it.
    """

    def __init__(
        self, program: Program, dtype: torch.dtype, sink: Callable[[str, Tensor | Product], None]
    ) -> None:
        super().__init__(program, 2, dtype)
        self.token.requires_grad_()
        self._sink = sink
        # Address of a square -> its name, as long as its memory is not freed.
        self._live: dict[int, tuple[str, StorageWeakRef]] = {}
        self._addresses: dict[str, int] = {}
        self.arrived: set[str] = set()

    def open(self, name: str, by_rows: bool) -> Tensor | LiftedRows:
        """The squared parameter, as an output of a node whose gradient goes to the sink."""
        if by_rows:
            return super().open(name, by_rows)
        u: Tensor = _Square.apply(self.token, self, name)  # type: ignore[no-untyped-call]
        storage = u.untyped_storage()
        address = storage.data_ptr()
        if address:
            self._live[address] = name, StorageWeakRef(storage)
            self._addresses[name] = address
        return u

    def close(self, name: str) -> None:
        """The forward pass needs the parameter no more; its address may be used again."""
        self._live.pop(self._addresses.pop(name, 0), None)

    def saved(self) -> torch.autograd.graph.saved_tensors_hooks:
        """The context in which the forward pass must run."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        name, memory = self._live.get(tensor.untyped_storage().data_ptr(), (None, None))
        if name is None or memory is None or memory.expired():
            return tensor
        return name, tensor.shape, tensor.stride(), tensor.storage_offset()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        name, shape, stride, offset = packed
        return self.lifted(name).as_strided(shape, stride, offset)

    def receive(self, name: str, gradient: Tensor | Product) -> None:
        """Hand a complete gradient on."""
        self.arrived.add(name)
        self._sink(name, rescaled(gradient, self.units[name]))

    def finish(self, sink: Callable[[str, Tensor | Product], None]) -> None:
        """Hand on zeros for every parameter on no path (all one zero, expanded)."""
        for name, q in self._program.parameters.items():
            if name in self._names and name not in self.arrived:
                sink(name, torch.zeros((), dtype=self.dtype).expand(q.shape))


class _Square(torch.autograd.Function):
    """A squared parameter as a function of a token, so that no leaf holds it in memory."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, store: DroppedParameters, name: str) -> Tensor:
        ctx.store, ctx.name = store, name
        return store.lifted(name)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.store.receive(ctx.name, gradients[0].detach())
        return None, None, None


class LiftedRows:
    """The lifted weight of one linear map, of which a few rows exist at a time.

    It is read once on each way: making a large one takes longer than using it, since the
    system hands fresh memory out a page at a time. For the same reason its gradient stays a product
    where it is one of thin factors.
    """

    def __init__(self, store: PassingParameters, name: str, value: Tensor) -> None:
        self.store, self.name = store, name
        self.shape = value.shape
        # Reading a parameter may cost a file or a gather: the forward pass uses what was read for
        # the unit, and lets it go.
        self._value: Tensor | None = value

    def dim(self) -> int:
        """Two."""
        return len(self.shape)

    def stride(self, dim: int) -> int:
        """Not 0: no rows are repeated."""
        return self.shape[1] if dim == 0 else 1

    def linear(self, x: Tensor) -> Tensor:
        """``x u^T``, shape ``(..., out)``."""
        rows: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, x.shape[-1]), self.store.token, self
        )
        return rows.unflatten(0, x.shape[:-1]) if x.dim() > 1 else rows[0]

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows and what they are lifted to; each piece is overwritten by the next."""
        q = self.store.value(self.name) if self._value is None else self._value
        self._value = None
        size = max(1, entries_at_a_time(q.device) // max(q.shape[1], 1))
        buffer = q.new_empty((min(size, len(q)), q.shape[1]), dtype=self.store.dtype)
        unit = self.store.unit(self.name)
        for start in range(0, len(q), size):
            rows = slice(start, min(start + size, len(q)))
            piece = buffer[: rows.stop - start]
            part = q[rows]
            if unit or part.dtype != piece.dtype:
                part = torch.mul(piece.copy_(part), 2.0**-unit, out=piece)
            yield rows, _raised(part, self.store.p, piece)


def _raised(x: Tensor, p: float, out: Tensor) -> Tensor:
    """``|x|^p``, which may lie where x does."""
    if p == 2:
        return torch.mul(x, x, out=out)
    out = torch.abs(x, out=out)
    return out if p == 1 else out.pow_(p)


class _Linear(torch.autograd.Function):
    """A squared linear map, and the squared weight as a function of a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, weight: LiftedRows) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x)
        out = x.new_empty((len(x), weight.shape[0]))
        for rows, piece in weight.pieces():
            out[:, rows] = F.linear(x, piece)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        back = None
        if ctx.needs_input_grad[0]:
            back = torch.zeros_like(x, memory_format=torch.contiguous_format)
            for rows, piece in ctx.weight.pieces():
                back.addmm_(gradient[:, rows], piece)
        product = Product(gradient.detach(), x.detach())
        ctx.weight.store.receive(ctx.weight.name, product if product.thin else product.dense())
        return back, None, None


def unit_exponent(q: Tensor) -> int:
    """Power of two next to the largest entry, rounded to even steps of 8 (0 for near 1)."""
    if not q.numel():
        return 0
    low, high = fetched(torch.aminmax(q.detach()))
    peak = max(abs(low), abs(high))
    if peak == 0 or not math.isfinite(peak):
        return 0
    return _unit(math.frexp(peak)[1])


def _unit(exponent: int) -> int:
    return exponent if abs(exponent) > 12 else 0


def rescaled(g: Tensor | Product, unit: int) -> Tensor | Product:
    """Gradient in the squared parameter from the gradient in its squared unit form."""
    if not unit:
        return g
    factor = 2.0 ** (-2 * unit)
    return Product(g.left * factor, g.right) if isinstance(g, Product) else g * factor
