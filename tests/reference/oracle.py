"""The number of all diagonal rescaling symmetries of a small network, from its derivatives alone.

A direction ``d`` (one entry per parameter entry) is a rescaling symmetry if moving every parameter
as ``theta_i -> theta_i exp(t d_i)`` changes no output, for all inputs and *all* parameters:
``J(x; theta) diag(theta) d = 0``. Stacked over many random inputs and parameters, with every block
scaled to norm 1, the null space has the dimension of all such directions. At a single theta every
symmetry, also a non-diagonal one, would be counted; over many only the constant ones remain.

A parameter entry without any effect (a key bias under softmax) is a null direction of its own and
is counted apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from pathlift.capture.inputs import tensors_in
from pathlift.capture.names import named_tensors

_RELATIVE_TOLERANCE = 1e-9
_SAMPLES = 24


@dataclass(frozen=True)
class Symmetries:
    """What the oracle finds.

    ``dimension``: of the symmetries among entries with an effect. ``active``: which entries (of
    all moved tensors in turn) have one. ``derivatives``: stacked ``J diag(theta)``, rows of blocks
    of norm 1. ``gap``: smallest singular value kept / largest dropped, how clear the count is.
    """

    dimension: int
    active: Tensor
    derivatives: Tensor
    gap: float

    def violation(self, directions: Tensor) -> float:
        """Largest derivative along ``directions`` (entries, k): 0 for symmetries."""
        if not directions.shape[1]:
            return 0.0
        return float((self.derivatives @ directions).abs().max())


def diagonal_symmetries(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    buffers: Sequence[str] = (),
    modes: Sequence[bool] = (False, True),
    seed: int = 0,
) -> Symmetries:
    """Count the symmetries common to ``modes`` (evaluation, training).

    Args:
        model: converted to float64 in place; every parameter is drawn anew at every sample.
        inputs: example inputs; floating-point ones are drawn anew at every sample.
        buffers: buffers the rescaling touches, counted as parameters.
    """
    model = model.double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    parameters, all_buffers, _ = named_tensors(model)
    names = [n for n, p in parameters.items() if p.is_floating_point()]
    moved = {n: parameters[n].detach() for n in names} | {n: all_buffers[n] for n in buffers}
    fixed = {n: b for n, b in all_buffers.items() if n not in moved}
    sizes = {n: t.numel() for n, t in moved.items()}
    total = sum(sizes.values())
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    # Many parameters matter more than many outputs at each: a random sample of the rows of one
    # Jacobian will do.
    height, samples = 0, 0
    while samples < _SAMPLES or height < 1.5 * total:
        samples += 1
        for mode in modes:
            model.train(mode)
            theta = {n: _draw(t, n, generator) for n, t in moved.items()}
            fresh = tuple(
                4 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
                if x.is_floating_point()
                else x
                for x in inputs
            )
            block = _jacobian(model, theta, fixed, fresh, seed)
            block = block * torch.cat([t.reshape(-1) for t in theta.values()])
            pick = torch.randperm(block.shape[0], generator=generator)
            block = block[pick[: 10 + total // 4]]
            height += block.shape[0]
            norm = block.norm()
            if norm > 0:
                rows.append(block / norm)
    model.eval()
    stacked = torch.cat(rows)
    columns = stacked.norm(dim=0)
    active = columns > _RELATIVE_TOLERANCE * columns.max()
    kept = stacked[:, active] / columns[active]  # symmetric directions are reweighted, not lost
    values = torch.linalg.svdvals(kept)
    cut = _RELATIVE_TOLERANCE * float(values[0])
    rank = int((values > cut).sum())
    below = values[rank:]
    gap = float(values[rank - 1] / below.max().clamp_min(1e-300)) if len(below) else float("inf")
    return Symmetries(kept.shape[1] - rank, active, stacked, gap)


def _draw(like: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Entries of both signs, away from 0 (variances positive)."""
    size = 0.4 + torch.rand(like.shape, generator=generator, dtype=torch.float64)
    if name.endswith("running_var"):
        return size
    sign = torch.randint(0, 2, like.shape, generator=generator) * 2 - 1
    return size * sign


def _jacobian(
    model: nn.Module,
    theta: dict[str, Tensor],
    fixed: dict[str, Tensor],
    inputs: tuple[Tensor, ...],
    seed: int,
) -> Tensor:
    def flat(theta: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(seed)
        copies = {n: b.clone() for n, b in fixed.items()}
        out = functional_call(model, {**theta, **copies}, inputs, tie_weights=True)
        return torch.cat([t.reshape(-1) for t in tensors_in(out) if t.is_floating_point()])

    parts = jacrev(flat)(theta)
    return torch.cat([p.reshape(p.shape[0], -1) for p in parts.values()], dim=1).detach()
