"""Before and after: the outputs of the real model, and what they say when they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathlift.blame import explained, smallest
from pathlift.capture import Program, tensors_in
from pathlift.errors import RangeError, VerificationError
from pathlift.homes.home import Home
from pathlift.homes.snapshot import Snapshot
from pathlift.symmetry.group import RescalingGroup
from pathlift.tensors.rescale import Undo

# Per captured mode, every tensor of the output.
Outputs = list[list[Tensor]]


def outputs(home: Home, program: Program) -> Outputs | None:
    """Outputs of the real model in every captured mode; what its runs leave behind is put back.

    Every run starts from the same state and the same random numbers. None if there is no model to
    run.
    """
    if home.model is None:
        return None
    found = []
    snapshot = Snapshot(home.model)
    for graph in program.graphs:
        try:
            found.append(_run(home.model, program, graph.training))
            home.settle()
        finally:
            snapshot.restore()
    return found


def _run(model: nn.Module, program: Program, training: bool) -> list[Tensor]:
    if training != model.training:
        model.train(training)
    torch.manual_seed(0)
    with torch.no_grad():
        out = model(*program.inputs.args, **program.inputs.kwargs)
    return [t.detach().clone() for t in tensors_in(out)]


@dataclass(frozen=True)
class Applied:
    """Scales of a group that a home's parameters were just multiplied by.

    ``undo`` takes them back.
    """

    home: Home
    program: Program
    group: RescalingGroup
    scales: NDArray[Any]
    undo: Undo


def compared(applied: Applied, before: Outputs, exact: bool) -> float:
    """The largest change of an output on any process, now that the scales are applied.

    Args:
        applied: the scales; taken back if anything fails.
        before: the outputs before.
        exact: whether every bit has to be kept.

    Raises:
        VerificationError: exact, and the outputs differ; the model is as before.
    """
    try:
        worst = _change_since(before, applied)
    except BaseException:
        applied.undo()
        raise
    if exact and worst > 0:
        applied.undo()
        raise VerificationError(
            f"the rescaled network's outputs differ by up to {worst:.3g} although all scales are "
            f"powers of two. {_reason(applied, before)} The model has been restored; try a wider "
            f"dtype, or exact=False."
        )
    return worst


def _change_since(before: Outputs, applied: Applied) -> float:
    now = outputs(applied.home, applied.program)
    assert now is not None
    return applied.home.worst(largest_change(before, now))


def _reason(applied: Applied, before: Outputs) -> str:
    """Why outputs differ, found by looking again with nothing and with parts of the scales."""
    home, scales = applied.home, applied.scales
    again = _change_since(before, applied)
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
            return _change_since(before, applied) > 0
        finally:
            undo()

    found = smallest(np.flatnonzero(scales).tolist(), fails)
    return (
        f"{explained(applied.group, applied.program, found)} An activation may leave the range of "
        f"its dtype there, or an operation does not do what it was taken for."
    )


def largest_change(before: Sequence[Sequence[Tensor]], after: Sequence[Sequence[Tensor]]) -> float:
    """The largest absolute difference of an output; 0.0 if all bits agree (NaN agrees with NaN)."""
    return max(
        (
            _change(a, b)
            for one, other in zip(before, after, strict=True)
            for a, b in zip(one, other, strict=True)
        ),
        default=0.0,
    )


def _change(a: Tensor, b: Tensor) -> float:
    if torch.equal(a, b) or (
        a.is_floating_point()
        and torch.equal(a.nan_to_num(), b.nan_to_num())
        and torch.equal(a.isnan(), b.isnan())
    ):
        return 0.0
    gap = (a.to(torch.float64) - b.to(torch.float64)).abs()
    return float(gap.nan_to_num(nan=float("inf")).max())
