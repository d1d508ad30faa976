"""One recorder of ATen calls: a model is run on fake tensors and every call is written down.

An operation that the table knows is recorded whole; one that it doesn't know is taken apart where
PyTorch composes it of others, or fuses others for a device. What depends on neither inputs,
parameters nor state is computed for real on the way (position ids, masks): such tensors are
constants of the program. Where Python asks for a value that is not known, the model is refused with
the line of its code that asked.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from pathlift.capture.aliases import Root, Slot, Step
from pathlift.capture.ledger import Ledger
from pathlift.capture.program import Symbol, symbols_in
from pathlift.capture.refusals import HigherOrder, ValueNeeded
from pathlift.capture.schemas import (
    Plan,
    bound_arguments,
    mapped,
    plan_of,
    restored,
    taken_apart,
    tensors_of,
    unwritten,
)
from pathlift.capture.witness import QUERIES, Watch, higher_order, noted
from pathlift.errors import CaptureError

# Larger results of operations on constants are not computed: they are unknown.
_MAX_CONSTANT = 20_000_000

_VALUES = frozenset({"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"})


class Recorder(Watch):
    """Writes down the calls of one run.

    Args:
        ledger: where they are written, and which value each tensor holds.
        known: whether the table of operations has an entry of this name.
    """

    def __init__(self, ledger: Ledger, known: Callable[[str], bool]) -> None:
        super().__init__()
        self.ledger, self.known = ledger, known
        self.refused: CaptureError | None = None
        # Buffers whose values went into the program.
        self.folded: set[str] = set()
        self._inside = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if higher_order(func):
            self._refuse(HigherOrder(func.name()))
        if func._schema.name in QUERIES:
            return func(*args, **kwargs)
        plan = plan_of(func)
        if not self._inside:
            noted(plan.full, self.seen)
        bound = bound_arguments(plan, args, kwargs)
        if plan.name == "lift_fresh":  # a tensor that Python has just made
            self.ledger.slots.setdefault(args[0], Slot(Root(symbolic=False)))
        tensors = list(tensors_of((args, kwargs)))
        symbolic = any(self.ledger.symbolic(t) for t in tensors)
        if not symbolic and self._computable(plan, bound):
            return self._compute(func, plan, bound, args, kwargs)
        if plan.name in _VALUES:
            self._refuse(ValueNeeded(plan.name))
        if not self.known(plan.name):
            self._inside += 1
            try:
                with self:
                    result = taken_apart(func, plan, args, kwargs)
            finally:
                self._inside -= 1
            if result is not NotImplemented:
                return result
        return self._record(func, plan, bound, args, kwargs)

    def _refuse(self, error: CaptureError) -> None:
        """Raise; that the model's own code catches it changes nothing."""
        self.refused = self.refused or error
        raise error

    def refuse_values(self, tensor: Tensor) -> None:
        """Raise if a tensor's values are asked for and depend on what is not known."""
        if self.ledger.symbolic(tensor):
            self._refuse(ValueNeeded("values"))
        self._fold([tensor])

    def _fold(self, tensors: Iterable[Tensor]) -> None:
        """Note the buffers whose values are looked at."""
        named = self.ledger.named
        self.folded.update(named[id(t)] for t in tensors if id(t) in named)

    def _computable(self, plan: Plan, bound: dict[str, Any]) -> bool:
        if plan.seeded or plan.uninitialised:
            return False
        if any(
            self.ledger.slot(t).root.external for m in plan.mutated for t in tensors_of(bound[m])
        ):
            return plan.reshaped
        size = bound.get("size")
        if isinstance(size, (list, tuple)):
            return math.prod(n for n in size if isinstance(n, int)) <= _MAX_CONSTANT
        return True

    def _compute(self, func: Any, plan: Plan, bound: dict[str, Any], args: Any, kwargs: Any) -> Any:
        """Run on real tensors, none of which depends on inputs, parameters or state."""
        self._fold(tensors_of((args, kwargs)))
        for name in () if plan.reshaped else plan.mutated:
            for tensor in tensors_of(bound[name]):
                root = self.ledger.slot(tensor).root
                constants = self.ledger.constants
                with _disable_current_modes():
                    for symbol in constants.keys() & root.constants:  # read so far: keeps its value
                        constants[symbol] = constants[symbol].clone()
                root.constants.clear()
                root.value = None
                root.version += 1
        with _disable_current_modes():
            result = func(*args, **kwargs)
        for tensor in tensors_of(result):
            if isinstance(tensor, FakeTensor) or id(tensor) in self.ledger.external:
                continue
            source = None if plan.name == "lift_fresh" else self.ledger.viewed(plan, bound, tensor)
            if source is None:
                if tensor not in self.ledger.slots:
                    self.ledger.slots[tensor] = Slot(Root(symbolic=False))
            elif tensor is not source[1]:
                self.ledger.slots[tensor] = self.ledger.view(
                    plan, bound, source, tensor, result, None
                )
        return result

    def _record(self, func: Any, plan: Plan, bound: dict[str, Any], args: Any, kwargs: Any) -> Any:
        mutated = [t for name in plan.mutated for t in tensors_of(bound[name])]
        arguments = mapped(bound, self.ledger.read)
        result = func(*args, **kwargs)
        flat = list(tensors_of(result))
        if plan.reshaped and mutated:
            return self._turned(plan, bound, arguments, mutated[0])
        fresh = list(tensors_of(unwritten(func, result))) if mutated else flat
        if plan.functional is func or not mutated:
            outputs = mapped(result, lambda t: Symbol(t.shape, t.dtype))
            several = isinstance(result, (list, tuple))
            layout = tuple(outputs) if several else (outputs,)
            layout = tuple(o if isinstance(o, (Symbol, list)) else None for o in layout)
        else:
            layout = tuple(Symbol(t.shape, t.dtype) for t in [*mutated, *fresh])
            several = len(layout) > 1
        target = plan.functional
        if target is not func:
            names = {a.name for a in target._schema.arguments}
            arguments = {k: v for k, v in arguments.items() if k in names}
        self.ledger.append(target, plan.name, arguments, layout, several)
        symbols = list(symbols_in(layout))
        if target is func and not mutated:
            for tensor, symbol in zip(flat, symbols, strict=True):
                self._place(plan, bound, tensor, symbol, result)
            return result
        for tensor, symbol in zip(mutated, symbols, strict=False):
            self.ledger.write(tensor, symbol)
        for tensor, symbol in zip(fresh, symbols[len(mutated) :], strict=False):
            self._place(plan, bound, tensor, symbol, result)
        return restored(func, result, bound)

    def _place(
        self, plan: Plan, bound: dict[str, Any], tensor: Tensor, symbol: Symbol, result: Any
    ) -> None:
        source = self.ledger.viewed(plan, bound, tensor) if plan.aliases else None
        if source is not None and tensor is source[1]:
            self.ledger.slot(tensor).symbol = symbol  # returned as it came
            return
        if source is not None:
            self.ledger.slots[tensor] = self.ledger.view(
                plan, bound, source, tensor, result, symbol
            )
        else:
            self.ledger.slots[tensor] = Slot(Root(symbol), (), symbol)
        self.ledger.made.append(weakref.ref(tensor))

    def _turned(
        self, plan: Plan, bound: dict[str, Any], arguments: dict[str, Any], tensor: Tensor
    ) -> Any:
        """An operation that gives a tensor another shape in place."""
        slot = self.ledger.slot(tensor)
        symbol = Symbol(tensor.shape, tensor.dtype)
        self.ledger.append(plan.functional, plan.name, arguments, (symbol,), False)
        step = Step(
            plan.functional,
            plan.name,
            arguments,
            plan.mutated[0],
            None,
            tensor.shape,
            tensor.dtype,
        )
        slot.chain, slot.symbol = (*slot.chain, step), symbol
        return tensor
