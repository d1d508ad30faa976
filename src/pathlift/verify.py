"""Before and after: the outputs of the real model, and what they say when they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pathlift.capture.inputs import tensors_in
from pathlift.capture.names import preserved
from pathlift.capture.program import Program
from pathlift.errors import VerificationError
from pathlift.homes.home import Home
from pathlift.symmetry.group import RescalingGroup
from pathlift.tensors.rescale import Undo

# Per captured mode, every tensor of the output.
Outputs = list[list[Tensor]]


def outputs(home: Home, program: Program) -> Outputs | None:
    """Outputs of the real model in every captured mode, with buffers and random state restored.

    None if there is no model to run.
    """
    model, found = home.model, []
    if model is None:
        return None
    with preserved(model), torch.no_grad():
        buffers = [(b, b.clone()) for b in program.buffers.values()]
        own = model.training
        for graph in program.graphs:
            if graph.training != own:
                model.train(graph.training)
            torch.manual_seed(0)
            try:
                out = model(*program.inputs.args, **program.inputs.kwargs)
                found.append([t.detach().clone() for t in tensors_in(out)])
            finally:
                for buffer, value in buffers:
                    buffer.copy_(value)
    home.settle()
    return found


def compared(
    home: Home,
    program: Program,
    group: RescalingGroup,
    scales: NDArray[Any],
    before: Outputs,
    undo: Undo,
    exact: bool,
) -> float:
    """The largest change of an output on any process, now that the scales are applied.

    Args:
        before: the outputs before.
        undo: takes the scales back; called if anything fails.
        exact: whether every bit has to be kept.

    Raises:
        VerificationError: exact, and the outputs differ; the model is as before.
    """
    try:
        after = outputs(home, program)
        assert after is not None
        worst = home.worst(largest_change(before, after))
        if exact and worst > 0:
            raise VerificationError(
                f"the rescaled network's outputs differ by up to {worst:.3g} although all scales "
                f"are powers of two. An activation may leave the range of its dtype, or forward "
                f"may not be deterministic. The model has been restored; try a wider dtype, or "
                f"exact=False."
            )
    except BaseException:
        undo()
        raise
    return worst


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
