"""The path-kernel criterion: coefficients are diag(G) (METHOD section 3)."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from pathlift.capture.program import Program
from pathlift.criteria.protocol import Criterion, Sink
from pathlift.lifting.lifted import stream_diagonal
from pathlift.lifting.samples import batch_statistics
from pathlift.tensors.alike import fetched
from pathlift.tensors.product import Product


def _hand_on(program: Program, sink: Sink) -> dict[str, int]:
    """``diag(G)``. Everything summed is positive, so float32 gives g to about 1e-6 relative, and
    single precision is several times faster than double. What it can't represent is repeated in
    float64."""
    narrow = all(
        p.dtype != torch.float64 for p in program.parameters.values() if p.is_floating_point()
    )
    statistics = batch_statistics(program, program.training)
    if narrow:

        def checked(name: str, g: Tensor | Product) -> None:
            if not _in_range(g):
                raise _LeavesRange
            sink(name, g)

        # What was handed on before the range was left comes again.
        with suppress(_LeavesRange):
            _, approximated = stream_diagonal(
                program, program.training, checked, False, torch.float32, statistics, sink
            )
            return approximated
    _, approximated = stream_diagonal(
        program, program.training, sink, strict=False, statistics=statistics
    )
    return approximated


class _LeavesRange(Exception):
    """Single precision can't hold a coefficient."""


# ``g = diag(dPhi^T dPhi)``; smooth operations pass paths like the identity (noted).
path_kernel = Criterion(_hand_on)


def _in_range(g: Tensor | Product) -> bool:
    if not g.numel():
        return True
    low, high = g.bounds() if isinstance(g, Product) else fetched(g.aminmax())
    return low > 1e-36 and high < 1e36
