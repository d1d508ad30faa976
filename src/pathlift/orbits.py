"""One point per orbit: whether two checkpoints are the same network up to rescaling.

The continuous optimum of the path kernel is unique, so all networks that rescaling turns into each
other end at the same weights. That point is a canonical form, and the distance of two canonical
forms says how far two networks are from being one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pathlift.condition import Solved, Understood, solved, understood
from pathlift.conditioner import Conditioner
from pathlift.criteria import path_kernel
from pathlift.errors import ArgumentError
from pathlift.homes.sharded import home_of
from pathlift.report import ConditioningReport
from pathlift.settings import Settings
from pathlift.surroundings import apart
from pathlift.tensors.rescale import multiply_
from pathlift.text import columns

# Up to this relative distance two canonical forms are the same: what float32 leaves of one point.
SAME = 1e-5
# Far below the accuracy of conditioning: the point itself is what is asked for.
_TOL = 1e-10
_SETTINGS = Settings(
    path_kernel, exact=False, tol=_TOL, on_nothing="ignore", canonical=True, verify=True
)


@apart
def canonical_(
    model: nn.Module, example_inputs: object, *, batch_norm: str = "pinned"
) -> ConditioningReport:
    """Rescale ``model`` in place to the canonical form of its orbit.

    That is the continuous minimiser of the imbalance of the path kernel, with every parameter
    counted, trained or frozen. Where ``F`` says nothing (scales of dead channels, behind a layer of
    zeros say), it is the point at which the logarithms of all weights have the least sum of
    squares; going there may raise the imbalance. Permutations of channels and signs are symmetries
    of another kind: two networks that differ by them have different canonical forms.

    Args:
        model, example_inputs, batch_norm: see :func:`pathlift.condition_`. The group is that of
            ``batch_norm``.

    Returns:
        The report; scales at bounds, in its warnings, say that the form is not reached.

    Raises:
        ArgumentError, CaptureError, VerificationError: see :func:`pathlift.condition_`; the model
            is unchanged.

    >>> import pathlift, torch
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> report = pathlift.canonical_(model, torch.zeros(1, 4))
    >>> bool(pathlift.canonical_(model, torch.zeros(1, 4)).log2_scales.abs().max() < 1e-5)
    True
    """
    return Conditioner(model, example_inputs, batch_norm=batch_norm).conditioned(_SETTINGS)


@dataclass(frozen=True)
class OrbitDistance:
    """How far two networks are from being the same up to rescaling; prints as a table.

    Attributes:
        distances: name of a parameter or floating-point buffer -> distance of the canonical forms
            ``|a - b| / max(|a|, |b|)``, Frobenius norms; 0 where both are zero.
        largest: the largest of them.
        same: whether that is at most 1e-5.
        notes: what makes the comparison less than certain, in words: scales at bounds, a solver
            that stopped short.

    >>> import pathlift, torch
    >>> a, b = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
    >>> distance = pathlift.orbit_distance(a, b, torch.zeros(1, 4))
    >>> distance.same, sorted(distance.distances)
    (False, ['bias', 'weight'])
    """

    distances: dict[str, float]
    largest: float
    same: bool
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return {
            "same": self.same,
            "largest": self.largest,
            "distances": dict(self.distances),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        verdict = (
            f"the same network up to rescaling: canonical forms agree to {self.largest:.1e}"
            if self.same
            else f"different networks: canonical forms are up to {self.largest:.3g} apart"
        )
        worst = sorted(self.distances.items(), key=lambda pair: -pair[1])
        rows = [("tensor", "distance"), *((n, f"{d:.3g}") for n, d in worst)]
        return "\n".join([verdict, *(f"note: {n}" for n in self.notes), columns(rows, None)])


@apart
def orbit_distance(
    a: nn.Module, b: nn.Module, example_inputs: object, *, batch_norm: str = "pinned"
) -> OrbitDistance:
    """Whether two networks of one structure are the same up to rescaling, and how far they differ.

    Compares the canonical forms (:func:`canonical_`), tensor by tensor; neither model is changed.

    Args:
        a, b: with parameters and buffers of the same names and shapes.
        example_inputs, batch_norm: see :func:`canonical_`.

    Raises:
        ArgumentError: tensors of other names or shapes.
        CaptureError: see :func:`pathlift.condition_`.

    >>> import copy, pathlift, torch
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
    ... )
    >>> x, other = torch.zeros(1, 4), copy.deepcopy(model)
    >>> pathlift.rescaling_group(other, x).rescale_(other, torch.arange(8.0) - 4)
    >>> pathlift.orbit_distance(model, other, x).same
    True
    """
    forms, notes = [], []
    for name, model in (("the first", a), ("the second", b)):
        known = understood(home_of(model), example_inputs, batch_norm, {})
        found = solved(known, _SETTINGS, {})
        forms.append(_form(known, found))
        notes += [f"{name} network: {text}" for text in _doubts(found)]
    first, second = forms
    if {n: t.shape for n, t in first.items()} != {n: t.shape for n, t in second.items()}:
        odd = next(
            n
            for n in [*first, *second]
            if n not in first or n not in second or first[n].shape != second[n].shape
        )
        raise ArgumentError(
            f"the networks differ in '{odd}': it is missing in one of them or has another shape. "
            f"Give two models of one structure, such as two checkpoints of one architecture."
        )
    distances = {n: _distance(t, second[n]) for n, t in first.items()}
    largest = max(distances.values(), default=0.0)
    return OrbitDistance(distances, largest, largest <= SAME, notes)


def _form(known: Understood, found: Solved) -> dict[str, Tensor]:
    """Every floating-point tensor of the canonical form, float64 on the CPU."""
    factors = known.group.factors(found.solution.log2_scales)
    program = known.program
    form = {n: program.value(n) for n in program.parameters} | program.buffers
    made: dict[str, Tensor] = {}
    for name, tensor in form.items():
        if not tensor.is_floating_point():
            continue
        made[name] = tensor.detach().to("cpu", torch.float64, copy=True)
        if name in factors:
            multiply_(made[name], factors[name])
    return made


def _doubts(found: Solved) -> list[str]:
    doubts = []
    solution = found.solution
    if not solution.converged:
        doubts.append(f"the solver stopped short: {solution.reason or 'tolerance not reached'}")
    if len(solution.at_bounds):
        doubts.append(f"{len(solution.at_bounds):,} scales are held at the bounds of their dtype")
    return doubts


def _distance(a: Tensor, b: Tensor) -> float:
    size = max(float(a.norm()), float(b.norm()))
    gap = float((a - b).norm())
    return gap / size if np.isfinite(size) and size > 0 else gap
