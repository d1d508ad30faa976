"""Any network: the expected diagonal of the path kernel, and the scales that follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from pathlift.capture.model import capture
from pathlift.capture.program import Program
from pathlift.criteria import Coefficients
from pathlift.errors import ArgumentError, PathliftError
from pathlift.lifting.lifted import diagonal
from pathlift.solve import solve
from pathlift.solve.assemble import assemble
from pathlift.solve.bounds import extent_bounds
from pathlift.symmetry.group import RescalingGroup, infer_group
from pathlift.tensors.extents import extents
from pathlift.theory.chains import Array


def mean_squares(model: nn.Module) -> dict[str, float]:
    """Mean of the squares of each parameter tensor: the expected squares, read off a sample.

    Exact where all entries are equal (fresh norm layers); elsewhere good to about
    ``sqrt(2 / entries)``. Tied parameters stand under their first name.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.fill_(2), model[2].weight.fill_(3)
    >>> x = torch.zeros(1, 1)
    >>> pathlift.theory.mean_squares(model)
    {'0.weight': 4.0, '2.weight': 9.0}
    """
    return {
        n: float(p.detach().to(torch.float64).square().mean()) if p.numel() else 0.0
        for n, p in model.named_parameters()
        if p.is_floating_point()
    }


def expected_diagonal(
    model: nn.Module,
    example_inputs: object,
    squares: Mapping[str, float | Tensor] | None = None,
) -> dict[str, Tensor]:
    """``E g``, the expected diagonal of ``G = dPhi^T dPhi`` over independent random parameters.

    The squared network (METHOD section 2) on expected squares. Exact where entries of different
    tensors are independent and no path passes a tensor twice; within a tensor they may depend on
    each other (orthogonal matrices), because a path takes one entry of it.

    Args:
        model: gives the graph and the shapes; its parameters' values are used only where
            ``squares`` does not name them.
        example_inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
        squares: parameter name -> expected square, a number or a tensor that broadcasts to the
            parameter. Parameters not named, or all if None: :func:`mean_squares` of the model.

    Returns:
        parameter name -> float64 tensor of the parameter's shape, on the CPU.

    Raises:
        UnsupportedOperationError: an operation without paths (softmax, GELU …).
        PathliftError: the values exceed float64 (:func:`predict_log2_scales` has no such limit).
        ArgumentError: ``squares`` names an unknown parameter or holds a negative value.
        CaptureError: see :func:`pathlift.rescaling_group`.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.fill_(2), model[2].weight.fill_(3)
    >>> x = torch.zeros(1, 1)
    >>> expected = pathlift.theory.expected_diagonal(model, x, {"0.weight": 4.0, "2.weight": 9.0})
    >>> {n: float(g) for n, g in expected.items()}
    {'0.weight': 9.0, '2.weight': 4.0}
    """
    captured = capture(model, example_inputs, both=False)
    program = _expected_program(captured, squares)
    values, shift, _ = diagonal(program, program.training)
    peak = max((float(g.max()) for g in values.values() if g.numel()), default=0.0)
    if peak > 0 and math.log2(peak) + shift >= 1024:
        raise PathliftError(
            f"the expected diagonal reaches 2**{math.log2(peak) + shift:.0f}, beyond float64. "
            f"predict_log2_scales works up to a common factor and needs no such number."
        )
    half = int(shift) // 2  # in two steps: either factor alone stays in range
    return {n: g * 2.0**half * 2.0 ** (int(shift) - half) for n, g in values.items()}


def predict_log2_scales(
    model: nn.Module,
    example_inputs: object,
    squares: Mapping[str, float | Tensor] | None = None,
    *,
    tol: float = 1e-8,
) -> Tensor:
    """The log2 scales that conditioning is expected to find, from second moments alone.

    Solves the problem of :func:`pathlift.condition_` for :func:`expected_diagonal` in place of
    ``g``. Channels of one layer that the architecture does not tell apart get one scale. What a
    sample adds to it is its fluctuation around its own second moments, which is larger the fewer
    entries meet in a channel.

    Args:
        model, example_inputs, squares: see :func:`expected_diagonal`. Smooth activations are
            passed like the identity, as in :func:`pathlift.condition_`.
        tol: bound on the certificate ``max |dF/ds| / p``.

    Returns:
        ``(num_scales,)`` float64, not rounded, for ``rescaling_group(model, inputs).rescale_``.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> x = torch.zeros(2, 4)
    >>> pathlift.theory.predict_log2_scales(model, x).shape
    torch.Size([32])
    """
    captured = capture(model, example_inputs)
    program = _expected_program(captured, squares)
    values, _, _ = diagonal(program, program.training, strict=False)
    return torch.from_numpy(_solved(infer_group(captured), captured, values, tol))


def _solved(
    group: RescalingGroup, program: Program, values: Mapping[str, Tensor], tol: float
) -> Array:
    moving = {n: program.parameters[n] for n, s in group.parameters.items() if s.terms}
    lower, upper = extent_bounds(group, extents(moving))
    trainable = {n: p.requires_grad for n, p in program.parameters.items()}
    asked = Coefficients(dict(values))
    return solve(
        assemble(group, asked, trainable, lower=lower, upper=upper).problem, "newton", tol
    ).log2_scales


def _expected_program(program: Program, squares: Mapping[str, float | Tensor] | None) -> Program:
    """The same graph with every parameter replaced by the root of its expected square."""
    given = dict(squares or {})
    unknown = sorted(set(given) - set(program.parameters))
    if unknown:
        raise ArgumentError(
            f"squares names '{unknown[0]}', which is no parameter of the model; it has "
            f"{', '.join(map(repr, list(program.parameters)[:5]))} …. Tied parameters stand under "
            f"their first name."
        )
    parameters = {
        name: _root(name, p, given.get(name)) if p.is_floating_point() else p
        for name, p in program.parameters.items()
    }
    return replace(program, parameters=parameters)


def _root(name: str, parameter: nn.Parameter, square: float | Tensor | None) -> nn.Parameter:
    if square is None:
        value = parameter.detach().to("cpu", torch.float64).square().mean()
    else:
        value = torch.as_tensor(square, dtype=torch.float64).detach().cpu()
    if not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
        raise ArgumentError(
            f"the expected square of '{name}' is negative or not finite. Pass a finite, "
            f"non-negative number or tensor."
        )
    try:
        filled = value.sqrt().expand(parameter.shape)
    except RuntimeError as error:
        raise ArgumentError(
            f"the expected square of '{name}' has shape {tuple(value.shape)}, which does not "
            f"broadcast to {tuple(parameter.shape)}."
        ) from error
    return nn.Parameter(filled.clone(), requires_grad=parameter.requires_grad)
