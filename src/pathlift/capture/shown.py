"""What a run of the real model shows, and whether a later call can see what it has left."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pathlift.capture.inputs import tensors_in
from pathlift.capture.names import attributes
from pathlift.capture.program import (
    Call,
    Graph,
    Program,
    Symbol,
    buffer_named,
    symbols_in,
    written_into,
)
from pathlift.capture.schemas import bound_arguments, plan_of
from pathlift.capture.witness import Run
from pathlift.homes.snapshot import Change, Snapshot
from pathlift.operations.moments import averages_batches, batch_moments


@dataclass(frozen=True)
class Shown:
    """Copies of everything that can be seen after a run.

    Attributes:
        returned: the tensors in what the model returned.
        left: id of a tensor in a buffer or an attribute, and a copy of it.
        names: attribute -> id.
    """

    returned: list[Tensor]
    left: list[tuple[int, Tensor]]
    names: dict[str, int]

    def without(self, skipped: frozenset[int], derived: Collection[str]) -> list[Tensor]:
        """All copies but those of tensors with these ids, and of these attributes."""
        unseen = skipped.union(self.names[n] for n in derived if n in self.names)
        return [*self.returned, *(copy for i, copy in self.left if i not in unseen)]


def shown(model: nn.Module, out: Any) -> Shown:
    """What can be seen of a model that has just returned ``out``."""
    own = attributes(model)
    parameters = {id(p) for p in model.parameters()}
    left = [t for t in (*model.buffers(), *own.values()) if id(t) not in parameters]
    return Shown(
        [_copied(t) for t in tensors_in(out) if _is_dense(t)],
        [(id(t), _copied(t)) for t in left if _is_dense(t)],
        {name: id(t) for name, t in own.items()},
    )


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def seed(model: nn.Module) -> None:
    """The same random numbers for every run that is compared; a snapshot puts back the state."""
    if all(t.device.type == "cpu" for t in (*model.parameters(), *model.buffers())):
        torch.default_generator.manual_seed(0)  # torch.manual_seed notes a traceback per device
    else:
        torch.manual_seed(0)


# Kinds of modules that PyTorch runs by other kernels where nothing watches.
_FAST = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
# Bytes in buffers and attributes above which no copy is kept from the capture on.
_MOST = 100_000_000


class Rehearsal:
    """The first real runs of a capture, for the one who runs the model again right after it.

    Each mode is run once from the model as it is: its own mode on the example inputs, the other on
    other values.

    Attributes:
        shown: mode -> what that run showed, from the random numbers of :func:`seed`; without a mode
            where a run that is watched need not be one that is not.
        changes, written: what the run in the model's own mode changed, as a snapshot says it.
        snapshot: of the model as it was.
        moments: of what batch norms were given in it, in the order of their calls.
    """

    def __init__(self) -> None:
        self.shown: dict[bool, Shown] = {}
        self.snapshot: Snapshot | None = None
        self.changes: list[Change] = []
        self.written: set[int] = set()
        self.moments: list[tuple[Tensor, Tensor]] = []

    def begun(self, model: nn.Module, run: Run, own: bool) -> Run:
        """To be called before a run; in the model's own mode, returns ``run`` with a note of what
        batch norms are given."""
        seed(model)

        def noted(func: Any, args: Any, kwargs: Any) -> Any:
            plan = plan_of(func)
            if any(a.name == "running_mean" for a in plan.arguments):
                bound = bound_arguments(plan, args, kwargs)
                if averages_batches(bound):
                    self.moments.append(batch_moments(bound))
            return run(func, args, kwargs)

        return noted if own else run

    def ended(self, model: nn.Module, out: Any, mode: bool) -> None:
        """To be called after it, with what the model has returned."""
        left = [t for t in (*model.buffers(), *attributes(model).values()) if _is_dense(t)]
        fast = any(isinstance(m, _FAST) for m in model.modules())
        whole = all(map(_is_dense, tensors_in(out)))
        if whole and not fast and sum(t.nbytes for t in left) <= _MOST:
            self.shown[mode] = shown(model, out)

    def stands_for(self, program: Program) -> dict[bool, Shown]:
        """Mode -> what a run of the model as it was captured shows, where this can tell it."""
        return {} if lasts(program, self.changes, self.written) else self.shown

    def statistics(self, program: Program) -> dict[Call, tuple[Tensor, Tensor]] | None:
        """The moments by the calls of the program's first graph; None if they don't fit."""
        norms = [c for c in program.graphs[0].calls if averages_batches(c.arguments)]
        if program.reads or len(norms) != len(self.moments):
            return None
        return dict(zip(norms, self.moments, strict=True))


def lasts(program: Program, changes: Iterable[Change], written: AbstractSet[int]) -> bool:
    """Whether the next call in the model's own mode may see what a call has left, or other values
    may make it another one.

    No call sees a counter that only counts, or the averages of a norm that divides by its batch's
    own statistics: whatever they hold, it computes the same function. Of anything else that a call
    changes it is assumed.

    Args:
        changes: what a call has changed.
        written: ids of the tensors that it has written to.
    """
    if program.reads or any(not c.in_place and c.attribute != "training" for c in changes):
        return True
    buffers = {id(b): n for n, b in program.buffers.items()}
    if not written <= buffers.keys():
        return True
    names = {buffers[i] for i in written}
    own = [g for g in program.graphs if g.training == program.training]
    return not all(_kept_to_themselves(graph, names) for graph in own)


def _kept_to_themselves(graph: Graph, names: AbstractSet[str]) -> bool:
    """Whether each of these buffers is read for its own next value alone."""
    owner = {s: n for s, n in graph.tensors.items() if n in names}
    for call in graph.calls:
        owners = {owner[s] for s in _read(call) if s in owner}
        if len(owners) > 1:
            return False
        for name in owners:
            owner.update((s, name) for s in symbols_in(call.outputs))
    seen = {**graph.leaving, **dict.fromkeys(graph.outputs, "")}
    return all(seen[s] == written_into(buffer_named(n)) for s, n in owner.items() if s in seen)


def _read(call: Call) -> list[Symbol]:
    """What the results of a call depend on."""
    arguments = dict(call.arguments)
    if arguments.get("training", arguments.get("use_input_stats")) is True:
        arguments.pop("running_mean", None)
        arguments.pop("running_var", None)
    return list(symbols_in(arguments))
