"""A matrix of coefficients that is not formed: the product of two thin ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Product:
    """Entries ``sum_t left[t, o] right[t, i]``, all factors non-negative.

    So come the coefficients of a linear map's weight: what leaves its output o times what enters
    at its input i, summed over the T rows (tokens) it is applied to. With one row, as in every
    fully connected network, what the solver needs of ``R C`` entries follows from ``R + C``.

    ``left``: ``(T, R)``; ``right``: ``(T, C)``.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> torch.Size:
        """``(R, C)``."""
        return torch.Size((self.left.shape[1], self.right.shape[1]))

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.left.device

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.left.nbytes + self.right.nbytes

    @property
    def thin(self) -> bool:
        """Whether the factors are well below the size of what they stand for."""
        rows, columns = self.shape
        return 2 * len(self.left) * (rows + columns) <= rows * columns

    def numel(self) -> int:
        """Number of entries."""
        return self.shape.numel()

    def dense(self) -> Tensor:
        """``(R, C)``: the entries."""
        return self.left.t() @ self.right

    def bounds(self) -> tuple[float, float]:
        """Two numbers between which all entries lie; ``(0, 0)`` for no entries.

        The lower one is positive if some row has no factor 0, and then no entry is 0.
        """
        if not (self.numel() and len(self.left)):
            return 0.0, 0.0
        left, right = self.left.to(torch.float64), self.right.to(torch.float64)
        low = left.amin(1) * right.amin(1)
        high = left.amax(1) * right.amax(1)
        return float(low.amax()), float(high.sum())


def dense(values: Tensor | Product) -> Tensor:
    """All entries of coefficients, whichever form they come in."""
    return values.dense() if isinstance(values, Product) else values
