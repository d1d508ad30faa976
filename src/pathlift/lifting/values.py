"""Activations of the lifted network, and what the squares readings of operations work with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pathlift.capture.program import Call, Symbol
from pathlift.errors import UnsupportedOperationError


@dataclass(frozen=True)
class Lifted:
    """A non-negative activation of the lifted network: ``tensor * 2**shift`` (float64).

    ``gain``: for a statistic (a square, an absolute value, a mean of such), its p-th power as a
    norm takes it: the sum of non-negative terms, not of paths, detached, in the unit of ``shift``.
    """

    tensor: Tensor
    shift: float = 0
    gain: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Lifted:
        """Apply a map that is homogeneous of degree 1."""
        return Lifted(function(self.tensor), self.shift)

    def normalised(self) -> Lifted:
        """The same values with the largest entry in [1/2, 1)."""
        peak = float(self.tensor.detach().amax()) if self.tensor.numel() else 0.0
        if peak == 0.0 or not math.isfinite(peak):
            return self
        exponent = math.frexp(peak)[1]
        if abs(exponent) < 16:
            return self
        gain = None if self.gain is None else self.gain * 2.0**-exponent
        return Lifted(self.tensor * 2.0**-exponent, self.shift + exponent, gain)


class Squares:
    """What a squares reading sees: the exponent and the call at hand.

    A reading ``squares(context, call, **arguments)`` gets :class:`Lifted` for activations, plain
    tensors for constants and buffers, and numbers, and returns :class:`Lifted` (a list where the
    operation returns several values; None for a result that carries no path, such as indices).
    """

    def __init__(self, p: float, strict: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.p = p
        self.dtype = dtype
        self.device = device
        self.strict = strict
        self.node: Call = None  # type: ignore[assignment]
        self.approximated: dict[str, int] = {}
        # Whether a symbol's value is known: neither inputs, parameters nor state decide it.
        self.known: Callable[[Symbol | None], bool] = lambda symbol: False
        # Whether the result of a call weighs other values (attention): it goes into a product.
        self.weighs: Callable[[Call], bool] = lambda call: False

    def coefficient(self, value: Any) -> Any:
        """``|a|^p`` of a fixed coefficient."""
        if isinstance(value, Tensor):
            return value.to(self.device, self.dtype).abs() ** self.p
        return abs(float(value)) ** self.p

    def lifted(self, value: Any) -> Lifted:
        """A constant as an activation that starts paths of its own (like a bias)."""
        if isinstance(value, Lifted):
            return value
        coefficient = self.coefficient(value)
        if not isinstance(coefficient, Tensor):
            coefficient = torch.full((), coefficient, dtype=self.dtype, device=self.device)
        return Lifted(coefficient)

    def ones(self, shape: Sequence[int] = ()) -> Tensor:
        """A tensor of ones."""
        return torch.ones(tuple(shape), dtype=self.dtype, device=self.device)

    def placed(self, value: Any) -> Any:
        """A constant, where the activations are."""
        return value.to(self.device) if isinstance(value, Tensor) else value

    def approximate(self) -> None:
        """Note the use of a stand-in, or refuse it."""
        call = self.node
        if self.strict:
            raise UnsupportedOperationError(
                f"the path lifting is not defined for '{call.label}' "
                f"(in module '{call.module}'): it is not piecewise linear in the "
                f"network's input. Supported: linear maps, convolutions, ReLU and its kin, "
                f"pooling, batch norm with running statistics, sums and products. Use "
                f"criterion='weight-norm', or condition_, which uses a stand-in and says so."
            )
        self.approximated[call.label] = self.approximated.get(call.label, 0) + 1

    def aligned(self, values: Sequence[Any]) -> tuple[list[Tensor], float]:
        """Tensors over one common shift."""
        lifted = [self.lifted(v) for v in values]
        shifts = sorted({v.shift for v in lifted}, reverse=True)
        top = shifts[0]
        if len(shifts) > 1:  # the shift of zeros says nothing
            live = (s for s in shifts if any(v.shift == s and bool(v.tensor.any()) for v in lifted))
            top = next(live, 0)
        # What lies above the common shift is zeros, whose gradient moves all the same.
        limit = math.frexp(torch.finfo(self.dtype).max)[1] - 1
        return [
            v.tensor if v.shift == top else v.tensor * 2.0 ** max(min(v.shift - top, limit), -1000)
            for v in lifted
        ], top

    def plus(self, x: Lifted, b: Any, shape: Sequence[int] | None = None) -> Lifted:
        """``x + b``, with ``b`` seen as of ``shape`` (paths of both)."""
        if b is None:
            return x
        (left, right), shift = self.aligned((x, b))
        return Lifted(left + (right if shape is None else right.reshape(tuple(shape))), shift)
