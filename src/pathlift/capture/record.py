"""One recorder of ATen calls: a model is run on fake tensors and every call is written down.

An operation that the table knows is recorded whole; one that it doesn't know is taken apart where
PyTorch composes it of others. What depends on neither inputs, parameters nor state is computed for
real on the way (position ids, masks): such tensors are constants of the program. Where Python asks
for a value that is not known, the model is refused with the line of its code that asked.
"""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import CellType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from pathlift.capture.aliases import Root, Slot, Step, overwritten
from pathlift.capture.program import Call, Graph, Symbol, call, symbols_in
from pathlift.capture.refusals import HigherOrder, ValueNeeded
from pathlift.capture.witness import QUERIES, Watch, higher_order, noted
from pathlift.errors import CaptureError

# Larger results of operations on constants are not computed: they are unknown.
_MAX_CONSTANT = 20_000_000

# Arguments of norms that hold running averages: an update leaves them what they are to the norm.
_AVERAGES = frozenset({"running_mean", "running_var"})

_VALUES = frozenset({"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"})


@dataclass(frozen=True)
class _Plan:
    """What the schema of an operation says."""

    name: str
    full: str
    arguments: tuple[Any, ...]
    mutated: tuple[str, ...]
    functional: Any
    aliases: bool
    composite: bool
    seeded: bool
    reshaped: bool
    uninitialised: bool


@cache
def plan_of(func: Any) -> _Plan:
    schema = func._schema
    full = str(schema.name)
    space, _, plain = full.partition("::")
    in_place = plain.endswith("_") and not plain.endswith("__")
    base = plain[:-1] if in_place else plain
    if base.startswith("__i") and base.endswith("__"):
        base = f"__{base[3:]}"
    mutated = tuple(
        a.name
        for a in schema.arguments
        if a.alias_info is not None and a.alias_info.is_write and a.name not in _AVERAGES
    )
    functional = _functional(func, space, base, mutated) if mutated else func
    known = space == "aten" and functional is not None
    composite = torch._C.DispatchKey.CompositeImplicitAutograd in func.py_kernels or (
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    )
    return _Plan(
        name=base if known else full,
        full=full,
        arguments=tuple(schema.arguments),
        mutated=mutated,
        functional=functional or func,
        aliases=composite or any(r.alias_info is not None for r in schema.returns),
        composite=composite,
        seeded=torch.Tag.nondeterministic_seeded in func.tags,
        reshaped=torch.Tag.inplace_view in func.tags,
        uninitialised=base.startswith(("empty", "new_empty", "resize")),
    )


def _functional(func: Any, space: str, base: str, mutated: tuple[str, ...]) -> Any:
    """The overload that returns what ``func`` writes."""
    packet = getattr(getattr(torch.ops, space), base, None)
    if packet is None:
        return None
    schema = func._schema
    outs = {a.name for a in schema.arguments if a.name in mutated and a.kwarg_only}
    wanted = [a.name for a in schema.arguments if a.name not in outs]
    names = list(packet.overloads())
    own = func._overloadname
    for overload in sorted(names, key=lambda n: n != own):
        candidate = getattr(packet, overload)
        other = candidate._schema
        plain = all(a.alias_info is None or not a.alias_info.is_write for a in other.arguments)
        if plain and [a.name for a in other.arguments] == wanted:
            return candidate
    return None


class Recorder(Watch):
    """Writes down the calls of one run.

    Args:
        fake: the mode of the fake tensors.
        known: whether the table of operations has an entry of this name.
        named: id of a parameter or buffer -> its name.
        parameters: ids of the floating-point parameters.
        state: ids of tensors that a call changes: their values are not known.
    """

    def __init__(
        self,
        fake: FakeTensorMode,
        known: Callable[[str], bool],
        named: Mapping[int, str],
        parameters: frozenset[int],
        state: frozenset[int],
    ) -> None:
        super().__init__()
        self.fake, self.known = fake, known
        self.named, self.parameters, self.state = named, parameters, state
        self.calls: list[Call] = []
        self.tensors: dict[Symbol, str] = {}
        self.constants: dict[Symbol, Tensor] = {}
        self.module: list[str] = []
        # Buffers whose values went into the program.
        self.folded: set[str] = set()
        self.refused: CaptureError | None = None
        self._inside = 0
        self._slots: Any = WeakIdKeyDictionary()
        self._external: dict[int, tuple[Tensor, Slot]] = {}
        # The real ones of them by the memory that they lie in.
        self._over: dict[object, list[tuple[Tensor, Slot]]] = {}
        self._inputs: list[Slot] = []
        self._made: list[weakref.ref[Tensor]] = []

    # ------------------------------------------------------------------ inputs and results

    def input(self, tensor: Tensor) -> tuple[Tensor, Symbol]:
        """A fake tensor in place of an example input."""
        fake = self.fake.from_tensor(tensor.detach(), static_shapes=True)
        symbol = Symbol(fake.shape, fake.dtype)
        slot = self._slots[fake] = Slot(Root(symbol, external="the model's input"), (), symbol)
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
        outputs = [self._read(t) for t in returned]
        names = {id(t): n for n, t in kept.items()}
        expected = {*names, *map(id, returned)}
        if any(id(t) not in expected for t in self._living()):
            gc.collect()  # what only a cycle holds does not leave
        leaving = dict.fromkeys(outputs, "the model's output")
        made: dict[Symbol, str] = {}
        for tensor in self._living():
            symbol = self._read(tensor)
            if id(tensor) in names and symbol not in leaving and self._of_parameters(symbol):
                made[symbol] = names[id(tensor)]
            else:
                leaving.setdefault(symbol, "a tensor that forward leaves behind")
        slots = [s for _, s in self._external.values()]
        for slot in [*slots, *self._inputs]:
            if slot.root.version and slot.root.value is not None:
                leaving.setdefault(slot.root.value, f"written into {slot.root.external}")
        self._pin_shared_memory(leaving)
        return outputs, leaving, made

    def read_from_outside(self) -> set[int]:
        """Ids of the tensors that were there before the run and that it has read."""
        return set(self._external)

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
        return [tensor for ref in self._made if (tensor := ref()) is not None]

    def _pin_shared_memory(self, leaving: dict[Symbol, str]) -> None:
        """A parameter that is also read through another tensor over its memory is not rescaled."""
        externals = [(t, s) for t, s in self._external.values() if not _is_fake(t)]
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
        return {i for i, (_, slot) in self._external.items() if slot.root.version}

    def read_as_constants(self) -> set[int]:
        """Ids of the tensors from outside whose values went into the program."""
        return {i for i, (_, slot) in self._external.items() if slot.root.known}

    # ------------------------------------------------------------------ recording

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
        bound = _bind(plan, args, kwargs)
        if plan.name == "lift_fresh":  # a tensor that Python has just made
            self._slots.setdefault(args[0], Slot(Root(symbolic=False)))
        tensors = list(_tensors((args, kwargs)))
        symbolic = any(self._symbolic(t) for t in tensors)
        if not symbolic and self._computable(plan, bound):
            return self._compute(func, plan, bound, args, kwargs)
        if plan.name in _VALUES:
            self._refuse(ValueNeeded(plan.name))
        if not self.known(plan.name) and plan.composite:
            self._inside += 1
            try:
                with self:
                    result = func.decompose(*args, **kwargs)
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
        if self._symbolic(tensor):
            self._refuse(ValueNeeded("values"))
        self._fold([tensor])

    def _fold(self, tensors: Iterable[Tensor]) -> None:
        """Note the buffers whose values are looked at."""
        self.folded.update(self.named[id(t)] for t in tensors if id(t) in self.named)

    def _computable(self, plan: _Plan, bound: dict[str, Any]) -> bool:
        if plan.seeded or plan.uninitialised:
            return False
        if any(self._slot(t).root.external for m in plan.mutated for t in _tensors(bound[m])):
            return plan.reshaped
        size = bound.get("size")
        if isinstance(size, (list, tuple)):
            return math.prod(n for n in size if isinstance(n, int)) <= _MAX_CONSTANT
        return True

    def _compute(
        self, func: Any, plan: _Plan, bound: dict[str, Any], args: Any, kwargs: Any
    ) -> Any:
        """Run on real tensors, none of which depends on inputs, parameters or state."""
        self._fold(_tensors((args, kwargs)))
        for name in () if plan.reshaped else plan.mutated:
            for tensor in _tensors(bound[name]):
                root = self._slot(tensor).root
                with _disable_current_modes():
                    for symbol in (
                        self.constants.keys() & root.constants
                    ):  # read so far: keeps its value
                        self.constants[symbol] = self.constants[symbol].clone()
                root.constants.clear()
                root.value = None
                root.version += 1
        with _disable_current_modes():
            result = func(*args, **kwargs)
        for tensor in _tensors(result):
            if isinstance(tensor, FakeTensor) or id(tensor) in self._external:
                continue
            source = None if plan.name == "lift_fresh" else self._viewed(plan, bound, tensor)
            if source is None:
                if tensor not in self._slots:
                    self._slots[tensor] = Slot(Root(symbolic=False))
            elif tensor is not source[1]:
                self._slots[tensor] = self._view(plan, bound, source, tensor, result, None)
        return result

    def _record(self, func: Any, plan: _Plan, bound: dict[str, Any], args: Any, kwargs: Any) -> Any:
        mutated = [t for name in plan.mutated for t in _tensors(bound[name])]
        arguments = _mapped(bound, self._read)
        result = func(*args, **kwargs)
        flat = list(_tensors(result))
        if plan.reshaped and mutated:
            return self._turned(plan, bound, arguments, mutated[0])
        fresh = list(_tensors(_unwritten(func, result))) if mutated else flat
        if plan.functional is func or not mutated:
            outputs = _mapped(result, lambda t: Symbol(t.shape, t.dtype))
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
        self._append(target, plan.name, arguments, layout, several)
        symbols = list(symbols_in(layout))
        if target is func and not mutated:
            for tensor, symbol in zip(flat, symbols, strict=True):
                self._place(plan, bound, tensor, symbol, result)
            return result
        for tensor, symbol in zip(mutated, symbols, strict=False):
            self._write(tensor, symbol)
        for tensor, symbol in zip(fresh, symbols[len(mutated) :], strict=False):
            self._place(plan, bound, tensor, symbol, result)
        return _restored(func, result, bound)

    def _place(
        self, plan: _Plan, bound: dict[str, Any], tensor: Tensor, symbol: Symbol, result: Any
    ) -> None:
        source = self._viewed(plan, bound, tensor) if plan.aliases else None
        if source is not None and tensor is source[1]:
            self._slot(tensor).symbol = symbol  # returned as it came
            return
        if source is not None:
            self._slots[tensor] = self._view(plan, bound, source, tensor, result, symbol)
        else:
            self._slots[tensor] = Slot(Root(symbol), (), symbol)
        self._made.append(weakref.ref(tensor))

    def _turned(
        self, plan: _Plan, bound: dict[str, Any], arguments: dict[str, Any], tensor: Tensor
    ) -> Any:
        """An operation that gives a tensor another shape in place."""
        slot = self._slot(tensor)
        symbol = Symbol(tensor.shape, tensor.dtype)
        self._append(plan.functional, plan.name, arguments, (symbol,), False)
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

    def _append(
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
        self._append(target, plan.name, full, (symbol,), False)
        return symbol

    # ------------------------------------------------------------------ memory

    def _slot(self, tensor: Tensor) -> Slot:
        slot = self._slots.get(tensor)
        if slot is not None:
            return slot
        entry = self._external.get(id(tensor))
        if entry is None:
            entry = self._external[id(tensor)] = (tensor, self._adopt(tensor))
            if not _is_fake(tensor):
                self._over.setdefault(_memory(tensor), []).append(entry)
        return entry[1]

    def _adopt(self, tensor: Tensor) -> Slot:
        """The slot of a tensor that was there before the run."""
        name = self.named.get(id(tensor))
        what = "a tensor kept outside forward"
        if name is not None:
            kind = "parameter" if id(tensor) in self.parameters else "buffer"
            what = f"{kind} '{name}'"
        elif _is_fake(tensor):
            raise CaptureError(
                "it uses a tensor that was computed where its operations can't be followed, such "
                "as in another thread. Compute it in the thread that calls the model."
            )
        known = not (id(tensor) in self.parameters or id(tensor) in self.state or _is_fake(tensor))
        root = Root(external=what, symbolic=not known, known=known)
        if not known:
            root.value = Symbol(tensor.shape, tensor.dtype)
            if name is not None:
                self.tensors[root.value] = name
        return Slot(root)

    def _symbolic(self, tensor: Tensor) -> bool:
        return self._slot(tensor).root.symbolic

    def _read(self, tensor: Tensor) -> Symbol:
        slot = self._slot(tensor)
        root = slot.root
        if slot.symbol is not None and slot.version == root.version:
            return slot.symbol
        if not root.symbolic:
            slot.symbol = self._constant(tensor, root)
        else:
            value = root.value
            assert value is not None
            for step in slot.chain:
                value = self._again(step, value)
            slot.symbol = value
        slot.version = root.version
        return slot.symbol

    def _constant(self, tensor: Tensor, root: Root | None = None) -> Symbol:
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
        self._append(step.target, step.name, arguments, (parts,), True)
        return parts[step.pick]

    @staticmethod
    def _parts(step: Step, value: Symbol) -> list[Symbol]:
        with _disable_current_modes():
            empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
            made = call(step.target, {**step.arguments, step.viewed: empty})
        return [Symbol(t.shape, t.dtype) for t in made]

    def _write(self, tensor: Tensor, new: Symbol) -> None:
        slot = self._slot(tensor)
        root = slot.root
        if slot.chain:
            values = [self._whole(root)]
            for step in slot.chain[:-1]:
                values.append(self._again(step, values[-1]))
            value = new
            for step, base in zip(reversed(slot.chain), reversed(values), strict=True):
                with _disable_current_modes():
                    value = overwritten(self._emit, self._constant, base, step, value)
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
                        root.value = self._constant(tensor.clone())
                    break
            else:
                raise CaptureError(
                    "the model writes into a view of a tensor that it has let go; what the write "
                    "changes can't be followed. Write into a copy, or keep the tensor."
                )
        return root.value

    def _tensors_of(self, root: Root) -> Iterator[tuple[Tensor, Slot]]:
        for tensor, slot in [*self._external.values(), *self._slots.items()]:
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

    def _viewed(
        self, plan: _Plan, bound: dict[str, Any], tensor: Tensor
    ) -> tuple[str, Tensor] | None:
        """The argument whose memory a result shares."""
        if not plan.aliases:
            return None
        for name, value in bound.items():
            for one in _tensors(value):
                if one is tensor or _shares(self._twin(one, tensor), tensor):
                    return name, one
        return None

    def _twin(self, tensor: Tensor, like: Tensor) -> Tensor:
        """The fake tensor in whose place a real one was computed with."""
        if _is_fake(like) and not _is_fake(tensor):
            return self.fake.from_tensor(tensor, static_shapes=True)
        return tensor

    def _view(
        self,
        plan: _Plan,
        bound: dict[str, Any],
        source: tuple[str, Tensor],
        tensor: Tensor,
        result: Any,
        symbol: Symbol | None,
    ) -> Slot:
        name, viewed = source
        slot = self._slot(viewed)
        pick = None
        if isinstance(result, (list, tuple)):
            pick = next(k for k, t in enumerate(result) if t is tensor)
        others = {k: (None if k == name else _mapped(v, self._read)) for k, v in bound.items()}
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


def _bind(plan: _Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound: dict[str, Any] = {}
    for k, argument in enumerate(plan.arguments):
        if k < len(args) and not argument.kwarg_only:
            bound[argument.name] = args[k]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, dict):
        for value in nested.values():
            yield from _tensors(value)
    elif isinstance(nested, (list, tuple)):
        for value in nested:
            yield from _tensors(value)


def _mapped(nested: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(nested, Tensor):
        return function(nested)
    if isinstance(nested, dict):
        return {k: _mapped(v, function) for k, v in nested.items()}
    if isinstance(nested, (list, tuple)):
        return [_mapped(v, function) for v in nested]
    return nested


def _returns(func: Any, result: Any) -> list[tuple[Any, Any]]:
    """What was returned, each with what the schema says of it."""
    returns = func._schema.returns
    several = list(result) if len(returns) > 1 else [result]
    return list(zip(returns, several, strict=True)) if returns else []


def _unwritten(func: Any, result: Any) -> list[Any]:
    """What was returned besides the tensors that were written."""
    return [
        value
        for schema, value in _returns(func, result)
        if schema.alias_info is None or not schema.alias_info.is_write
    ]


def _restored(func: Any, result: Any, bound: dict[str, Any]) -> Any:
    """The result with the tensors that were written as they were given."""
    given: dict[str, Any] = {}
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            given.update((name, bound[argument.name]) for name in argument.alias_info.before_set)
    found = []
    for schema, value in _returns(func, result):
        written = schema.alias_info is not None and schema.alias_info.is_write
        names = schema.alias_info.before_set if written else ()
        found.append(next((given[n] for n in names if n in given), value))
    if len(func._schema.returns) > 1:
        return tuple(found)
    return found[0] if found else result


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


@contextmanager
def module_paths(recorder: Recorder, model: nn.Module) -> Iterator[None]:
    """Keep ``recorder.module`` at the path of the innermost running module of the model."""
    thread = threading.get_ident()
    paths = {id(m): name for name, m in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == thread and id(module) in paths:
            recorder.module.append(paths[id(module)])

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        if threading.get_ident() == thread and id(module) in paths and recorder.module:
            recorder.module.pop()

    hooks = nn.modules.module
    handles = [
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def graph_of(recorder: Recorder, training: bool, inputs: Any, outputs: Any, leaving: Any) -> Graph:
    """What was recorded."""
    return Graph(
        tuple(recorder.calls),
        training,
        dict(recorder.tensors),
        tuple(inputs),
        dict(recorder.constants),
        tuple(outputs),
        dict(leaving),
    )
