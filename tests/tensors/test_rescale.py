"""Powers of two times tensors: exact, all or none, and taken back bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pathlift.errors import ArgumentError, RangeError
from pathlift.tensors import rescale
from pathlift.tensors.extents import Extent, extent
from pathlift.tensors.rescale import Target, multiply_all_, rescale_, whole

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(), (1,), (3,), (4, 3), (2, 3, 2, 2), (0, 3), (5, 1)]


def drawn(
    seed: int, dtype: torch.dtype, reach: float, integers: bool
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """Tensors of all shapes, with factors of rows, of columns, of both and of all entries."""
    generator = torch.Generator().manual_seed(seed)

    def factor(*shape: int) -> Tensor:
        values = (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * reach
        return values.round() if integers else values

    tensors, factors = {}, {}
    for k, shape in enumerate(SHAPES * 2):
        values = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
        tensors[str(k)] = values.to(dtype)
        rows = (shape[0], *[1] * (len(shape) - 1)) if shape else ()
        columns = shape[1:2] + (1,) * (len(shape) - 2)
        choices = [
            [factor(*rows)],
            [factor(*columns)],
            [factor(*rows), factor(*columns)],
            [factor()],
        ]
        factors[str(k)] = choices[int(torch.randint(4, (), generator=generator))]
    tensors["turned"] = (torch.rand(4, 3, generator=generator) + 0.5).to(dtype).t()
    factors["turned"] = [factor(3, 1), factor(4)]
    return tensors, factors


def expected(tensor: Tensor, factors: list[Tensor]) -> Tensor:
    return (tensor.double() * torch.exp2(sum(factors)).expand(tensor.shape)).to(tensor.dtype)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(DTYPES),
    integers=st.booleans(),
    together=st.booleans(),
    wide=st.booleans(),
)
def test_products_and_their_undoing(
    seed: int, dtype: torch.dtype, integers: bool, together: bool, wide: bool
) -> None:
    reach = 60.0 if wide and dtype in (torch.float64, torch.bfloat16) else 3.0
    tensors, factors = drawn(seed, dtype, reach, integers)
    before = {n: t.clone() for n, t in tensors.items()}
    with pytest.MonkeyPatch.context() as patch:
        if not together:
            patch.setattr(rescale, "_SMALL", 0)
        patch.setattr("pathlift.tensors.pieces.HOST", 5)
        undo = rescale_(tensors, factors)
        assert whole(factors) == integers
        for name, tensor in tensors.items():
            wanted = expected(before[name], factors[name])
            if integers:
                assert torch.equal(tensor, wanted), name
            else:
                torch.testing.assert_close(tensor, wanted)
        undo()
    assert all(torch.equal(t, before[n]) for n, t in tensors.items())


def test_one_at_a_time_and_together_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in DTYPES:
        one, factors = drawn(1, dtype, 3.0, False)
        other, _ = drawn(1, dtype, 3.0, False)
        rescale_(one, factors)
        with monkeypatch.context() as patch:
            patch.setattr(rescale, "_SMALL", 0)
            rescale_(other, factors)
        assert all(torch.equal(one[n], other[n]) for n in one)


def test_a_step_on_the_way_may_leave_the_range() -> None:
    """Rows and columns that cancel are multiplied as one."""
    tensors = {"x": torch.full((2, 3), 2.0**120)}
    factors = {"x": [torch.full((2, 1), 100.0).double(), torch.full((3,), -100.0).double()]}
    undo = rescale_(tensors, factors)
    assert (tensors["x"] == 2.0**120).all()
    undo()
    assert (tensors["x"] == 2.0**120).all()


@pytest.mark.parametrize("together", [True, False])
def test_bits_that_would_be_lost_are_refused(
    together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not together:
        monkeypatch.setattr(rescale, "_SMALL", 0)
    tensors = {"a": torch.ones(3), "b": torch.tensor([1.0, 2.0**-120 * 1.3])}
    factors = {n: [torch.tensor([-20.0], dtype=torch.float64)] for n in tensors}
    with pytest.raises(RangeError, match="rescaling 'b' by 2"):
        rescale_(tensors, factors)
    assert (tensors["a"] == 1).all()


@pytest.mark.parametrize("position", [0, 2])
def test_what_cannot_be_written_to(position: int) -> None:
    """Nothing else is changed, whichever of the tensors fails."""
    spread = torch.ones(1).expand(3)
    tensors = {str(k): spread if k == position else torch.ones(3) for k in range(3)}
    tensors["large"] = torch.ones(1 << 15)
    factors = {n: [torch.ones(1, dtype=torch.float64)] for n in tensors}
    with pytest.raises(RuntimeError, match="single memory location"):
        multiply_all_([Target(t, factors[n]) for n, t in tensors.items()])
    assert all((t == 1).all() for t in tensors.values())
    with pytest.raises(ArgumentError, match=f"'{position}' is expanded: .* Give it memory of its"):
        rescale_(tensors, factors)
    assert all((t == 1).all() for t in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("integers", [True, False])
def test_a_failure_inside_a_large_tensor(
    dtype: torch.dtype, integers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rescale, "_SMALL", 0)
    monkeypatch.setattr("pathlift.tensors.pieces.HOST", 6)
    tensor = (torch.rand(8, 3) + 0.5).to(dtype)
    before, calls, real = tensor.clone(), [], rescale._multiply_piece_

    def failing(piece: Tensor, factors: list[Tensor]) -> None:
        calls.append(piece)
        if len(calls) == 3:
            raise MemoryError("injected")
        real(piece, factors)

    monkeypatch.setattr(rescale, "_multiply_piece_", failing)
    factors = torch.arange(8.0).double()[:, None] * (1.0 if integers else 0.3)
    with pytest.raises(MemoryError, match="injected"):
        rescale_({"x": tensor}, {"x": [factors]})
    assert len(calls) == 5 and torch.equal(tensor, before)


def test_state_follows_and_is_taken_back() -> None:
    parameters = [
        torch.nn.Parameter(torch.rand(4, 3) + 1),
        torch.nn.Parameter(torch.rand(200, 200)),
    ]
    optimizer = torch.optim.Adam(parameters)
    for p in parameters:
        p.grad = torch.rand_like(p)
    optimizer.step()

    def state() -> list[dict[str, Any]]:
        return [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters]

    before, values = state(), [p.detach().clone() for p in parameters]
    factors = {
        "0": [torch.tensor([[1.0], [0.0], [-2.0], [3.0]]).double()],
        "1": [torch.ones(200).double()],
    }
    undo = rescale_({str(k): p for k, p in enumerate(parameters)}, factors, optimizer)
    for k, (old, new) in enumerate(zip(before, state(), strict=True)):
        (e,) = factors[str(k)]
        assert torch.equal(new["exp_avg"], old["exp_avg"] * torch.exp2(-e).float())
        assert torch.equal(new["exp_avg_sq"], old["exp_avg_sq"] * torch.exp2(-2 * e).float())
        assert torch.equal(new["step"], old["step"])
    undo()
    assert all(map(torch.equal, parameters, values))
    for old, new in zip(before, state(), strict=True):
        assert all(torch.equal(old[k], new[k]) for k in old)


def test_the_extent_of_pieces() -> None:
    tensor = torch.tensor([0.0, 3.0, 0.25, 0.0, 1e30])
    pieces = [extent(p) for p in tensor.split(2)]
    assert Extent.of_all(torch.float32, pieces) == extent(tensor)
    assert Extent.of_all(torch.float32, [extent(torch.zeros(2))]) == extent(torch.zeros(2))
    broken = extent(torch.tensor([torch.nan]))
    assert Extent.of_all(torch.float32, [*pieces, broken]) == broken
    assert Extent.of_all(torch.float32, []) == Extent(torch.float32, None)
