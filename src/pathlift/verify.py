"""Before and after: everything the real model shows, and what is to blame when it differs.

Both modes are looked at, one of them on other values than the example's; where a call may see what
the one before has left, or other values make it another one, the model's own mode over two calls in
a row. Compared is everything that leaves: outputs of any kind, buffers, and tensors left in
attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathlift.blame import explained, smallest
from pathlift.capture.inputs import rolled
from pathlift.capture.program import Inputs, Program, symbols_in
from pathlift.capture.shown import Rehearsal, Shown, lasts, seed, shown
from pathlift.errors import RangeError, VerificationError
from pathlift.homes.home import Home
from pathlift.homes.snapshot import Snapshot
from pathlift.surroundings import callers_device, plain_arithmetic
from pathlift.symmetry.group import RescalingGroup
from pathlift.tensors.alike import alike, gaps
from pathlift.tensors.rescale import Undo

# Per run, every tensor that can be seen after it.
Outputs = list[list[Tensor]]

# What rounding may change, relative to the largest entry of a tensor, where scales are continuous.
TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


def moved_buffers(group: RescalingGroup, program: Program) -> frozenset[str]:
    """Buffers that a group rescales: running statistics in its ``"invariant"`` form."""
    return frozenset(n for n in group.parameters if n in program.buffers)


class View:
    """The real model, run and put back: what it shows in both modes, before and after.

    The model's own mode is run on the example inputs, the other mode on other values. Where a call
    may see what the one before has left, or other values make it another one, the model's own mode
    is run twice in a row, the second time on other values, and the other mode after it; else each
    mode is run from the model as it is.

    Args:
        home, program: the model, and what is known of it.
        moved: names of buffers that the rescaling moves, which are not compared.
        first: the capture's own runs, if nothing has changed since.
    """

    def __init__(
        self,
        home: Home,
        program: Program,
        moved: frozenset[str] = frozenset(),
        first: Rehearsal | None = None,
    ) -> None:
        self.home, self.program, self.moved = home, program, moved
        self._written = [program.parameters[n] for n in program.written if n in program.parameters]
        # One serves for all looks where none of what it remembers is rescaled in between.
        self._lasting = not moved and not self._written and home.model is home.structure
        self._snapshot: Snapshot | None = None
        self.shown: Mapping[bool, Shown] = {}
        if first is not None and self._lasting:
            self.shown = first.stands_for(program)
            # What a capture could not watch it remembers whole, parameters too: those will move.
            if first.snapshot is not None and not first.snapshot.kept:
                self._snapshot = first.snapshot

    def forget(self) -> None:
        """What the capture has shown, so that the next look is a new one."""
        self.shown, self._snapshot = {}, None

    def look(self, before: Outputs | None = None) -> Outputs | None:
        """What the model shows now; None if there is no model to run.

        Args:
            before: what it showed before, by as many runs; None: by as many as it takes.
        """
        model, program = self.home.model, self.program
        if model is None:
            return None
        known = self.shown if before is None else {}
        found: Outputs = []
        skipped = frozenset(id(b) for n, b in program.buffers.items() if n in self.moved)
        modes = list(dict.fromkeys(g.training for g in program.graphs))
        with plain_arithmetic(), self._snapshot or Snapshot(model, self._written) as start:
            if self._lasting:
                self._snapshot = start

            def show(inputs: Inputs, instead: Inputs) -> None:
                seed(model)
                seen = shown(model, _run(model, inputs, instead))
                found.append(seen.without(skipped, program.derived))

            for mode in modes:
                inputs = program.examples.get(mode, program.inputs)
                if mode in known:
                    found.append(known[mode].without(skipped, program.derived))
                elif mode != program.training:
                    model.train(mode)
                    show(rolled(inputs), inputs)
                else:
                    show(inputs, inputs)
                    if before is None:
                        written = start.written()
                        again = lasts(program, start.changed(written), written)
                    else:
                        again = len(before) > len(modes)
                    if again:
                        show(rolled(inputs), inputs)
                    elif mode != modes[-1]:
                        start.restore()
        self.home.settle()
        return found


@dataclass(frozen=True)
class Applied:
    """Scales of a group that a home's parameters were just multiplied by.

    Attributes:
        view: of the model.
        undo: takes them back.
        exact: whether every bit has to be kept.
        slack: by how much a relative change may exceed :data:`TOLERANCES` where it is not exact.
    """

    view: View
    group: RescalingGroup
    scales: NDArray[Any]
    undo: Undo
    exact: bool
    slack: float = 1.0

    @property
    def home(self) -> Home:
        """Where the parameters are."""
        return self.view.home

    @property
    def program(self) -> Program:
        """What is known of the model."""
        return self.view.program

    def times(self, before: Outputs, now: Outputs) -> float:
        """The largest change on any process, in units of what rounding may change."""
        return self.home.worst(excess(before, now, _coarsest(self.program))) / self.slack

    def fails(self, before: Outputs, now: Outputs) -> bool:
        """Whether what the model shows has changed by more than it may, on any process."""
        if self.exact:
            return self.home.worst(largest_change(before, now)) > 0
        return self.times(before, now) > 1


def _run(model: nn.Module, inputs: Inputs, instead: Inputs) -> Any:
    """The model's output; other values may not fit a model (offsets, lengths): then ``instead``."""
    for k, one in enumerate((inputs, instead)):
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: t.detach().clone(), (one.args, one.kwargs)
        )
        try:
            # Within: what a snapshot puts back includes the grad mode that it was made in.
            with torch.no_grad(), callers_device():
                return model(*args, **kwargs)
        except Exception as error:
            if k or inputs is instead:
                raise VerificationError(
                    f"the model does not run any more on the inputs that it was captured on: "
                    f"{type(error).__name__}: {_first_line(error)}. It is as "
                    f"before; make sure that forward can be called several times in a row."
                ) from error
    raise AssertionError


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "").rstrip(".")


def looked(applied: Applied, before: Outputs) -> Outputs:
    """What the model shows now that scales are applied; they are taken back if it does not run."""
    try:
        return _now(applied, before)
    except BaseException:
        applied.undo()
        raise


def compared(applied: Applied, before: Outputs, now: Outputs) -> float:
    """The largest change of an output on any process.

    Args:
        applied: the scales; taken back if anything fails.
        before: the outputs before.
        now: the outputs with the scales applied.

    Raises:
        VerificationError: the outputs differ by more than they may; the model is as before.
    """
    worst = applied.home.worst(largest_change(before, now))
    if not applied.fails(before, now):
        return worst
    applied.undo()
    why = "all scales are powers of two" if applied.exact else "rounding explains far less"
    advice = "try a wider dtype, or exact=False" if applied.exact else "try exact=True"
    raise VerificationError(
        f"the rescaled network's outputs differ by up to {worst:.3g} although {why}. "
        f"{_reason(applied, before)} The model has been restored; {advice}."
    )


def taken_back(applied: Applied, before: Outputs, now: Outputs) -> tuple[float, float]:
    """Take continuous scales back where outputs change by more than rounding explains.

    Returns:
        The largest change of an output on any process, and the largest in units of what rounding
        may change; above 1, the scales were taken back.
    """
    worst = applied.home.worst(largest_change(before, now))
    times = applied.times(before, now)
    if times > 1:
        applied.undo()
    return worst, times


def _now(applied: Applied, before: Outputs) -> Outputs:
    now = applied.view.look(before)
    assert now is not None
    return now


def _reason(applied: Applied, before: Outputs) -> str:
    """Why outputs differ, found by looking again with nothing and with parts of the scales."""
    home, scales = applied.home, applied.scales
    again = home.worst(largest_change(before, _now(applied, before)))
    if again > 0:
        return (
            f"Forward is not deterministic: the unchanged model's outputs differ by up to "
            f"{again:.3g} from one run to the next."
        )

    def fails(some: list[int]) -> bool:
        part = np.zeros_like(scales)
        part[some] = scales[some]
        try:
            undo = home.multiply_(applied.group.factors(part))
        except RangeError:
            return False
        try:
            return applied.fails(before, _now(applied, before))
        finally:
            undo()

    found = smallest(np.flatnonzero(scales).tolist(), fails)
    return (
        f"{explained(applied.group, applied.program, found)} An activation may leave the range of "
        f"its dtype there, or an operation does not do what it was taken for."
    )


def _coarsest(program: Program) -> float:
    """The tolerance of the narrowest floating-point type that the program computes in."""
    found = {s.dtype for g in program.graphs for c in g.calls for s in symbols_in(c.outputs)}
    return max((TOLERANCES[d] for d in found if d in TOLERANCES), default=0.0)


def largest_change(before: Sequence[Sequence[Tensor]], after: Sequence[Sequence[Tensor]]) -> float:
    """The largest absolute difference of an output; 0.0 if all bits agree (NaN agrees with NaN)."""
    changes = _changes(before, after)
    return float("inf") if changes is None else max((gap for _, gap, _ in changes), default=0.0)


def excess(
    before: Sequence[Sequence[Tensor]], after: Sequence[Sequence[Tensor]], least: float = 0.0
) -> float:
    """The largest change of a floating-point tensor, relative to its size and :data:`TOLERANCES`.

    ``least``: a tolerance that is granted to every tensor.
    """
    changes = _changes(before, after)
    if changes is None:
        return float("inf")
    relative = (
        gap / max(size * max(TOLERANCES[tensor.dtype], least), 1e-300)
        for tensor, gap, size in changes
        if tensor.dtype in TOLERANCES
    )
    return max(relative, default=0.0)


def _changes(
    before: Sequence[Sequence[Tensor]], after: Sequence[Sequence[Tensor]]
) -> list[tuple[Tensor, float, float]] | None:
    """Tensors that changed, by how much, and their sizes; None if there are others than before."""
    if [len(x) for x in before] != [len(x) for x in after]:
        return None
    pairs = [p for x, y in zip(before, after, strict=True) for p in zip(x, y, strict=True)]
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        return None
    changed = [p for p, same in zip(pairs, alike(pairs), strict=True) if not same]
    return [(a, *found) for (a, _), found in zip(changed, gaps(changed), strict=True)]
