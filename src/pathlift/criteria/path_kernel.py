"""The path-kernel criterion: coefficients are diag(G) (METHOD section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from pathlift.capture import Program
from pathlift.criteria.protocol import Coefficients
from pathlift.lifting.squared import diagonal


def path_kernel(program: Program) -> Coefficients:
    """``g = diag(dPhi^T dPhi)``; smooth operations pass paths like the identity (noted).

    Everything summed is positive, so float32 gives g to about 1e-6 relative, and single precision
    is several times faster than double. What it can't represent is repeated in float64.
    """
    narrow = all(
        p.dtype != torch.float64 for p in program.parameters.values() if p.is_floating_point()
    )
    values, _, approximated = diagonal(
        program,
        program.training,
        strict=False,
        dtype=torch.float32 if narrow else torch.float64,
    )
    if narrow and not all(_in_range(g) for g in values.values()):
        values, _, approximated = diagonal(program, program.training, strict=False)
    return Coefficients(values, approximated)


def _in_range(g: Tensor) -> bool:
    if not g.numel():
        return True
    low, high = (float(v) for v in g.aminmax())
    return low > 1e-36 and high < 1e36
