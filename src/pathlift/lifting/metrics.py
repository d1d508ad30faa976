"""Public path metrics: path norms, the diagonal of G, and the imbalance."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pathlift.capture import capture
from pathlift.errors import ArgumentError, PathliftError
from pathlift.lifting.squared import diagonal, lifted_pass


def path_norm(model: nn.Module, example_inputs: object, p: float = 1) -> float:
    """The path norm ``||Phi||_p = (sum_paths |product of parameters|^p)^(1/p)``.

    Paths start at an input coordinate or a bias and end at an output coordinate. One forward pass
    of the lifted network in float64 (METHOD section 2; Gonon et al., ICLR 2024). Where inputs and
    outputs have one common leading size and at least two dimensions, that dimension is the batch,
    and the value is per sample. Batch norm enters in affine form with its running statistics.

    Args:
        model: a network of the supported operations, in the mode to be measured.
        example_inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
        p: exponent, at least 1 (``math.inf`` is not supported).

    Returns:
        The norm; ``inf`` where it exceeds float64.

    Raises:
        UnsupportedOperationError: an operation without paths (softmax, GELU …).
        ArgumentError, CaptureError: see :func:`pathlift.rescaling_group`.
    """
    if not isinstance(p, (int, float)) or not math.isfinite(p) or p < 1:
        raise ArgumentError(f"p must be a finite number of at least 1; found {p!r}.")
    program = capture(model, example_inputs)
    with torch.no_grad():
        result = lifted_pass(program, program.training, p)
    total = float(result.total)
    if total == 0:
        return 0.0
    log2 = (math.log2(total) + result.shift) / p
    return float(2.0**log2) if log2 < 1024 else math.inf


def path_kernel_diagonal(model: nn.Module, example_inputs: object) -> dict[str, Tensor]:
    """The diagonal of ``G = dPhi^T dPhi``: ``g_i = sum_paths (dPhi_path / dtheta_i)^2``.

    One forward and one backward pass of the squared network (METHOD section 2). A parameter that
    one path passes m times (a layer applied twice in a row) counts m^2 times, as the definition
    says; for those parameters this takes one more pair of passes per entry.

    Returns:
        parameter name -> float64 tensor of the parameter's shape, on the parameter's device. Tied
        parameters stand under their first name; parameters on no path are 0.

    Raises:
        UnsupportedOperationError: an operation without paths (softmax, GELU …).
        PathliftError: the values exceed float64 (:func:`pathlift.condition_` does not need them
            and has no such limit).
        ArgumentError, CaptureError: see :func:`pathlift.rescaling_group`.
    """
    program = capture(model, example_inputs)
    found, shift, _ = diagonal(program, program.training, repeats=True)
    peak = max((float(g.max()) for g in found.values() if g.numel()), default=0.0)
    if peak > 0 and math.log2(peak) + shift >= 1024:
        raise PathliftError(
            f"diag(G) reaches 2**{math.log2(peak) + shift:.0f}, beyond float64. Rescale the "
            f"network first, or use condition_, which works up to a common factor."
        )
    half = int(shift) // 2  # in two steps: either factor alone stays in range
    return {
        n: (g * 2.0**half * 2.0 ** (int(shift) - half)).to(program.parameters[n].device)
        for n, g in found.items()
    }


def imbalance(diagonal: Mapping[str, Tensor]) -> float:
    """``log(arithmetic mean / geometric mean)`` of the positive entries (natural logarithm).

    This is the criterion F per parameter: ``F / p - log p`` (METHOD section 3). It is at least 0,
    and 0 exactly when all entries are equal.

    Args:
        diagonal: name -> non-negative tensor, as from :func:`path_kernel_diagonal`. Entries equal
            to 0 (parameters on no path) are not counted.

    Raises:
        ArgumentError: negative or non-finite entries.
    """
    count, log_sum = 0, 0.0
    peaks = []
    entries = []
    for name, tensor in diagonal.items():
        values = torch.as_tensor(tensor).detach().to("cpu", torch.float64).reshape(-1)
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise ArgumentError(
                f"the diagonal of '{name}' has negative or non-finite entries; a diagonal of "
                f"G is non-negative. Check the model's parameters for NaN."
            )
        values = values[values > 0]
        if values.numel():
            entries.append(values)
            peaks.append(float(values.max()))
            count += values.numel()
            log_sum += float(values.log().sum())
    if not count:
        return 0.0
    peak = max(peaks)
    mean = sum(float((v / peak).sum()) for v in entries) / count
    return max(0.0, math.log(mean) + math.log(peak) - log_sum / count)
