"""The largest curvature that a gradient step meets: the Gauss-Newton matrix's top eigenvalue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from pathlift.capture.by_name import check_by_name
from pathlift.capture.inputs import as_inputs
from pathlift.errors import ArgumentError

Loss = Callable[[Any, Any], Tensor]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Curvature:
    """What a step of gradient descent meets at a point.

    Attributes:
        largest: top eigenvalue ``L`` of the Gauss-Newton matrix ``mean J^T H J`` (``J``: outputs
            by parameters, ``H``: second derivatives of the loss by the outputs).
        stable_rate: ``2 / L``; plain gradient descent diverges above it.
        progress: ``|grad|^2 / (2 L)``, what a step of rate ``1 / L`` takes off a loss whose
            curvature is ``L``.
        iterations: of the power iteration.
    """

    largest: float
    stable_rate: float
    progress: float
    iterations: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)


def curvature(
    model: nn.Module,
    data: Iterable[Batch],
    loss: Loss,
    *,
    max_batches: int = 4,
    iterations: int = 60,
    tol: float = 1e-2,
) -> Curvature:
    """Largest eigenvalue of the Gauss-Newton matrix by power iteration, and the gradient's size.

    Args:
        model: in the mode it is in; its buffers are not changed.
        data: batches ``(inputs, targets)``; the first ``max_batches`` are used.
        loss: ``loss(outputs, targets)``, a mean over samples, twice differentiable by the outputs.
        max_batches: how many batches stand for the data.
        iterations: at most so many products with the matrix.
        tol: relative change of the eigenvalue at which the iteration ends.

    Raises:
        ArgumentError: no batch, a batch that is no pair of tensors, no trainable parameter, one
            that the model reaches by another way than its name, an operation without second
            derivatives, or a curvature that is not positive and finite.

    >>> import torch
    >>> from pathlift.curvature import curvature
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> x = torch.tensor([[1.0], [3.0]])  # mean of (w x - y)^2: curvature 2 mean(x^2) = 10
    >>> found = curvature(model, [(x, x)], torch.nn.functional.mse_loss)
    >>> round(found.largest, 4), round(found.stable_rate, 4)
    (10.0, 0.2)
    """
    batches = _batches(data, max_batches)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ArgumentError(
            "the model has no trainable parameter, so there is no curvature to measure. Pass it "
            "before freezing."
        )
    check_by_name(model, as_inputs(batches[0][0]))
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), _twice_differentiable():
        linear = [_Linear(model, parameters, batch, loss) for batch in batches]
        total = sum(part.samples for part in linear)
        shares = [part.samples / total for part in linear]
        gradient = _mean([part.gradient() for part in linear], shares)
        generator = torch.Generator().manual_seed(0)
        vector = [
            torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
            for p in parameters.values()
        ]
        value, done = _power(linear, shares, vector, iterations, tol)
    if not 0 < value < float("inf"):
        raise ArgumentError(
            f"the largest curvature came out as {value}, which is no positive number: the loss "
            f"is not finite here, or does not depend on the parameters through the outputs. "
            f"Check data=(loader, loss) on one batch."
        )
    return Curvature(value, 2 / value, _norm(gradient) ** 2 / (2 * value), done)


def _power(
    linear: list[_Linear], shares: list[float], vector: list[Tensor], iterations: int, tol: float
) -> tuple[float, int]:
    """Rayleigh quotient of the last vector, and how many products it took."""
    value, done = 0.0, 0
    while done < iterations and (scale := _norm(vector)) > 0:
        unit = [v / scale for v in vector]
        vector = _mean([part.product(unit) for part in linear], shares)
        before, value, done = value, _dot(unit, vector), done + 1
        if abs(value - before) <= tol * abs(value):
            break
    return value, done


def _batches(data: Iterable[Batch], count: int) -> list[Batch]:
    found = list(islice(data, count))
    if not found:
        raise ArgumentError(
            "data has no batches: the loader is empty or used up. Pass an iterable of (inputs, "
            "targets) that can be read again, such as a DataLoader or a list."
        )
    for batch in found:
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if not pair or not all(isinstance(t, Tensor) for t in batch):
            raise ArgumentError(
                f"data needs batches (inputs, targets), two tensors each; found "
                f"{type(batch).__name__}. Wrap the loader to yield such pairs."
            )
    return [(x, y) for x, y in found]


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Kernels with second derivatives, where there is a choice; an error in words elsewhere."""
    # Set one by one: torch.backends.*.flags set all there is, and warn of some.
    before = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_cudnn_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        raise ArgumentError(
            f"the curvature takes second derivatives, and an operation of the model has none: "
            f"{str(error).splitlines()[0].rstrip('.')}. Leave data out."
        ) from error
    finally:
        torch._C._set_mkldnn_enabled(before[0])
        torch._C._set_cudnn_enabled(before[1])


class _Linear:
    """The outputs of one batch, as a linear function of a step of the parameters."""

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, Tensor], batch: Batch, loss: Loss
    ):
        x, y = batch
        self.samples = len(x)
        self.leaves = {n: p.detach().requires_grad_() for n, p in parameters.items()}
        # Batch norms write their statistics: into copies.
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        self.out = functional_call(model, (self.leaves, buffers), (x,))
        if not isinstance(self.out, Tensor):
            raise ArgumentError(
                f"the model's output must be one tensor; found {type(self.out).__name__}. Wrap "
                f"the model so that it returns what the loss takes."
            )
        self.cotangent = torch.zeros_like(self.out, requires_grad=True)
        self.backward = self._pull(self.cotangent, create_graph=True)
        self.point = self.out.detach().requires_grad_()
        (self.slope,) = torch.autograd.grad(loss(self.point, y), self.point, create_graph=True)

    def _pull(self, cotangent: Tensor, create_graph: bool = False) -> list[Tensor]:
        leaves = list(self.leaves.values())
        found = torch.autograd.grad(
            self.out,
            leaves,
            cotangent,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, leaves, strict=True)]

    def gradient(self) -> list[Tensor]:
        """Of the batch's loss."""
        return self._pull(self.slope.detach())

    def product(self, vector: list[Tensor]) -> list[Tensor]:
        """``J^T H J vector``."""
        # J v is the derivative of <J^T u, v> by u.
        linear = [(b, v) for b, v in zip(self.backward, vector, strict=True) if b.requires_grad]
        inner = torch.stack([(b * v).sum() for b, v in linear]).sum()
        (pushed,) = torch.autograd.grad(inner, self.cotangent, retain_graph=True)
        (bent,) = torch.autograd.grad(self.slope, self.point, pushed, retain_graph=True)
        return self._pull(bent)


def _mean(parts: list[list[Tensor]], shares: list[float]) -> list[Tensor]:
    return [
        torch.stack([s * t for s, t in zip(shares, tensors, strict=True)]).sum(0)
        for tensors in zip(*parts, strict=True)
    ]


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return float(sum((x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)))


def _norm(a: list[Tensor]) -> float:
    return _dot(a, a) ** 0.5
