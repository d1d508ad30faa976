"""Integer solutions of random systems, against a null space found by brute force."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from pathlift.symmetry.equations import Equations


def solved(rows: list[list[int]], size: int) -> np.ndarray:
    """The basis, ``(size, free)``, of ``rows @ x = 0``."""
    equations = Equations(size=size + 1)
    for row in rows:
        ids = [np.array([k + 1]) for k, c in enumerate(row) if c]
        if ids:
            equations.add([c for c in row if c], ids)
    return equations.solve().toarray()[1:]


def rank(matrix: list[list[int]], prime: int | None = None) -> int:
    """Over the rationals, or modulo a prime."""
    rows = [[Fraction(c) if prime is None else c % prime for c in row] for row in matrix]
    found = 0
    for column in range(len(rows[0]) if rows else 0):
        pivot = next((r for r in range(found, len(rows)) if rows[r][column]), None)
        if pivot is None:
            continue
        rows[found], rows[pivot] = rows[pivot], rows[found]
        head = rows[found]
        inverse = 1 / head[column] if prime is None else pow(int(head[column]), -1, prime)
        for r in range(found + 1, len(rows)):
            factor = rows[r][column] * inverse
            rows[r] = [a - factor * b for a, b in zip(rows[r], head, strict=True)]
            if prime is not None:
                rows[r] = [c % prime for c in rows[r]]
        found += 1
    return found


systems = st.integers(1, 5).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(
            st.lists(st.sampled_from([0, 0, 0, 1, -1, 2, -2, 3, -4, 6]), min_size=n, max_size=n),
            max_size=6,
        ),
    )
)


@settings(max_examples=120, deadline=None)
@given(systems)
def test_every_integer_solution_is_a_whole_combination_of_the_basis(system) -> None:
    size, rows = system
    basis = solved(rows, size)
    table = np.array(rows, dtype=np.int64).reshape(-1, size)
    assert not (table @ basis).any()
    free = size - (rank(rows) if rows else 0)
    assert basis.shape == (size, free)
    # Saturated: independent modulo every prime that could divide an index of these sizes.
    for prime in (2, 3, 5, 7, 11, 13, 17):
        assert rank(basis.T.tolist(), prime) == free
    box = np.array(list(itertools.product(range(-2, 3), repeat=size)))
    solutions = box[~(box @ table.T).any(axis=1)]
    coordinates = np.linalg.lstsq(basis.astype(float), solutions.T.astype(float), rcond=None)[0]
    assert (basis @ np.rint(coordinates).astype(np.int64) == solutions.T).all()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[2, -3]], [[3], [2]]),
        ([[2, -2]], [[1], [1]]),
        ([[3, 3]], [[1], [-1]]),
        ([[5, 0]], [[0], [1]]),
        ([[2, 3], [3, 2]], [[], []]),
    ],
)
def test_small_systems(rows, expected) -> None:
    basis = solved(rows, 2)
    assert np.array_equal(basis, expected) or np.array_equal(-basis, expected)


@pytest.mark.parametrize("length", [5_000, 10_000])
def test_a_chain_of_sums_is_solved_without_filling_in(length) -> None:
    """``x_{k+1} = x_k + y_k``: recursion was too deep; sums over the chain would be quadratic."""
    k = np.arange(1, length)
    equations = Equations(size=2 * length + 1)
    equations.add([1, -1, -1], [k + 1, k, k + length])
    basis = equations.solve()
    assert basis.shape[1] == 2 * length - (length - 1)
    assert basis.nnz <= 4 * length
    x = np.asarray(basis @ np.random.default_rng(0).integers(-9, 9, basis.shape[1]))
    assert (x[k + 1] == x[k] + x[k + length]).all()


def test_a_chain_that_closes_one_link_at_a_time() -> None:
    """``a_1 = b_1``, ``a_k + a_{k+1} = b_k + b_{k+1}``: each equality makes the next one."""
    n = 5_000
    a, b = np.arange(1, n + 1), np.arange(n + 1, 2 * n + 1)
    equations = Equations(size=2 * n + 1)
    equations.add([1, -1], [a[:1], b[:1]])
    equations.add([1, 1, -1, -1], [a[:-1], a[1:], b[:-1], b[1:]])
    basis = equations.solve()
    assert basis.shape[1] == n
    assert abs(basis[a] - basis[b]).nnz == 0


def test_powers_that_no_float_can_hold_stay_at_zero() -> None:
    """``x_{k+1} = 2 x_k``, a hundred times: the basis is in 64 bits, exactly or not at all."""
    k = np.arange(1, 100)
    equations = Equations(size=102)
    equations.add([1, -2], [k + 1, k])
    basis = equations.solve()
    assert basis.shape[1] == 1  # the variable that no equation names
    assert abs(basis).max() == 1


def test_an_opposite_of_itself_is_zero_also_late() -> None:
    """What is left to the elimination: pairs with equal or opposite members."""
    equations = Equations(size=4)
    equations.add([1, 1, -1, -1], [np.array([1]), np.array([2]), np.array([1]), np.array([3])])
    equations.add([1, 1], [np.array([2]), np.array([3])])
    basis = equations.solve()
    assert basis.shape == (4, 1)
    assert not basis[[2, 3]].nnz


def test_matrix_rows_are_equations() -> None:
    equations = Equations(size=4)
    equations.add_matrix(sp.csr_array(np.array([[2, -3, 0], [0, 2, -2]])))
    basis = equations.solve().toarray()
    assert np.array_equal(np.abs(basis[1:, 0]), [3, 2, 2])
