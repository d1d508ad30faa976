"""A place for scales that no criterion fixes: the one with logarithms of weights nearest to 0.

Minimises ``sum_i (log2 |theta_i| + (E s)_i)^2`` over the entries that are not zero. Its solution
moves against a rescaling: at ``theta 2^(E t)`` it is ``s - t``. So members of an orbit meet there,
also along the scales of dead channels, where the path kernel has no say.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pathlift.solve.matrix import Array
from pathlift.symmetry.group import RescalingGroup
from pathlift.symmetry.rows import ParameterScales

_ACCURACY = 1e-13
_STEPS = 2000


def level_scales(group: RescalingGroup, value: Callable[[str], Tensor]) -> Array:
    """Log2 scales ``(H,)`` at which the logarithms of all weights are nearest to 0.

    ``value``: a tensor of the group by its name. A scale that meets zeros alone stays at 0.
    """
    moving = {n: s for n, s in group.parameters.items() if s.terms}
    logs = {n: value(n).detach().to("cpu", torch.float64).abs().log2() for n in moving}
    live = {n: torch.isfinite(v) for n, v in logs.items()}

    def gathered(parts: dict[str, Tensor]) -> Array:
        """``E^T`` times entries of every tensor."""
        total = np.zeros(group.basis.shape[0])
        for name, spec in moving.items():
            total += _gathered(spec, parts[name], len(total))
        return np.asarray(group.basis.T @ total)

    def moved(scales: Array) -> dict[str, Tensor]:
        factors = group.factors(scales)
        return {n: sum(factors.get(n, []), torch.zeros(())) * live[n] for n in moving}

    def normal(scales: Array) -> Array:
        return gathered(moved(scales))

    from scipy.sparse import linalg  # 50 ms, for canonical forms alone

    h = group.num_scales
    squares = _squared_counts(group, moving, live)
    inverse = 1.0 / np.where(squares > 0, squares, 1.0)
    matrix = linalg.LinearOperator((h, h), matvec=normal, dtype=np.float64)
    jacobi = linalg.LinearOperator((h, h), matvec=lambda r: inverse * r, dtype=np.float64)
    aim = -gathered({n: torch.where(live[n], logs[n], 0.0) for n in moving})
    found, _ = linalg.cg(matrix, aim, rtol=_ACCURACY, maxiter=_STEPS, M=jacobi)
    return np.asarray(found)


def _gathered(spec: ParameterScales, entries: Tensor, size: int) -> Array:
    total = np.zeros(size)
    for coefficient, ids in spec.terms:
        sums = entries.expand(spec.shape).sum_to_size(ids.shape).reshape(-1).numpy()
        total += coefficient * np.bincount(ids.reshape(-1).numpy(), sums, minlength=size)
    return total


def _squared_counts(
    group: RescalingGroup, moving: dict[str, ParameterScales], live: dict[str, Tensor]
) -> Array:
    """About the diagonal of the normal matrix: entries that each scale moves."""
    total = np.zeros(group.basis.shape[0])
    for name, spec in moving.items():
        for coefficient, ids in spec.terms:
            sums = live[name].double().sum_to_size(ids.shape).reshape(-1).numpy()
            ids_flat = ids.reshape(-1).numpy()
            total += coefficient**2 * np.bincount(ids_flat, sums, minlength=len(total))
    squared = group.basis.copy()
    squared.data = squared.data**2
    return np.asarray(squared.T @ total)
