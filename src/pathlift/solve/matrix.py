"""The matrices of a problem, as the solver uses them: formed, or as a product of thin factors.

Both hold entries ``2^(rows_o + columns_i) m[o, i]``: the powers of two are carried apart (see
:mod:`pathlift.solve.problem`), and ``-inf`` marks rows and columns without a positive entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathlift.errors import ArgumentError
from pathlift.tensors import pieces
from pathlift.tensors.alike import fetched
from pathlift.tensors.pieces import entries_at_a_time
from pathlift.tensors.product import Product

Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Store = Callable[[Tensor], Tensor]

# Row maxima within 2**-_PLAIN_BITS .. 2**_PLAIN_BITS need no normalisation (and no copy).
_PLAIN_BITS = 100
# Factors of a product of several rows may be this far (in bits) below the largest of their column;
# beyond, products of two of them could leave float64.
_FACTOR_BITS = 400


class Matrix(Protocol):
    """What the solver asks of a matrix.

    Attributes:
        shape: ``(R, C)``.
        rows, columns: ``(R,)`` and ``(C,)``, the powers of two carried apart.
        has_zeros: whether an entry may be 0.
        plain: whether its range allows products as it is.
    """

    shape: tuple[int, int]
    rows: Array
    columns: Array
    has_zeros: bool
    plain: bool

    def pair(self, v: Array, u: Array) -> tuple[Array, Array]:
        """``m v`` and ``m^T u`` in float64."""
        ...

    def normalised(self, rows: Array, columns: Array, store: Store) -> Matrix:
        """The entries times ``2^(rows_o + columns_i)`` (whole numbers), with a range that allows
        products. ``store``: where a formed matrix is put."""
        ...

    def pick(self, row: NDArray[np.int64], column: NDArray[np.int64]) -> Array:
        """Some of the ``m[o, i]``."""
        ...

    def positive(self) -> BoolArray:
        """``(R, C)``: where entries are positive."""
        ...

    def log2(self) -> Tensor:
        """``(R, C)``: log2 of the entries, the powers of two included."""
        ...


def matrix_of(values: Tensor | Product, name: str) -> Matrix | None:
    """The matrix of a block, checked; None if all its entries are 0.

    Raises:
        ArgumentError: an entry is negative, infinite or NaN; ``name`` says whose.
    """
    if isinstance(values, Product):
        ends = [_range(name, f) for f in (values.left, values.right)]
        if not all(high > 0 for _, high in ends):
            return None
        if _is_tame(values):
            return Factored.of(values)
        values = values.dense()
    matrix = _kept(values)
    low, high = _range(name, matrix)
    return Dense.of(matrix, low, high) if high > 0 else None


def power(values: Tensor | Product, exponent: float) -> Tensor | Product:
    """Every entry to a power."""
    if isinstance(values, Product):
        if len(values.left) == 1:
            left, right = values.left.double(), values.right.double()
            return Product(left**exponent, right**exponent)
        values = values.dense()
    return values.double() ** exponent


def both_products(
    matrices: Sequence[Matrix], vectors: Sequence[tuple[Array, Array]]
) -> list[tuple[Array, Array]]:
    """``m v`` and ``m^T u`` of every matrix with its ``(v, u)``.

    Vectors go to an accelerator together and products come back together: one transfer each way,
    however many matrices are there.
    """
    found = [
        (np.zeros(0), np.zeros(0)) if _is_there(m) else m.pair(v, u)
        for m, (v, u) in zip(matrices, vectors, strict=True)
    ]
    there = [k for k, m in enumerate(matrices) if _is_there(m)]
    if there:
        found_there = _pairs_there([matrices[k] for k in there], [vectors[k] for k in there])
        for k, products in zip(there, found_there, strict=True):
            found[k] = products
    return found


def _is_there(matrix: Matrix) -> bool:
    return isinstance(matrix, Dense) and matrix.values.device.type != "cpu"


def _pairs_there(
    matrices: Sequence[Matrix], vectors: Sequence[tuple[Array, Array]]
) -> list[tuple[Array, Array]]:
    dense = [m for m in matrices if isinstance(m, Dense)]
    both = [part for pair in vectors for part in pair]
    joined = torch.from_numpy(np.concatenate(both)).to(dense[0].values.device)
    sent = joined.split([len(part) for part in both])
    products = [p for k, m in enumerate(dense) for p in m.pair_there(sent[2 * k], sent[2 * k + 1])]
    ends = np.cumsum([n for m in dense for n in m.shape])
    received = np.split(to_numpy(torch.cat(products)), ends[:-1])
    return list(zip(received[::2], received[1::2], strict=True))


class Dense:
    """A formed matrix, float64 or (a large one) float32."""

    def __init__(self, values: Tensor, rows: Array, columns: Array, zeros: bool, plain: bool):
        self.values, self.rows, self.columns = values, rows, columns
        self.has_zeros, self.plain = zeros, plain
        self.shape = (values.shape[0], values.shape[1])

    @staticmethod
    def of(values: Tensor, low: float, high: float) -> Dense:
        """The matrix as it is; ``low``, ``high``: its smallest and largest entry."""
        rows, columns = np.zeros(values.shape[0]), np.zeros(values.shape[1])
        smallest = low
        if not low:
            tops = values.amax(1)
            rows[(tops == 0).cpu().numpy()] = -np.inf
            columns[(values.amax(0) == 0).cpu().numpy()] = -np.inf
            smallest = float(tops[tops > 0].amin())
        elif low < 2.0**-_PLAIN_BITS:
            smallest = float(values.amax(1).amin())
        plain = smallest >= 2.0**-_PLAIN_BITS and high <= 2.0**_PLAIN_BITS
        return Dense(values, rows, columns, low == 0, plain)

    def pair(self, v: Array, u: Array) -> tuple[Array, Array]:
        """A float32 matrix is read once from memory: each piece of it is widened in the cache, for
        both products. All in NumPy: its threads and those of torch would wait for each other in
        turns."""
        values = self.values.numpy()
        if values.dtype == np.float64:
            return np.asarray(values @ v), np.asarray(u @ values)
        across, down = np.empty(values.shape[0]), np.zeros(values.shape[1])
        size = max(1, pieces.HOST // values.shape[1])
        wide = np.empty((size, values.shape[1]))
        for start in range(0, values.shape[0], size):
            part = values[start : start + size]
            piece = wide[: len(part)]
            np.copyto(piece, part)
            np.dot(piece, v, out=across[start : start + size])
            down += u[start : start + size] @ piece
        return across, down

    def pair_there(self, v: Tensor, u: Tensor) -> list[Tensor]:
        """The same on the matrix's own device: ``m v`` in parts, then ``m^T u``."""
        size = max(1, entries_at_a_time(v.device) // self.shape[1])
        across, down = [], torch.zeros_like(v)
        for piece, weights in zip(self.values.split(size), u.split(size), strict=True):
            wide = piece.to(torch.float64)
            across.append(wide @ v)
            down += weights @ wide
        return [*across, down]

    def normalised(self, rows: Array, columns: Array, store: Store) -> Dense:
        """Every row has maximum about 1. Only powers of two are multiplied in, so nothing is
        rounded; what underflows is 2^-1000 of its row."""
        mantissa, exponent = torch.frexp(self.values)
        bits = exponent.to(torch.float64)
        bits += torch.from_numpy(rows).to(bits.device)[:, None]
        bits += torch.from_numpy(columns).to(bits.device)
        bits[self.values == 0] = -np.inf
        top = bits.amax(1)
        bits -= torch.where(torch.isfinite(top), top, torch.zeros_like(top))[:, None]
        values = store(torch.exp2(bits).mul_(mantissa))
        return Dense(values, to_numpy(top), self.columns, self.has_zeros, True)

    def pick(self, row: NDArray[np.int64], column: NDArray[np.int64]) -> Array:
        """Some of the ``m[o, i]``."""
        if self.values.device.type == "cpu":
            return np.asarray(self.values.numpy()[row, column], dtype=np.float64)
        return to_numpy(self.values[torch.from_numpy(row), torch.from_numpy(column)])

    def positive(self) -> BoolArray:
        """``(R, C)``: where entries are positive."""
        return np.asarray((self.values > 0).cpu().numpy())

    def log2(self) -> Tensor:
        """``(R, C)``: log2 of the entries."""
        return torch.log2(self.values.to("cpu", torch.float64))


class Factored:
    """A product of thin factors, all of its entries positive.

    The largest factor of every row and column is brought to [1/2, 1) and its power of two carried
    apart, so that no range is left and no normalisation ever changes the factors.
    """

    has_zeros = False
    plain = True

    def __init__(self, left: Array, right: Array, rows: Array, columns: Array) -> None:
        self.left, self.right, self.rows, self.columns = left, right, rows, columns
        self.shape = (left.shape[1], right.shape[1])

    @staticmethod
    def of(product: Product) -> Factored:
        """The product, its powers of two taken out."""
        (left, rows), (right, columns) = _mantissas(product.left), _mantissas(product.right)
        return Factored(left, right, rows, columns)

    def pair(self, v: Array, u: Array) -> tuple[Array, Array]:
        """``m v`` and ``m^T u`` by way of the T rows."""
        return np.asarray((self.right @ v) @ self.left), np.asarray((self.left @ u) @ self.right)

    def normalised(self, rows: Array, columns: Array, store: Store) -> Factored:
        """Powers of two are carried apart in any case."""
        return Factored(self.left, self.right, self.rows + rows, self.columns + columns)

    def pick(self, row: NDArray[np.int64], column: NDArray[np.int64]) -> Array:
        """Some of the ``m[o, i]``."""
        return np.asarray((self.left[:, row] * self.right[:, column]).sum(0))

    def positive(self) -> BoolArray:
        """All of them."""
        return np.ones(self.shape, dtype=bool)

    def log2(self) -> Tensor:
        """``(R, C)``: log2 of the entries, the powers of two included."""
        return torch.from_numpy(
            np.log2(self.left.T @ self.right) + self.rows[:, None] + self.columns
        )


def _mantissas(factor: Tensor) -> tuple[Array, Array]:
    values = to_numpy(factor)
    exponent = np.frexp(values.max(0))[1]
    return np.ldexp(values, -exponent), exponent.astype(np.float64)


def _is_tame(product: Product) -> bool:
    """Whether all entries are positive, and their factors near enough to the largest ones."""
    left, right = _mantissas(product.left)[0], _mantissas(product.right)[0]
    low = left.min(1) * right.min(1)
    return bool(low.max() >= 2.0**-_FACTOR_BITS)


def to_numpy(values: Tensor | Array) -> Array:
    """The values as float64, on the host."""
    if isinstance(values, Tensor):
        values = values.detach().to(device="cpu", dtype=torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def _kept(matrix: Tensor) -> Tensor:
    """The matrix as products use it: a large one as it is, where it is (float32 takes half the
    memory), a small one in float64 on the host."""
    if matrix.numel() > pieces.HOST and matrix.dtype in (torch.float32, torch.float64):
        return matrix.detach().contiguous()
    return matrix.detach().to("cpu", torch.float64)


def check_values(name: str, low: float, high: float) -> None:
    """Refuse coefficients that are not between 0 and infinity."""
    if not (low >= 0 and high < np.inf):
        raise ArgumentError(
            f"{name} has values from {low} to {high}; coefficients must be finite and >= 0. "
            "Check the criterion for overflow (the coefficients may be divided by any constant)."
        )


def _range(name: str, matrix: Tensor) -> tuple[float, float]:
    """Smallest and largest coefficient, checked."""
    if matrix.numel() == 0:
        return 0.0, 0.0
    low, high = fetched(torch.aminmax(matrix))
    check_values(name, low, high)
    return low, high
