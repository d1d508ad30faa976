"""Every criterion against a minimisation of its stated objective, written from the definition."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor, nn

import pathlift
from pathlift import criteria
from pathlift.experiments.architectures import mlp


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.rand(4) + 0.5)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        h = h + self.gain * F.relu(self.c(F.relu(self.b(h))))
        return self.out(h)


def networks() -> list[tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    convolutional = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 2),
    )  # fmt: skip
    found = [
        (mlp((3, 8, 2, 6, 2)), torch.randn(5, 3)),
        (Residual(), torch.randn(5, 3)),
        (convolutional, torch.randn(3, 2, 3, 3)),
    ]
    return [(m.double(), x.double()) for m, x in found]


def optimum(objective, group: pathlift.RescalingGroup) -> np.ndarray:
    """SciPy on the dense definition; ``objective`` maps scales (a tensor) to a scalar."""

    def both(s: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.tensor(s, requires_grad=True)
        value = objective(point)
        value.backward()
        return value.item(), point.grad.numpy()

    start = np.zeros(group.num_scales)
    options = {"gtol": 1e-13, "maxiter": 10_000}
    return minimize(both, start, jac=True, method="BFGS", options=options).x


def scaled(model: nn.Module, group: pathlift.RescalingGroup, name: str, s: Tensor) -> Tensor:
    parameter = dict(model.named_parameters())[name].detach()
    return parameter * torch.exp2(group.exponents(name).double() @ s)


@pytest.mark.parametrize("solver", ["newton", "coordinate"])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("q", [1, 2, 3.5])
@pytest.mark.parametrize("index", range(3))
def test_weight_norm(index: int, q: float, biases: bool, solver: str) -> None:
    if index == 1 and not biases:
        pytest.skip("the gain, a vector, would not count: its scales have one side and no minimum")
    model, x = networks()[index]
    group = pathlift.rescaling_group(model, x)
    names = [n for n, p in model.named_parameters() if biases or p.dim() > 1]

    def objective(s: Tensor) -> Tensor:
        return (
            torch.stack([scaled(model, group, n, s).abs().pow(q).sum() for n in names]).sum().log()
        )

    best = optimum(objective, group)
    report = pathlift.condition_(
        copy.deepcopy(model), x, criterion=criteria.weight_norm(q, biases), exact=False,
        solver=solver, tol=1e-11,
    )  # fmt: skip
    np.testing.assert_allclose(report.log2_scales, best, atol=1e-5)
    assert abs(objective(report.log2_scales) - objective(torch.tensor(best))) < 1e-8


def cyclic(
    weights: list[Tensor], biases: list[Tensor] | None, q: float, sweeps: int
) -> list[Tensor]:
    """The published iteration: every hidden layer in turn, until nothing moves."""
    weights = [w.clone() for w in weights]
    biases = [b.clone() for b in biases] if biases is not None else None
    for _ in range(sweeps):
        for k in range(len(weights) - 1):
            entering = weights[k].abs().pow(q).sum(1)
            if biases is not None:
                entering = entering + biases[k].abs().pow(q)
            leaving = weights[k + 1].abs().pow(q).sum(0)
            d = (leaving / entering).pow(1 / (2 * q))
            weights[k] *= d[:, None]
            weights[k + 1] /= d[None, :]
            if biases is not None:
                biases[k] *= d
    return weights


@pytest.mark.parametrize("q", [1, 2])
@pytest.mark.parametrize("biases", [True, False])
def test_enorm_is_the_fixed_point_of_the_published_iteration(q: float, biases: bool) -> None:
    torch.manual_seed(1)
    model = mlp((5, 12, 3, 8, 4)).double()
    layers = [m for m in model if isinstance(m, nn.Linear)]
    expected = cyclic(
        [m.weight.detach() for m in layers], [m.bias.detach() for m in layers] if biases else None,
        q, 500,
    )  # fmt: skip
    criterion = criteria.weight_norm(q, biases)
    pathlift.condition_(
        model, torch.randn(2, 5).double(), criterion=criterion, exact=False, tol=1e-12
    )
    for layer, weight in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-8, atol=0)


@pytest.mark.parametrize("index", range(3))
def test_ranges_are_equal_on_both_sides(index: int) -> None:
    model, x = networks()[index]
    twin = copy.deepcopy(model)
    report = pathlift.condition_(model, x, criterion="range", exact=False, tol=1e-10)
    assert report.gradient_norm <= 1e-10 and report.imbalance_after < 1e-9
    assert report.imbalance_before > 0.1
    torch.testing.assert_close(model(x), twin(x))
    if index == 0:
        layers = [m for m in model if isinstance(m, nn.Linear)]
        for a, b in itertools.pairwise(layers):
            rows, columns = a.weight.abs().amax(1), b.weight.abs().amax(0)
            torch.testing.assert_close(rows, columns, rtol=1e-9, atol=0)


def test_ranges_exactly() -> None:
    model, x = networks()[0]
    before = model(x)
    report = pathlift.condition_(model, x, criterion="range", exact=True)
    assert torch.equal(model(x), before) and report.imbalance_after < report.imbalance_before


@pytest.mark.parametrize("chunk", [1, 2**30])
def test_fisher_is_the_mean_of_squared_gradients(chunk: int) -> None:
    model, x = networks()[1]
    y = torch.arange(5) % 2
    found = criteria.squared_gradients(
        model, [(x[:3], y[:3]), (x[3:], y[3:])], F.cross_entropy, max_bytes=chunk
    )
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for k in range(5):
        model.zero_grad()
        F.cross_entropy(model(x[k : k + 1]), y[k : k + 1]).backward()
        for name, p in model.named_parameters():
            expected[name] += p.grad.square() / 5
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, rtol=1e-10, atol=1e-14)


def test_fisher_conditions_what_has_no_paths() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)
    ).double()
    x, y = torch.randn(40, 3).double(), torch.arange(40) % 2
    group = pathlift.rescaling_group(model, x)
    criterion = criteria.fisher(model, [(x, y)], F.cross_entropy)
    g = criteria.squared_gradients(model, [(x, y)], F.cross_entropy)

    def objective(s: Tensor) -> Tensor:
        parts = [
            (c * torch.exp2(-2 * group.exponents(n).double() @ s))[c > 0] for n, c in g.items()
        ]
        flat = torch.cat(parts)
        return flat.sum().log() - flat.log().mean()

    best = optimum(objective, group)
    report = pathlift.condition_(model, x, criterion=criterion, exact=False, tol=1e-11)
    np.testing.assert_allclose(report.log2_scales, best, atol=1e-6)
    assert report.approximated == {} and report.imbalance_after < report.imbalance_before


def test_a_mapping_and_a_reference() -> None:
    model, x = networks()[0]
    g = pathlift.path_kernel_diagonal(model, x)
    options = {"exact": False, "tol": 1e-11}
    named = pathlift.condition_(copy.deepcopy(model), x, **options)
    mapped = pathlift.condition_(copy.deepcopy(model), x, criterion=g, **options)
    torch.testing.assert_close(named.log2_scales, mapped.log2_scales, rtol=0, atol=1e-7)
    r = {n: torch.rand_like(v) + 0.1 for n, v in g.items()}
    divided = pathlift.condition_(copy.deepcopy(model), x, reference=r, **options)
    mapped = pathlift.condition_(
        copy.deepcopy(model), x, criterion={n: v / r[n] for n, v in g.items()}, **options
    )
    torch.testing.assert_close(divided.log2_scales, mapped.log2_scales, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"criterion": "fisher"}, "needs data. Pass criterion=pathlift.criteria.fisher"),
        ({"criterion": {"nope": torch.ones(1)}}, "has an entry 'nope', which is no parameter"),
        ({"criterion": {"0.weight": torch.ones(2)}}, "shape (2,); the parameter has (8, 3)"),
        ({"criterion": {"0.bias": -torch.ones(8)}}, "not finite or negative"),
        ({"reference": {"0.bias": torch.zeros(8)}}, "not finite or not positive"),
        (
            {"reference": {"0.bias": torch.ones(8)}},
            "reference has no entry for parameter '0.weight'",
        ),
    ],
)
def test_messages(given: dict, message: str) -> None:
    model, x = networks()[0]
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(pathlift.PathliftError) as caught:
        pathlift.condition_(model, x, **given)
    assert message in str(caught.value)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_messages_of_the_makers() -> None:
    with pytest.raises(pathlift.PathliftError, match="q must be a positive finite number; found 0"):
        criteria.weight_norm(0)
    model, x = networks()[0]
    with pytest.raises(pathlift.PathliftError, match="got no samples"):
        pathlift.condition_(model, x, criterion=criteria.fisher(model, [], F.mse_loss))
    with pytest.raises(pathlift.PathliftError, match="two tensors of one length; found Tensor"):
        pathlift.condition_(model, x, criterion=criteria.fisher(model, [x], F.mse_loss))
