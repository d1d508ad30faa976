"""A model on an accelerator: everything that grows with it is worked on there."""

from __future__ import annotations

import contextlib
import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("expecttest")

import pathlift
from operators.cases import INPUT, cases, database
from pathlift.capture.model import capture
from pathlift.capture.program import Program
from pathlift.condition import scales_to_apply
from pathlift.criteria import CRITERIA
from pathlift.lifting.lifted import lifted_pass, stream_diagonal
from pathlift.solve import solve
from pathlift.solve.assemble import assemble_from
from pathlift.solve.bounds import extent_bounds
from pathlift.solve.matrix import Dense
from pathlift.solve.operator import Operator
from pathlift.symmetry.group import RescalingGroup, infer_group
from pathlift.tensors.extents import Extent, extents
from pathlift.tensors.product import dense
from pretend import Accelerator, Pretend, Unpretended, moved_model, moved_program


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.c = nn.Conv2d(6, 6, 3, groups=2), nn.Conv2d(12, 4, 1)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x)).relu()
        x = nn.functional.max_pool2d(x, 2)
        x = torch.cat((self.up(self.b(x)).relu(), self.up(self.b(x)).relu()), 1)
        x = nn.functional.avg_pool2d(self.c(x), 2, padding=1).relu()
        return self.out(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids))
        q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        scores = (q @ k.transpose(-1, -2)).masked_fill(~mask, -torch.inf).softmax(-1)
        x = x + self.o((scores @ v).transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "mlp":
        widths = (5, 12, 9, 8, 4)
        pairs = itertools.pairwise(widths)
        layers = [m for a, b in pairs for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers), torch.randn(2, 5)
    if name == "convolutional":
        return Convolutional(), torch.randn(2, 3, 8, 8)
    return Attention(), torch.randint(11, (2, 5))


def extents_of(group: RescalingGroup, program: Program) -> dict[str, Extent]:
    tensors = {**program.buffers, **program.parameters}
    return extents({n: tensors[n] for n in group.parameters})


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("criterion", list(CRITERIA))
@pytest.mark.parametrize("name", ["mlp", "convolutional", "attention"])
def test_scales_are_those_of_the_host(
    name: str, criterion: str, dead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pathlift.tensors.pieces.HOST", 7)  # matrices stay on the device
    model, x = network(name)
    if dead:
        with torch.no_grad():
            for p in model.parameters():
                p[0] = 0
    program, group = capture(model, x), infer_group(capture(model, x))
    lower, upper = extent_bounds(group, extents_of(group, program))
    chosen = CRITERIA[criterion]
    expected, _ = assemble_from(group, chosen, program, lower=lower, upper=upper)
    there = moved_program(program)
    with Accelerator() as accelerator:
        for one, other in zip(
            (lower, upper), extent_bounds(group, extents_of(group, there)), strict=True
        ):
            np.testing.assert_array_equal(one, other)
        found, _ = assemble_from(group, chosen, there, lower=lower, upper=upper)
        solution = solve(found.operator, "newton", 1e-8)
        scales = scales_to_apply(found.operator, solution, True)
    assert accelerator.transfers
    assert found.problem.count == expected.problem.count
    np.testing.assert_array_equal(found.dead, expected.dead)
    reference = solve(expected.operator, "newton", 1e-8)
    integers = scales_to_apply(expected.operator, reference, True)
    np.testing.assert_allclose(solution.log2_scales, reference.log2_scales, atol=1e-5)
    np.testing.assert_array_equal(scales, integers)


@pytest.mark.parametrize("name", ["mlp", "convolutional", "attention"])
def test_parameters_are_rescaled_where_they_are(name: str) -> None:
    model, x = network(name)
    group = infer_group(capture(model, x))
    scales = torch.randint(-3, 4, (group.num_scales,))
    other = moved_model(copy.deepcopy(model))
    group.rescale_(model, scales)
    with Accelerator():
        group.rescale_(other, scales)
    for (key, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert isinstance(q.data, Pretend) and torch.equal(p, q.data.host), key


def test_a_product_is_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many matrices are there: that is what the next step waits for."""
    monkeypatch.setattr("pathlift.tensors.pieces.HOST", 7)
    monkeypatch.setattr("pathlift.tensors.product.Product.thin", False)
    model, x = network("mlp")
    program, group = capture(model, x), infer_group(capture(model, x))
    lower, upper = np.full(group.num_scales, -9.0), np.full(group.num_scales, 9.0)
    with Accelerator():
        there = moved_program(program)
        found, _ = assemble_from(group, CRITERIA["path-kernel"], there, lower=lower, upper=upper)
        operator = Operator(found.problem)
        point = np.zeros(group.num_scales)
        assert sum(isinstance(m, Dense) for m in operator.sources) > 1
        with Accelerator() as accelerator:
            at = operator.evaluate(point)
            assert accelerator.transfers == {"tensor": 1}
            operator.hessian_product(at, point)
            assert accelerator.transfers == {"tensor": 2}


def test_path_norms_are_taken_where_the_parameters_are() -> None:
    model, x = network("convolutional")
    model.eval()
    program = capture(model, x)
    expected = lifted_pass(program, False, 1, differentiable=True)
    (slope,) = torch.autograd.grad(expected.total, model.a.weight)
    with Accelerator():
        there = moved_program(program)
        found = lifted_pass(there, False, 1, differentiable=True)
        (other,) = torch.autograd.grad(found.total, there.parameters["a.weight"])
    assert isinstance(found.total, Pretend) and isinstance(other, Pretend)
    assert found.shift == expected.shift
    torch.testing.assert_close(found.total.host, expected.total)
    torch.testing.assert_close(other.host, slope)


# Operations that read values the program knows (indices, masks), wherever those lie.
READ_VALUES = (
    *("masked_fill", "masked_scatter", "gather", "index_select", "__getitem__", "index_put"),
    *("put", "take", "take_along_dim", "where", "masked.prod", "masked.cumsum", "scatter"),
    *("scatter_add", "index_add", "index_copy", "index_fill", "nn.functional.embedding"),
    *("diagonal_scatter", "select_scatter", "cumsum", "sort", "nn.functional.pad.reflect"),
    *("nn.functional.max_pool2d", "nn.functional.batch_norm", "repeat_interleave", "tril"),
)


@pytest.mark.parametrize("name", READ_VALUES)
def test_an_operation_is_read_as_on_the_host(name: str) -> None:
    assert reads_alike(name, 3)


# A linear map of a vector gives its result another shape in place, which a wrapper can't follow.
@pytest.mark.zoo
@pytest.mark.parametrize("name", [n for n in database() if n != "nn.functional.linear"])
def test_every_operation_is_read_as_on_the_host(name: str) -> None:
    reads_alike(name, 8)


def reads_alike(name: str, most: int) -> int:
    """Scales and coefficients of so many cases of an operator; how many could be asked."""
    asked = 0
    for case in itertools.islice(cases(database()[name]), most):
        try:
            program = capture(case.module().eval(), torch.tensor(INPUT))
            group = infer_group(program)
        except Exception:  # tests/operators says whether that is as it should be
            continue
        there = moved_program(program)
        try:
            with Accelerator():
                found = infer_group(there)
                assert found.num_scales == group.num_scales, case.name
                assert found.unsupported == group.unsupported, case.name
                alike = coefficients(program), coefficients(there)
        except Unpretended:
            continue
        asked += 1
        for (key, expected), value in zip(alike[0].items(), alike[1].values(), strict=True):
            value = value.host if isinstance(value, Pretend) else value
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=0, equal_nan=True, msg=key)
    return asked


def coefficients(program: Program) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with contextlib.suppress(pathlift.PathliftError):  # no paths
        stream_diagonal(program, False, lambda n, g: found.update({n: dense(g)}), strict=False)
    return found
