"""A module as it is now, to be put back exactly, whatever forward, a tracer or a hook leaves in it.

Remembered are, for every module of the tree and every object of the model's own code that it
reaches: the attributes, once per container the entries (lists, dicts, sets, deques, also in
classes), what its functions keep, and the values of buffers, plain tensors, arrays and random
generators. Of parameters it remembers which they are and where their memory is, not the values,
which may be large: who sees that a call writes to one says so (:meth:`Snapshot.keep`). Nothing is
compared but by identity or by bytes, so objects that refuse a comparison do no harm.

Not seen: functions of other files, caches around functions, state kept in C.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pathlift.homes import faces as sides
from pathlift.homes.differences import MISSING, difference, is_plain, key_of
from pathlift.homes.faces import Face, Pairs
from pathlift.homes.functions import FUNCTION, beside
from pathlift.homes.memory import Memory, TensorState

# Packages whose classes keep nothing of a model.
_OTHERS = ("torch", "builtins", "abc", "typing", "numpy")


class Change(NamedTuple):
    """What differs now: of the module at ``path``, its ``attribute`` (``"cache['k'][0]"``)."""

    path: str
    attribute: str
    what: str

    @property
    def in_place(self) -> bool:
        """Whether it is the values of a tensor alone that differ."""
        return self.what == "tensor written in place"

    @property
    def plain(self) -> bool:
        """Whether it is more than a tensor that differs."""
        return not self.what.startswith(("tensor", "added: tensor", "removed: tensor"))


@dataclass
class _Place:
    """Where an object was found first."""

    path: str
    attribute: str

    def inside(self, holder: object, face: Face, key: Any) -> _Place:
        """The place of an entry of what lies here."""
        if issubclass(type(holder), nn.Module) and not self.attribute:
            return _Place(self.path, str(key) if isinstance(key, str) else face.label(key)[1:])
        if self.attribute in sides.REGISTRIES and isinstance(key, str):
            return _Place(self.path, key)
        return _Place(self.path, self.attribute + face.label(key))

    def module(self, name: str) -> _Place:
        return _Place(f"{self.path}.{name}" if self.path else name, "")


@dataclass
class _Holder:
    """One mutable side of an object, and what it held."""

    holder: object
    face: Face
    pairs: Pairs
    place: _Place

    def __post_init__(self) -> None:
        self.tensors = [pair for pair in self.pairs if issubclass(type(pair[1]), Tensor)]

    def replaced(self) -> Iterator[Tensor]:
        """Tensors in whose place there is something else now."""
        if self.tensors:
            now = {key_of(k): v for k, v in self.face.read(self.holder)}
            yield from (v for k, v in self.tensors if now.get(key_of(k)) is not v)

    def differing(self) -> Iterator[tuple[Any, Any, Any]]:
        """Keys of which it holds another object now, with both (or :data:`MISSING`)."""
        now = self.face.read(self.holder)
        if sides.same(now, self.pairs):
            return
        then = {key_of(k): (k, v) for k, v in self.pairs}
        after = {key_of(k): (k, v) for k, v in now}
        for name in {**then, **after}:
            key, old = then.get(name, (after.get(name, (None, None))[0], MISSING))
            _, new = after.get(name, (key, MISSING))
            if old is not new:
                yield key, old, new

    def restore(self) -> None:
        if not sides.same(self.face.read(self.holder), self.pairs):
            self.face.write(self.holder, self.pairs)


class Snapshot:
    """Everything a call may leave behind in ``model``, as it is when the snapshot is made.

    It takes the memory of the buffers and plain tensors. Use :meth:`restore`, or
    ``with Snapshot(model):``, which restores at the end. Whole parameters that FSDP has gathered
    must be put away before either (``pathlift.homes.sharded.reshard``).

    Args:
        model: the module; nothing in it is changed, and forward is not run.
        keep: parameters whose values are remembered, too.
    """

    def __init__(self, model: nn.Module, keep: Iterable[Tensor] = ()) -> None:
        self.model = model
        self._seen: dict[int, object] = {}
        self._held: dict[int, list[_Holder]] = {}
        # Most of what a module holds are dicts of hooks that nobody registered.
        self._empty: dict[int, tuple[dict[Any, Any], _Place]] = {}
        self._tensors: dict[int, tuple[TensorState, _Place]] = {}
        self._put_back: list[Callable[[], object]] = []
        self._memory = Memory()
        self._packages = frozenset(sides.package(type(m)) for m in model.modules()) - {"torch"}
        # Parameters first: what shares memory with them is not copied.
        for parameter in model.parameters():
            self._memory.leave_out(parameter)
        self.kept: list[Tensor] = []
        for tensor in keep:
            self.keep(tensor)
        self._walk()
        devices = {state.tensor.device for state, _ in self._tensors.values()}
        self._put_back += [partial(put, get()) for get, put in _random_states(devices)]

    def keep(self, tensor: Tensor) -> None:
        """Remember the values of a parameter that is about to be written, by whichever view."""
        if self._memory.keep(tensor):
            self.kept.append(tensor)

    def _walk(self) -> None:
        waiting: list[tuple[object, _Place]] = [(self.model, _Place("", ""))]
        waiting += [(d, _Place("", f"torch.{n}")) for n, d in _global_hooks()]
        while waiting:
            value, place = waiting.pop()
            if id(value) in self._seen:
                continue
            # Kept alive, so that no other object gets the same id.
            self._seen[id(value)] = value
            if type(value) in (dict, OrderedDict) and not value:
                self._empty[id(value)] = (value, place)  # type: ignore[assignment]
                continue
            if issubclass(type(value), Tensor):
                self._tensors[id(value)] = (self._memory.state(value), place)  # type: ignore[arg-type]
            inner = [(part, place) for part in sides.parts(value) if _may_hold(part)]
            found = sides.faces(value, self._packages)
            for face in found:
                inner += self._hold(value, face, place)
            if not found:
                self._put_back += [partial(put, get()) for get, put in _stateful(value)]
            if isinstance(value, FunctionType):
                if _top(value) in self._packages:
                    inner += self._hold(value, FUNCTION, place)
                    inner += [(v, place) for v in beside(value)]
            elif issubclass(type(value), nn.Module):
                inner += [(c, _Place(place.path, c.__name__)) for c in type(value).__mro__]
            elif isinstance(value, type) and sides.package(value) not in _OTHERS:
                inner += self._hold(value, sides.CLASS, place)
                inner += [
                    (f, _Place(place.path, f"{place.attribute}.{n}"))
                    for n, f in vars(value).items()
                    if isinstance(f, FunctionType)
                ]
            waiting += reversed(inner)

    def _hold(self, value: object, face: Face, place: _Place) -> list[tuple[object, _Place]]:
        """Remember one side of an object; returns its entries, each with its place."""
        pairs = face.read(value)
        self._held.setdefault(id(value), []).append(_Holder(value, face, pairs, place))
        registered = place.attribute == "_modules"
        return [
            (v, place.module(k) if registered else place.inside(value, face, k))
            for k, v in pairs
            if _may_hold(v)
        ]

    def restore(self) -> None:
        """Put everything back; containers and tensors stay the same objects.

        What has not changed is not written to. If something can't be put back, everything else
        still is, and its error is raised at the end.
        """
        states = [state for state, _ in self._tensors.values()]
        _all(
            *(held.restore for held in reversed(self._holders())),
            *(state.put_back for state in states),
            self._memory.restore,
            *(state.look_again for state in states),
            *reversed(self._put_back),
        )

    def changed(self, written: set[int] | None = None) -> list[Change]:
        """What differs now: plain values (numbers, strings, None, containers of them), and tensors.

        A tensor counts as written if its bytes or its version counter moved, and as replaced if
        there is another object in its place. A container that was made anew with equal values does
        not count, nor does an object that is neither.

        Args:
            written: see :meth:`written`, if that has been asked for already.
        """
        written = self.written() if written is None else written
        found = []
        for held in self._holders():
            for place, what in self._changes_of(held):
                found.append(Change(place.path, place.attribute, what))
        for identity, (_, place) in self._tensors.items():
            if identity in written:
                found.append(Change(place.path, place.attribute, "tensor written in place"))
        return list(dict.fromkeys(found))

    def tensors(self) -> set[int]:
        """Ids of the tensors that it remembers."""
        return set(self._tensors)

    def written(self) -> set[int]:
        """Ids of the tensors whose values were written."""
        written = {i for i, (state, _) in self._tensors.items() if state.touched}
        quiet = {i: state.names for i, (state, _) in self._tensors.items() if i not in written}
        differing = self._memory.differing({n for names in quiet.values() for n in names})
        return written.union(i for i, names in quiet.items() if not differing.isdisjoint(names))

    def replaced(self) -> set[int]:
        """Ids of the tensors in whose place there is something else now."""
        return {id(tensor) for held in self._holders() for tensor in held.replaced()}

    def _changes_of(self, held: _Holder) -> Iterator[tuple[_Place, str]]:
        for key, old, new in held.differing():
            what = difference(old, new, self._contents, self._packages)
            if what is not None:
                yield held.place.inside(held.holder, held.face, key), what

    def _contents(self, holder: object) -> list[Pairs]:
        """What an object held on each of its sides when the snapshot was made."""
        if id(holder) in self._empty:
            return [[]]
        return [held.pairs for held in self._held.get(id(holder), [])]

    def _holders(self) -> list[_Holder]:
        """All that may differ now."""
        filled = [one for one in self._empty.values() if one[0]]
        return [
            *(held for several in self._held.values() for held in several),
            *(_Holder(holder, sides.ITEMS, [], place) for holder, place in filled),
        ]

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def _all(*calls: Callable[[], object]) -> None:
    """Make every call; what the last one raised that failed is raised at the end."""
    failed: BaseException | None = None
    for call in calls:
        try:
            call()
        except BaseException as error:
            failed = error
    if failed is not None:
        raise failed


def _may_hold(value: object) -> bool:
    """Whether there is anything to remember of a value beyond which it is."""
    return not (is_plain(value) or isinstance(value, ModuleType))


def _top(function: FunctionType) -> str:
    """Top-level package of a function."""
    return str(function.__module__).partition(".")[0]


def _global_hooks() -> list[tuple[str, dict[Any, Any]]]:
    """The hooks that run with every module."""
    home = vars(nn.modules.module)
    return [(n, d) for n, d in home.items() if n.startswith("_global") and isinstance(d, dict)]


# How to get a state, and how to put it back.
_State = tuple[Callable[[], Any], Callable[[Any], object]]


def _stateful(value: object) -> Iterator[_State]:
    """The state of arrays and random generators."""
    if isinstance(value, (torch.Generator, np.random.RandomState)):
        yield value.get_state, value.set_state
    elif isinstance(value, random.Random):
        yield value.getstate, value.setstate
    elif isinstance(value, np.random.Generator):
        bits = value.bit_generator
        yield lambda: bits.state, lambda state: setattr(bits, "state", state)
    elif isinstance(value, np.ndarray) and value.flags.writeable:
        yield value.copy, partial(np.copyto, value)


def _random_states(devices: set[torch.device]) -> Iterator[_State]:
    """Grad mode and the random states of this process, and those of the tensors' devices."""
    yield torch.is_grad_enabled, torch.set_grad_enabled
    yield torch.get_default_dtype, torch.set_default_dtype
    yield random.getstate, random.setstate
    yield np.random.get_state, np.random.set_state
    yield torch.get_rng_state, torch.set_rng_state
    for device in devices:
        kind: Any = getattr(torch, device.type, None)
        if device.type in ("cuda", "xpu"):
            yield partial(kind.get_rng_state, device), partial(kind.set_rng_state, device=device)
        elif device.type == "mps":
            yield kind.get_rng_state, kind.set_rng_state
