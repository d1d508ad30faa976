"""The path-kernel criterion: coefficients are diag(G) (METHOD section 3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pathlift.capture import Program
from pathlift.lifting.squared import diagonal


@dataclass(frozen=True)
class Coefficients:
    """What a criterion hands to the solver.

    Attributes:
        values: parameter name -> non-negative float64 tensor ``g`` of its shape, up to one common
            factor. Under rescaling ``g'_i = g_i * 2**(-2 (E s)_i)``.
        approximated: operations a stand-in was used for, with counts.
    """

    values: dict[str, Tensor]
    approximated: dict[str, int]


def path_kernel(program: Program) -> Coefficients:
    """``g = diag(dPhi^T dPhi)``; smooth operations pass paths like the identity (noted)."""
    values, _, approximated = diagonal(program, program.training, strict=False)
    return Coefficients(values, approximated)
