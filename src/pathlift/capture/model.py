"""Model and example inputs -> :class:`Program`: checks, names, modes, warm-up, and no trace left.

Per mode the model runs once for real, so that what it builds on its first call is real and what it
changes is known. Then it is put back as it was and recorded on fake tensors; if the first call has
changed more than buffers, it is recorded once more from there, and both records count.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathlift import operations
from pathlift.capture.fakes import Fakes
from pathlift.capture.inputs import as_inputs, copied, doubled, rolled, tensors_in
from pathlift.capture.ledger import Ledger, graph_of
from pathlift.capture.modes import below_autograd, quiet
from pathlift.capture.names import attributes, check_model, module_paths, named_tensors
from pathlift.capture.program import Graph, Inputs, Program, Source, Symbol, floating
from pathlift.capture.reads import Reads
from pathlift.capture.record import Recorder
from pathlift.capture.refusals import ELSEWHERE, differs, draws, explained, failed, not_recorded
from pathlift.capture.shown import Rehearsal
from pathlift.capture.witness import Run, Witness, agree
from pathlift.collector import uncollected
from pathlift.errors import CaptureError
from pathlift.homes.snapshot import Snapshot
from pathlift.surroundings import callers_device, plain_arithmetic

# Modules are changed while they are recorded, and torch's modes are global.
LOCK = threading.RLock()


@uncollected
def capture(
    model: nn.Module,
    example_inputs: object,
    source: Source | None = None,
    *,
    both: bool = True,
    rehearsal: Rehearsal | None = None,
) -> Program:
    """Record the operations of ``model`` on ``example_inputs``, in both modes.

    Args:
        model: any module; left as found (attributes, buffers, modes, random state).
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        source: where the values of parameters come from, if not from the model. Its parameters
            may then be on the meta device; no memory is taken for them.
        both: False: in the model's own mode alone, for what asks of no other.
        rehearsal: filled with what the first real runs show.

    Raises:
        ArgumentError: ``model`` or ``example_inputs`` has the wrong type.
        CaptureError: the model can't be recorded; the message says where and why.
    """
    model = check_model(model, meta=source is not None)
    inputs = as_inputs(example_inputs)
    parameters, buffers, aliases = named_tensors(model)
    with LOCK, quiet(), _fake_for_meta(model) as fake:
        before = Snapshot(model)
        session = _Session(model, inputs, before, parameters, buffers, fake, both, rehearsal)
        try:
            with before:
                graphs = tuple(session.graphs())
        finally:
            session.release()
    return Program(
        graphs,
        parameters,
        buffers,
        aliases,
        inputs,
        source,
        session.examples,
        session.derived,
        frozenset(n for r in session.recorders for n in r.folded),
        frozenset(n for r in session.recorders for n in r.ledger.written_parameters()),
        session.reads,
    )


class _Session:
    """One capture: the model, and what must hold while it runs."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        before: Snapshot,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        fake: Fakes,
        both: bool,
        rehearsal: Rehearsal | None,
    ) -> None:
        self.model, self.inputs, self.before, self.fake = model, inputs, before, fake
        self.name = type(model).__name__
        self.real = not any(p.is_meta for p in parameters.values())
        self.own = model.training
        self.modes = [self.own, not self.own] if both else [self.own]
        self.floating = {n: p for n, p in parameters.items() if p.is_floating_point()}
        # Tensors of the inputs that no container shows: their values are not known.
        self.state = {id(t) for t in tensors_in((inputs.args, inputs.kwargs))}
        self.buffers = buffers
        self.examples: dict[bool, Inputs] = {}
        # What the first real call called, by mode.
        self.seen: dict[bool, list[str] | None] = {}
        self.recorders: list[Recorder] = []
        # Per graph, attributes that forward makes of parameters alone; whether a later call may
        # read one before it is made again.
        self.made: list[dict[Symbol, str]] = []
        self.stale = False
        self.rehearsal = rehearsal
        if rehearsal is not None:
            rehearsal.snapshot = before
        # Whether a real run in the model's own mode calls more than was recorded, or may.
        self.reads = True

    def graphs(self) -> list[Graph]:
        """One graph per mode and per call that differs from the first."""
        later: dict[bool, Snapshot] = {}
        self.examples = dict.fromkeys(self.modes, self.inputs)
        if self.real:
            for mode in self.modes:
                self.examples[mode] = self._warm_up(mode, later)
        found: list[Graph] = []
        for mode in self.modes:
            found += self._recorded(mode, self.examples[mode], later.get(mode))
        if self.stale:
            for graph, made in zip(found, self.made, strict=True):
                graph.leaving.update(dict.fromkeys(made, "a tensor that forward leaves behind"))
        return found

    @property
    def derived(self) -> frozenset[str]:
        """Attributes that every call makes anew of parameters alone."""
        return frozenset() if self.stale else frozenset(n for m in self.made for n in m.values())

    def release(self) -> None:
        """No fake tensor stays behind anywhere."""
        for recorder in self.recorders:
            recorder.ledger.release()

    def _warm_up(self, mode: bool, later: dict[bool, Snapshot]) -> Inputs:
        """Run for real; note what the call changes, and put the model back."""
        chance = {"Python's random": random.getstate, "NumPy's random": _numpy_state}
        states = {what: read() for what, read in chance.items()}
        try:
            inputs, self.seen[mode] = self._run(mode)
            for what, read in chance.items():
                if read() != states[what]:
                    raise draws(self.name, what)
            written = self.before.written()
            changes = self.before.changed(written)
            self.state |= written
            if mode == self.own and self.rehearsal is not None:
                self.rehearsal.written, self.rehearsal.changes = written, changes
            if any(not c.in_place and c.attribute != "training" for c in changes):
                later[mode] = Snapshot(self.model, self.before.kept)
        finally:
            self.before.restore()
        return inputs

    def _run(self, mode: bool) -> tuple[Inputs, list[str] | None]:
        """Run for real on inputs that fit, and what that called (None: it can't be watched)."""
        tries = [self.inputs]
        if mode != self.own and (more := doubled(self.inputs)) is not None:
            tries.append(more)  # a batch norm in train mode refuses a batch of one
        for inputs in tries:
            others = mode != self.own and self.rehearsal is not None
            for values in [rolled(inputs), inputs] if others else [inputs]:
                try:
                    return inputs, self._watched(mode, values)
                except Exception:
                    self.before.restore()
            try:
                for parameter in self.floating.values():
                    self.before.keep(parameter)  # nobody watches what is written
                self.set_mode(mode)
                given = copied(inputs)
                with torch.no_grad(), plain_arithmetic(), callers_device():
                    self.model(*given.args, **given.kwargs)
                return inputs, None
            except Exception as error:
                self.before.restore()
                if inputs is tries[-1]:
                    raise failed(self.name, mode, mode == self.own, self.inputs, error) from error
        raise AssertionError

    def _watched(self, mode: bool, inputs: Inputs) -> list[str]:
        """Run for real, with gradients where the record has none; what that called."""
        self.set_mode(mode)
        given = copied(inputs)
        own = {id(t) for t in self._tensors().values()}
        reads = Reads(lambda tensor: None, True, own)
        # Fast kernels: they change what is inside of an operation, not which one is called.
        fast = torch.backends.mkldnn.flags(enabled=torch._C._get_mkldnn_enabled())
        first = None if self.recorders else self.rehearsal
        run: Run = self.fake.run
        if first is not None:
            run = first.begun(self.model, run, mode == self.own)
        with (
            below_autograd(gradients=True),
            fast,
            Witness(run, self.before.keep) as witness,
            reads,
        ):
            out = self.model(*given.args, **given.kwargs)
        if first is not None:
            first.ended(self.model, out, mode)
        return witness.seen

    def set_mode(self, mode: bool) -> None:
        """The model's own mode is taken as found (a batch norm frozen in eval mode stays so)."""
        if mode != self.own:
            self.model.train(mode)

    def _recorded(self, mode: bool, inputs: Inputs, later: Snapshot | None) -> list[Graph]:
        found = self._witnessed(mode, inputs, self.before, self.seen.get(mode))
        if later is not None:
            later.restore()
            try:
                found += self._witnessed(mode, inputs, later, None)
            finally:
                self.before.restore()
        return found

    def _witnessed(
        self, mode: bool, inputs: Inputs, start: Snapshot, seen: list[str] | None
    ) -> list[Graph]:
        """The record of a call from here, held against what a real one calls.

        Two where the gradient mode makes a difference; refused where what is recorded is not what
        runs.
        """
        graph = self._record(mode, inputs, start)
        if mode == self.own and start is self.before:
            self.reads = seen != self.recorders[-1].seen
        if not self.real or (seen is not None and agree(seen, self.recorders[-1].seen)):
            return [graph]
        try:
            # Once more: what lives in caches and globals was not there the first time.
            seen = self._watched(mode, inputs)
        except Exception as error:
            raise failed(self.name, mode, mode == self.own, self.inputs, error) from error
        finally:
            start.restore()
        if agree(seen, self.recorders[-1].seen):
            return [graph]
        other = self._record(mode, inputs, start, gradients=True)
        if agree(seen, self.recorders[-1].seen):
            return [graph, other]
        raise differs(self.name, mode, seen, self.recorders[-1].seen)

    def _check_settled(self, start: Snapshot) -> None:
        """After a second call: what still changes must be tensors, which are pinned."""
        changing = [c for c in start.changed() if c.plain and c.attribute != "training"]
        if changing:
            where = changing[0].path or type(self.model).__name__
            raise CaptureError(
                f"{type(self.model).__name__} can't be captured: every call changes "
                f"'{changing[0].attribute}' of '{where}' ({changing[0].what}), so that what one "
                f"call does need not be what the next one does. Supported: modules whose calls "
                f"change tensors only. Keep what counts calls outside forward."
            )

    def _record(
        self, mode: bool, inputs: Inputs, start: Snapshot, gradients: bool = False
    ) -> Graph:
        for _ in range(4):  # each round knows more of what a call changes
            self.set_mode(mode)
            try:
                recorder, graph = self._recording(mode, inputs, gradients)
                old = start.replaced() | (start.tensors() - self.before.tensors())
                unknown = (start.replaced() | recorder.ledger.changed()) - self.state
                if start is not self.before:
                    self._check_settled(start)
            finally:
                start.restore()
            if not unknown & recorder.ledger.read_as_constants():
                self.stale = self.stale or bool(old & recorder.ledger.read_from_outside())
                return graph
            self.made.pop()
            self.state |= unknown
        raise CaptureError(
            f"{type(self.model).__name__} can't be captured: every call leaves other tensors "
            f"behind than the one before. Keep what lives between calls in buffers."
        )

    def _recording(self, mode: bool, inputs: Inputs, gradients: bool) -> tuple[Recorder, Graph]:
        model, tensors = self.model, self._tensors()
        ledger = Ledger(
            self.fake,
            {id(t): n for n, t in tensors.items()},
            frozenset(id(p) for n, p in tensors.items() if n in self.floating),
            frozenset(self.state),
        )
        recorder = Recorder(ledger, operations.known)
        self.recorders.append(recorder)
        symbols: list[Symbol] = []

        def faked(tensor: Tensor) -> Tensor:
            made, symbol = ledger.input(tensor)
            symbols.append(symbol)
            return made

        args, kwargs = pytree.tree_map_only(Tensor, faked, (inputs.args, inputs.kwargs))
        try:
            with (
                below_autograd(gradients),
                module_paths(ledger.module, model),
                self.fake,
                recorder,
            ):
                with Reads(recorder.refuse_values, gradients, ledger.named):
                    out = model(*args, **kwargs)
                if recorder.refused is not None:  # the model's own code has caught it
                    raise recorder.refused
                if self.fake.elsewhere:
                    raise CaptureError(ELSEWHERE)
        except Exception as error:
            raise self._refusal(mode, error) from error
        del args, kwargs
        with below_autograd(), self.fake:
            outputs, leaving, made = ledger.results(tensors_in(out), attributes(model))
        self.made.append(made)
        return recorder, graph_of(ledger, mode, symbols, floating(outputs), leaving)

    def _refusal(self, mode: bool, error: BaseException) -> CaptureError:
        found = explained(self.name, mode, self.inputs, error)
        if found is not None:
            return found
        if self.real:
            return not_recorded(self.name, mode, self.inputs, error)
        return failed(self.name, mode, mode == self.own, self.inputs, error)

    def _tensors(self) -> dict[str, Tensor]:
        """By name, as the model holds them now (stand-ins for what is on the meta device)."""
        parameters, _, _ = named_tensors(self.model)
        return {**self.buffers, **parameters}


def _numpy_state() -> tuple[bytes, object]:
    kind, words, *rest = np.random.get_state(legacy=True)
    return np.asarray(words).tobytes(), (kind, *rest)


@contextmanager
def _fake_for_meta(model: nn.Module) -> Iterator[Fakes]:
    """The mode of the run; fake CPU tensors stand for parameters on the meta device.

    Meta tensors would not mix with the inputs and buffers, and what forward makes on their device
    would have no values.
    """
    mode = Fakes(operations.known)
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    fakes: dict[int, nn.Parameter] = {}
    for _, _, parameter in places:
        if id(parameter) not in fakes:
            with mode:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                fakes[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    try:
        for module, name, parameter in places:
            module._parameters[name] = fakes[id(parameter)]
        yield mode
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter
