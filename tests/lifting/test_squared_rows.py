"""Linear weights are squared a few rows at a time, and what they are given is a product: neither
changes the diagonal, nor the problem that the solver sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pathlift.capture.model import capture
from pathlift.criteria import Coefficients
from pathlift.lifting import parameters
from pathlift.lifting.lifted import lifted_pass, stream_diagonal
from pathlift.solve import round_scales
from pathlift.solve.assemble import assemble_sums, sum_up
from pathlift.symmetry.group import infer_group
from pathlift.tensors.product import Product, dense


class Network(nn.Module):
    """Plain, skipped, reused and rescaled linear maps; a convolution's weight is never by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.first = nn.Linear(7, 9)
        self.skipped = nn.Linear(9, 9)
        self.reused = nn.Linear(9, 9, bias=False)
        self.last = nn.Linear(9, 5)
        with torch.no_grad():
            self.last.weight *= 1e6
            self.last.weight[0] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.conv(x.unsqueeze(-2)).squeeze(-2)).relu()
        x = x + self.skipped(x).relu()
        return self.last(self.reused(self.reused(x).relu()))


@settings(max_examples=20, deadline=None)
@given(
    shape=st.sampled_from([(1, 7), (3, 7), (2, 4, 7), (9, 7)]),
    piece=st.integers(1, 100),
    seed=st.integers(0, 1000),
    double=st.booleans(),
)
def test_diagonal(shape: tuple[int, ...], piece: int, seed: int, double: bool) -> None:
    torch.manual_seed(seed)
    model = Network()
    if len(shape) > 2:
        model.conv = nn.Identity()
        model.forward = lambda x: model.last(model.skipped(model.first(x).relu()).relu())  # type: ignore[method-assign]
    program = capture(model, torch.randn(shape))
    dtype = torch.float64 if double else torch.float32

    whole = lifted_pass(program, True, dtype=dtype)
    names = list(whole.parameters)
    leaves = [whole.parameters[n] for n in names]
    gradients = torch.autograd.grad(whole.total, leaves, materialize_grads=True)
    found: dict[str, Tensor | Product] = {}
    made: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathlift.tensors.pieces.HOST", piece)
        init = parameters.LiftedRows.__init__

        def note(self: parameters.LiftedRows, *args: Any) -> None:
            made.append(args[1])
            init(self, *args)

        patch.setattr(parameters.LiftedRows, "__init__", note)
        stream_diagonal(program, True, found.__setitem__, dtype=dtype)
    linear = {"first.weight", "skipped.weight", "last.weight"}
    assert set(made) == linear  # all but the convolution's and the reused one
    assert found.keys() == set(names)
    for name, gradient in zip(names, gradients, strict=True):
        expected = gradient * 2.0 ** (-2 * whole.units[name])
        tolerance = 1e-13 if double else 1e-5
        torch.testing.assert_close(dense(found[name]), expected, rtol=tolerance, atol=0)
    products = {n for n, g in found.items() if isinstance(g, Product)}
    # One sample stands for all, so there is one row; several tokens are too many at these sizes.
    assert products == {(1, 7): linear, (3, 7): linear}.get(shape, products)


def model_of(kind: str) -> nn.Module:
    """Networks whose linear weights meet scales of their rows, their columns, both or none."""
    plain = [nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 12)]
    flattened = [nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 20), nn.ReLU()]
    return {
        "plain": nn.Sequential(*plain),
        "one": nn.Sequential(nn.Linear(30, 30)),
        "flattened": nn.Sequential(*flattened, nn.Linear(20, 16)),
        "tokens": nn.Sequential(nn.Conv1d(3, 16, 2), Transposed(), *plain_tokens()),
    }[kind]


def plain_tokens() -> list[nn.Module]:
    return [nn.ReLU(), nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 30)]


class Transposed(nn.Module):
    """Channels last: the rows of the next linear map are the positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


SHAPES = {"plain": (2, 6), "one": (1, 30), "flattened": (2, 1, 4, 4), "tokens": (2, 3, 4)}


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(list(SHAPES)),
    seed=st.integers(0, 1000),
    dead=st.booleans(),
    double=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_sums_of_products(
    kind: str, seed: int, dead: bool, double: bool, dtype: torch.dtype
) -> None:
    """What the solver is given of a product is what it is given of its entries."""
    torch.manual_seed(seed)
    model = model_of(kind)
    if dead:
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 2:
                    p[torch.rand(p.shape[0]) < 0.3] = 0
                    p[:, torch.rand(p.shape[1]) < 0.3] = 0
    if double:
        model.double()
    x = torch.randn(SHAPES[kind], dtype=torch.float64 if double else torch.float32)
    program = capture(model, x)
    group = infer_group(program)
    h = group.num_scales
    handed: dict[str, Tensor | Product] = {}
    stream_diagonal(program, True, handed.__setitem__, dtype=dtype)
    linear = [n for n, p in model.named_parameters() if p.dim() == 2]
    assert all(isinstance(handed[n], Product) for n in linear)
    trainable = dict.fromkeys(handed, True)
    low, high = np.full(h, -20.0), np.full(h, 20.0)
    for name, g in handed.items():
        spec = group.parameters[name]
        short, whole = sum_up(spec, g), sum_up(spec, dense(g).double())
        assert short.positive == whole.positive
        assert short.log_sum == pytest.approx(whole.log_sum, rel=1e-6, abs=1e-4)
    thin = {n: sum_up(group.parameters[n], g) for n, g in handed.items()}
    full = {n: sum_up(group.parameters[n], dense(g).double()) for n, g in handed.items()}
    a, b = (
        assemble_sums(group, sums, Coefficients({}), trainable, lower=low, upper=high)
        for sums in (thin, full)
    )
    assert a.problem.count == b.problem.count
    np.testing.assert_array_equal(a.dead, b.dead)
    np.testing.assert_allclose(a.slope, b.slope)
    point = np.random.default_rng(seed).uniform(-5, 5, h)
    one, two = a.operator.evaluate(point), b.operator.evaluate(point)
    assert one.objective == pytest.approx(two.objective, rel=1e-5)
    scale = 1e-5 * a.problem.count
    np.testing.assert_allclose(one.gradient, two.gradient, rtol=1e-5, atol=scale)
    np.testing.assert_allclose(
        a.operator.hessian_product(one, point),
        b.operator.hessian_product(two, point),
        rtol=1e-5,
        atol=10 * scale,
    )
    np.testing.assert_array_equal(round_scales(a.operator, point), round_scales(b.operator, point))


def _in_the_place_of_a_square(store: parameters.DroppedParameters) -> Tensor | None:
    """A tensor that lies where a square lay that was read, and is not closed yet."""
    square = store.open("first.weight", by_rows=False)
    assert isinstance(square, Tensor)
    address, size = square.data_ptr(), square.numel()
    del square  # a view of it may be in use
    held = [torch.randn(size, dtype=torch.float64) for _ in range(50)]
    return next((t for t in held if t.data_ptr() == address), None)


def test_memory_that_is_used_again_is_not_taken_for_a_square() -> None:
    program = capture(Network(), torch.randn(3, 7))
    store = parameters.DroppedParameters(program, torch.float64, lambda name, gradient: None)
    other = next(
        (t for _ in range(200) if (t := _in_the_place_of_a_square(store)) is not None), None
    )
    if other is None:
        pytest.skip("the allocator did not use the memory again")
    other.requires_grad_()
    with store.saved():
        result = other.square().sum()
    assert torch.equal(torch.autograd.grad(result, other)[0], 2 * other)
