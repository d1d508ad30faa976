"""Public path metrics: path norms, the diagonal of G, and the imbalance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, overload

import torch
from torch import Tensor, nn

from pathlift.capture.model import capture
from pathlift.errors import ArgumentError, PathliftError
from pathlift.lifting.lifted import LiftedPass, diagonal, lifted_pass
from pathlift.surroundings import apart


class PathNorm:
    """The path norm of one model as a function of its current parameters.

    Captures once; every call runs the lifted network again, so that the norm can stand in a
    training loss: ``loss + 1e-3 * norm()``.

    Args:
        model: a network of the supported operations, in the mode to be measured.
        example_inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
        p: exponent, finite, at least 1.

    Raises:
        ArgumentError, CaptureError: see :func:`path_norm`.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.fill_(2), model[2].weight.fill_(3)
    >>> x = torch.zeros(1, 1)
    >>> norm = pathlift.PathNorm(model, x)
    >>> loss = 0.1 * norm()
    >>> loss.backward()  # d |2 * 3| / d 2 = 3
    >>> round(float(model[0].weight.grad), 6)
    0.3
    """

    @apart
    def __init__(self, model: nn.Module, example_inputs: object, p: float = 1) -> None:
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 1 <= p < math.inf:
            raise ArgumentError(f"p must be a finite number of at least 1; found {p!r}.")
        self.p = p
        self._program = capture(model, example_inputs, both=False)

    @apart
    def __call__(self) -> Tensor:
        """``||Phi||_p``, a float64 scalar, differentiable in the model's parameters."""
        result = self._run()
        return self._root(result.total, result.shift)

    @apart
    def per_output(self) -> list[Tensor]:
        """The norm over the paths that end at each output coordinate.

        One float64 tensor per output of the model, of the shape of one sample's output,
        differentiable. Their p-th powers add up to that of the whole norm.
        """
        result = self._run()
        return [self._root(value, result.shift) for value in result.outputs]

    def _run(self) -> LiftedPass:
        return lifted_pass(
            self._program, self._program.training, self.p, differentiable=torch.is_grad_enabled()
        )

    def _root(self, total: Tensor, shift: float) -> Tensor:
        # The power of two joins after the root, so that a norm within float64 is exact in it.
        return total ** (1 / self.p) * 2.0 ** min(shift / self.p, 1023.0)


@overload
def path_norm(
    model: nn.Module, example_inputs: object, p: float = 1, differentiable: Literal[False] = False
) -> float: ...


@overload
def path_norm(
    model: nn.Module, example_inputs: object, p: float = 1, *, differentiable: Literal[True]
) -> Tensor: ...


@apart
def path_norm(
    model: nn.Module, example_inputs: object, p: float = 1, differentiable: bool = False
) -> float | Tensor:
    """The path norm ``||Phi||_p = (sum_paths |product of parameters|^p)^(1/p)``.

    Paths start at an input coordinate or a bias and end at an output coordinate. One forward pass
    of the lifted network in float64 (METHOD section 2; Gonon et al., ICLR 2024). Where inputs and
    outputs have one common leading size and at least two dimensions, that dimension is the batch,
    and the value is per sample. Batch norm enters in affine form with its running statistics.

    Args:
        model: a network of the supported operations, in the mode to be measured.
        example_inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
        p: exponent, at least 1 (``math.inf`` is not supported).
        differentiable: return a scalar tensor to differentiate (:class:`PathNorm` spares the
            capture at every call).

    Returns:
        The norm; ``inf`` where it exceeds float64.

    Raises:
        UnsupportedOperationError: an operation without paths (softmax, GELU …).
        ArgumentError, CaptureError: see :func:`pathlift.rescaling_group`.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.fill_(2), model[2].weight.fill_(3)
    >>> x = torch.zeros(1, 1)
    >>> pathlift.path_norm(model, x, p=1)  # one path, of weight 2 * 3
    6.0
    """
    norm = PathNorm(model, example_inputs, p)
    if differentiable:
        return norm()
    with torch.no_grad():
        result = norm._run()
    total = float(result.total)
    if total == 0:
        return 0.0
    log2 = (math.log2(total) + result.shift) / p
    return float(2.0**log2) if log2 < 1024 else math.inf


@apart
def path_magnitude(model: nn.Module, example_inputs: object, p: float = 1) -> dict[str, Tensor]:
    """What each parameter entry carries of ``||Phi||_p^p``: its rescaling-invariant magnitude.

    ``m_i = |theta_i|^p d(||Phi||_p^p) / d(|theta_i|^p)``: the sum of ``|Phi_path|^p`` over the
    paths through entry i, which is what the p-th power of the norm loses if the entry is set to
    zero (a path that passes it m times counts m times). For p = 1 this is the path-magnitude of
    Gonon et al. (2024). Equal networks up to rescaling have equal magnitudes.

    Returns:
        name -> float64 tensor of the parameter's shape, as a share of ``||Phi||_p^p``.

    Raises:
        UnsupportedOperationError, ArgumentError, CaptureError: see :func:`path_norm`.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.fill_(2), model[2].weight.fill_(3)
    >>> x = torch.zeros(1, 1)
    >>> [float(m) for m in pathlift.path_magnitude(model, x).values()]  # the one path passes both
    [1.0, 1.0]
    """
    program = PathNorm(model, example_inputs, p)._program
    with torch.enable_grad():
        result = lifted_pass(program, program.training, p)
        names = list(result.parameters)
        gradients = torch.autograd.grad(
            result.total, [result.parameters[n] for n in names], allow_unused=True
        )
    total = float(result.total.detach()) or 1.0
    return {
        n: (torch.zeros_like(u) if g is None else g * u.detach() / total).to(
            program.parameters[n].device
        )
        for n, g, u in zip(names, gradients, result.parameters.values(), strict=True)
    }


@apart
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

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.fill_(2), model[2].weight.fill_(3)
    >>> x = torch.zeros(1, 1)
    >>> {n: float(g) for n, g in pathlift.path_kernel_diagonal(model, x).items()}
    {'0.weight': 9.0, '2.weight': 4.0}
    """
    program = capture(model, example_inputs, both=False)
    found, shift, _ = diagonal(program, program.training, repeats=True)
    peak = max((float(g.max()) for g in found.values() if g.numel()), default=0.0)
    if peak > 0 and math.log2(peak) + shift >= 1024:
        raise PathliftError(
            f"diag(G) reaches 2**{math.log2(peak) + shift:.0f}, beyond float64. Rescale the "
            f"network first, or use condition_, which works up to a common factor."
        )
    half = int(shift) // 2  # in two steps: either factor alone stays in range
    for factor in (2.0**half, 2.0 ** (int(shift) - half)):
        if factor != 1:
            found = {n: g * factor for n, g in found.items()}
    return {n: g.to(program.parameters[n].device) for n, g in found.items()}


def imbalance(diagonal: Mapping[str, Tensor]) -> float:
    """``log(arithmetic mean / geometric mean)`` of the positive entries (natural logarithm).

    This is the criterion F per parameter: ``F / p - log p`` (METHOD section 3). It is at least 0,
    and 0 exactly when all entries are equal.

    Args:
        diagonal: name -> non-negative tensor, as from :func:`path_kernel_diagonal`. Entries equal
            to 0 (parameters on no path) are not counted.

    Raises:
        ArgumentError: negative or non-finite entries.

    >>> import pathlift, torch
    >>> pathlift.imbalance({"a": torch.tensor([9.0]), "b": torch.tensor([4.0])})  # log(6.5 / 6)
    0.080...
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
