"""The calls of one run as they are written down, and which value each tensor holds at the time.

Tensors over the same memory look at one root; a write into one gives all of them new values.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping
from types import CellType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from pathlift.capture.aliases import Root, Slot, Step, overwritten
from pathlift.capture.program import (
    Call,
    Graph,
    Symbol,
    buffer_named,
    call,
    symbols_in,
    written_into,
)
from pathlift.capture.refusals import ELSEWHERE
from pathlift.capture.schemas import Plan, mapped, plan_of, tensors_of
from pathlift.errors import CaptureError


class Ledger:
    """What one run is written into.

    Args:
        fake: the mode of the fake tensors.
        named: id of a parameter or buffer -> its name.
        parameters: ids of the floating-point parameters.
        state: ids of tensors that a call changes: their values are not known.
    """

    def __init__(
        self,
        fake: FakeTensorMode,
        named: Mapping[int, str],
        parameters: frozenset[int],
        state: frozenset[int],
    ) -> None:
        self.fake, self.named, self.parameters, self.state = fake, named, parameters, state
        self.calls: list[Call] = []
        self.tensors: dict[Symbol, str] = {}
        self.constants: dict[Symbol, Tensor] = {}
        self.module: list[str] = []
        self.slots: Any = WeakIdKeyDictionary()
        # What was there before the run, by id.
        self.external: dict[int, tuple[Tensor, Slot]] = {}
        # The real ones of them by the memory that they lie in.
        self._over: dict[object, list[tuple[Tensor, Slot]]] = {}
        self._inputs: list[Slot] = []
        self.made: list[weakref.ref[Tensor]] = []

    def input(self, tensor: Tensor) -> tuple[Tensor, Symbol]:
        """A fake tensor in place of an example input."""
        fake = self.fake.from_tensor(tensor.detach(), static_shapes=True)
        symbol = Symbol(fake.shape, fake.dtype)
        slot = self.slots[fake] = Slot(Root(symbol, external="the model's input"), (), symbol)
        self._inputs.append(slot)
        return fake, symbol

    def results(
        self, returned: list[Tensor], kept: Mapping[str, Tensor]
    ) -> tuple[list[Symbol], dict[Symbol, str], dict[Symbol, str]]:
        """The symbols of what was returned, and of everything else that outlives the run.

        A tensor leaves the model by its output, by an attribute, a global, a closure or a cache:
        by whatever door, something holds it now. Call this while the output is held and no local
        of the run is.

        Args:
            returned: tensors in what the model returned.
            kept: tensors that its modules hold now in attributes, by name.

        Returns:
            symbols of ``returned``; symbol -> why, of all that leaves; and symbol -> attribute, of
            weights that forward makes of parameters alone (pruned ones), which leave only if a
            later call reads them.
        """
        outputs = [self.read(t) for t in returned]
        names = {id(t): n for n, t in kept.items()}
        expected = {*names, *map(id, returned)}
        if any(id(t) not in expected for t in self._living()):
            gc.collect()  # what only a cycle holds does not leave
        leaving = dict.fromkeys(outputs, "the model's output")
        made: dict[Symbol, str] = {}
        for tensor in self._living():
            symbol = self.read(tensor)
            if id(tensor) in names and symbol not in leaving and self._of_parameters(symbol):
                made[symbol] = names[id(tensor)]
            else:
                leaving.setdefault(symbol, "a tensor that forward leaves behind")
        slots = [s for _, s in self.external.values()]
        for slot in [*slots, *self._inputs]:
            if slot.root.version and slot.root.value is not None:
                leaving.setdefault(slot.root.value, written_into(slot.root.external or ""))
        self._pin_shared_memory(leaving)
        return outputs, leaving, made

    def read_from_outside(self) -> set[int]:
        """Ids of the tensors that were there before the run and that it has read."""
        return set(self.external)

    def _of_parameters(self, symbol: Symbol) -> bool:
        """Whether a value depends on parameters and constants alone."""
        made_by = {s: c for c in self.calls for s in symbols_in(c.outputs)}
        waiting, seen = [symbol], {symbol}
        while waiting:
            one = waiting.pop()
            if one in made_by:
                new = set(symbols_in(made_by[one].arguments)) - seen
                if not new and not list(symbols_in(made_by[one].arguments)):
                    return False  # a random draw, or memory without values
                seen |= new
                waiting += new
            elif one not in self.constants and one not in self.tensors:
                return False
        return True

    def release(self) -> None:
        """Put real tensors in place of what forward has left in globals, closures and caches.

        To be called when the model is as it was: what is alive now, no module holds.
        """
        if self._living():
            gc.collect()
        for tensor in self._living():
            with _disable_current_modes():
                sized = all(isinstance(n, int) for n in tensor.shape)
                real = torch.zeros(tensor.shape if sized else 0, dtype=tensor.dtype)
            for holder in gc.get_referrers(tensor):
                _replace(holder, tensor, real)

    def _living(self) -> list[Tensor]:
        return [tensor for ref in self.made if (tensor := ref()) is not None]

    def _pin_shared_memory(self, leaving: dict[Symbol, str]) -> None:
        """A parameter that is also read through another tensor over its memory is not rescaled."""
        externals = [(t, s) for t, s in self.external.values() if not _is_fake(t)]
        parameters = {
            t.untyped_storage()._cdata: s for t, s in externals if id(t) in self.parameters
        }
        for tensor, _ in externals:
            if id(tensor) not in self.parameters and tensor.layout == torch.strided:
                shared = parameters.get(tensor.untyped_storage()._cdata)
                if shared is not None and shared.root.value is not None:
                    leaving.setdefault(shared.root.value, "another tensor over the same memory")

    def changed(self) -> set[int]:
        """Ids of the tensors from outside that were written."""
        return {i for i, (_, slot) in self.external.items() if slot.root.version}

    def written_parameters(self) -> set[str]:
        """Names of the parameters that the run writes to."""
        return {self.named[i] for i in self.changed() if i in self.parameters}

    def read_as_constants(self) -> set[int]:
        """Ids of the tensors from outside whose values went into the program."""
        return {i for i, (_, slot) in self.external.items() if slot.root.known}

    def append(
        self, target: Any, name: str, arguments: dict[str, Any], layout: Any, several: bool
    ) -> None:
        module = self.module[-1] if self.module else ""
        self.calls.append(Call(target, name, arguments, tuple(layout), several, module))

    def _emit(
        self, target: Any, arguments: dict[str, Any], shape: torch.Size, dtype: torch.dtype
    ) -> Symbol:
        symbol = Symbol(shape, dtype)
        plan = plan_of(target)
        full = {
            a.name: arguments.get(a.name, a.default_value if a.has_default_value() else None)
            for a in plan.arguments
        }
        self.append(target, plan.name, full, (symbol,), False)
        return symbol

    def slot(self, tensor: Tensor) -> Slot:
        slot = self.slots.get(tensor)
        if slot is not None:
            return slot
        entry = self.external.get(id(tensor))
        if entry is None:
            entry = self.external[id(tensor)] = (tensor, self._adopt(tensor))
            if not _is_fake(tensor):
                self._over.setdefault(_memory(tensor), []).append(entry)
        return entry[1]

    def _adopt(self, tensor: Tensor) -> Slot:
        """The slot of a tensor that was there before the run."""
        name = self.named.get(id(tensor))
        what = "a tensor kept outside forward"
        if name is not None:
            what = f"parameter '{name}'" if id(tensor) in self.parameters else buffer_named(name)
        elif _is_fake(tensor):
            raise CaptureError(ELSEWHERE)
        known = not (id(tensor) in self.parameters or id(tensor) in self.state or _is_fake(tensor))
        root = Root(external=what, symbolic=not known, known=known)
        if not known:
            root.value = Symbol(tensor.shape, tensor.dtype)
            if name is not None:
                self.tensors[root.value] = name
        return Slot(root)

    def symbolic(self, tensor: Tensor) -> bool:
        return self.slot(tensor).root.symbolic

    def read(self, tensor: Tensor) -> Symbol:
        slot = self.slot(tensor)
        root = slot.root
        if slot.symbol is not None and slot.version == root.version:
            return slot.symbol
        if not root.symbolic:
            slot.symbol = self.constant(tensor, root)
        else:
            value = root.value
            assert value is not None
            for step in slot.chain:
                value = self._again(step, value)
            slot.symbol = value
        slot.version = root.version
        return slot.symbol

    def constant(self, tensor: Tensor, root: Root | None = None) -> Symbol:
        symbol = Symbol(tensor.shape, tensor.dtype)
        # One that is sparse, or on the meta device, has no values that could be looked at.
        if tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized):
            with _disable_current_modes():
                self.constants[symbol] = tensor.detach()
        if root is not None:
            root.constants.append(symbol)
            name = self.named.get(id(tensor))
            if name is not None:
                self.tensors[symbol] = name
        return symbol

    def _again(self, step: Step, value: Symbol) -> Symbol:
        arguments = {**step.arguments, step.viewed: value}
        if step.pick is None:
            return self._emit(step.target, arguments, step.shape, step.dtype)
        parts = self._parts(step, value)
        self.append(step.target, step.name, arguments, (parts,), True)
        return parts[step.pick]

    @staticmethod
    def _parts(step: Step, value: Symbol) -> list[Symbol]:
        with _disable_current_modes():
            empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
            made = call(step.target, {**step.arguments, step.viewed: empty})
        return [Symbol(t.shape, t.dtype) for t in made]

    def write(self, tensor: Tensor, new: Symbol) -> None:
        slot = self.slot(tensor)
        root = slot.root
        if slot.chain:
            values = [self._whole(root)]
            for step in slot.chain[:-1]:
                values.append(self._again(step, values[-1]))
            value = new
            for step, base in zip(reversed(slot.chain), reversed(values), strict=True):
                with _disable_current_modes():
                    value = overwritten(self._emit, self.constant, base, step, value)
            root.value = value
        else:
            root.value = new
        if root.external and not root.version:
            self._spread(tensor, root)
        root.symbolic = True
        root.version += 1
        slot.symbol, slot.version = new, root.version

    def _whole(self, root: Root) -> Symbol:
        if root.value is None:  # a constant that is written for the first time
            for tensor, slot in self._tensors_of(root):
                if not slot.chain:
                    with _disable_current_modes():
                        root.value = self.constant(tensor.clone())
                    break
            else:
                raise CaptureError(
                    "the model writes into a view of a tensor that it has let go; what the write "
                    "changes can't be followed. Write into a copy, or keep the tensor."
                )
        return root.value

    def _tensors_of(self, root: Root) -> Iterator[tuple[Tensor, Slot]]:
        for tensor, slot in [*self.external.values(), *self.slots.items()]:
            if slot.root is root:
                yield tensor, slot

    def _spread(self, tensor: Tensor, root: Root) -> None:
        """Other tensors from outside over the same memory are not what they were."""
        if _is_fake(tensor):
            return
        for other, slot in self._over.get(_memory(tensor), ()):
            if slot.root is not root:
                slot.root.value = Symbol(other.shape, other.dtype)
                slot.root.symbolic = True
                slot.root.version += 1

    def viewed(
        self, plan: Plan, bound: dict[str, Any], tensor: Tensor
    ) -> tuple[str, Tensor] | None:
        """The argument whose memory a result shares."""
        if not plan.aliases:
            return None
        for name, value in bound.items():
            for one in tensors_of(value):
                if one is tensor or _shares(self._twin(one, tensor), tensor):
                    return name, one
        return None

    def _twin(self, tensor: Tensor, like: Tensor) -> Tensor:
        """The fake tensor in whose place a real one was computed with."""
        if _is_fake(like) and not _is_fake(tensor):
            return self.fake.from_tensor(tensor, static_shapes=True)
        return tensor

    def view(
        self,
        plan: Plan,
        bound: dict[str, Any],
        source: tuple[str, Tensor],
        tensor: Tensor,
        result: Any,
        symbol: Symbol | None,
    ) -> Slot:
        name, viewed = source
        slot = self.slot(viewed)
        pick = None
        if isinstance(result, (list, tuple)):
            pick = next(k for k, t in enumerate(result) if t is tensor)
        others = {k: (None if k == name else mapped(v, self.read)) for k, v in bound.items()}
        step = Step(
            plan.functional,
            plan.name,
            others,
            name,
            pick,
            tensor.shape,
            tensor.dtype,
        )
        return Slot(slot.root, (*slot.chain, step), symbol, slot.root.version)


def _replace(holder: Any, old: Tensor, new: Tensor) -> None:
    """Put ``new`` where a container or a closure's cell holds ``old``."""
    if isinstance(holder, dict):
        for key in [k for k, v in holder.items() if v is old]:
            holder[key] = new
    elif isinstance(holder, list):
        holder[:] = [new if v is old else v for v in holder]
    elif isinstance(holder, set):
        holder.discard(old)
    elif isinstance(holder, CellType):
        holder.cell_contents = new


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def _shares(a: Tensor, b: Tensor) -> bool:
    return a is b or _memory(a) == _memory(b)


def _memory(tensor: Tensor) -> object:
    """Which storage a tensor lies in."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors have none
        return ("none", id(tensor))


def graph_of(ledger: Ledger, training: bool, inputs: Any, outputs: Any, leaving: Any) -> Graph:
    """What was recorded."""
    return Graph(
        tuple(ledger.calls),
        training,
        dict(ledger.tensors),
        tuple(inputs),
        dict(ledger.constants),
        tuple(outputs),
        dict(leaving),
    )
