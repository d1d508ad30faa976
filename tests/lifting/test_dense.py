"""Listing by tables agrees with the reference listing, with autograd and with the theory."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.lifting import paths as dense
from pathlift.lifting.paths import (
    list_paths,
    logdet_divergence,
    path_gram,
    path_jacobian,
    path_kernel_spectrum,
    path_lifting,
)
from reference.listing import Listing


class Function(nn.Module):
    """A network from some layers and a forward function."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        self.layers = nn.ModuleDict(layers)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self.layers, *inputs)


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def norm(channels: int) -> nn.Module:
    layer = nn.BatchNorm2d(channels)
    for tensor in (layer.weight, layer.bias, layer.running_mean):
        nn.init.normal_(tensor)
    layer.running_var.uniform_(0.5, 2)
    return layer


def shared() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.ReLU(), layer)


def convolutional(*more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 2, padding=1), nn.ReLU(), *more)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(3, 4, 2), (1, 3)),
    "deep": (lambda: mlp(2, 3, 1, 3, 2), (1, 2)),
    "without biases": (lambda: mlp(3, 4, 2, bias=False), (1, 3)),
    "layer applied twice": (shared, (1, 3)),
    "skip": (
        lambda: Function(lambda m, x: m["a"](x) - m["b"](x), a=mlp(3, 2, 2), b=mlp(3, 2)),
        (1, 3),
    ),
    "product": (lambda: Function(lambda m, x: m["a"](x) * m["b"](x), a=mlp(3, 2), b=mlp(3, 2)), (1, 3)),
    "concatenation": (
        lambda: Function(lambda m, x: m["b"](torch.cat([x, m["a"](x)], 1)), a=mlp(2, 2), b=mlp(4, 2)),
        (1, 2),
    ),
    "factor": (lambda: Function(lambda m, x: -0.3 * m["a"](x.flip(1))[:, :1], a=mlp(2, 3)), (1, 2)),
    "convolution": (lambda: convolutional(nn.Flatten(), nn.Linear(18, 2)), (1, 2, 2, 2)),
    "strided": (lambda: nn.Conv2d(2, 4, 2, stride=2, padding=1, dilation=2, groups=2), (1, 2, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 2, 2, stride=2, padding=1), (1, 2, 3, 2)),
    "batch norm": (lambda: convolutional(norm(2), nn.Conv2d(2, 1, 2)), (1, 2, 2, 2)),
    "max pool": (lambda: convolutional(nn.MaxPool2d(2, 1, 1), nn.Conv2d(2, 1, 2)), (1, 2, 2, 2)),
    "average pool": (lambda: convolutional(nn.AvgPool2d(2, 1, 1, count_include_pad=False)), (1, 2, 3, 2)),
    "adaptive pool": (lambda: convolutional(nn.AdaptiveAvgPool2d(2), nn.Conv2d(2, 1, 2)), (1, 2, 2, 2)),
    "resize": (lambda: convolutional(nn.Upsample(size=(2, 5), mode="bilinear")), (1, 2, 2, 2)),
    "mean": (lambda: Function(lambda m, x: m["a"](x).mean((2, 3)), a=convolutional()), (1, 2, 2, 2)),
    "sequence": (lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.PReLU(3), nn.AvgPool1d(2)), (1, 2, 4)),
}  # fmt: skip


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    make, shape = NETWORKS[name]
    torch.manual_seed(seed)
    model = make().double().eval()
    return model, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_reference_listing(name: str) -> None:
    model, x = build(name)
    reference, found = Listing(model, x), list_paths(model, x)
    weights = np.sort(found.lifting().__abs__())
    expected = np.sort(reference.weights())
    assert not expected[: len(expected) - len(weights)].any()
    np.testing.assert_allclose(weights, expected[len(expected) - len(weights) :], rtol=1e-12)

    # The reference has columns of its own for every use of a tied parameter.
    columns = np.concatenate([np.r_[found.columns[n]] for n, _ in reference.names])
    expected_jacobian = np.zeros((len(reference.paths), len(found.theta)))
    np.add.at(expected_jacobian.T, columns, reference.jacobian().T)
    jacobian = found.jacobian().toarray()
    np.testing.assert_allclose(
        jacobian.T @ jacobian, expected_jacobian.T @ expected_jacobian, rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_signs_and_derivatives_follow_the_network(name: str) -> None:
    """Without ReLU and max, and on ones, the output is the sum of Phi, also in its gradient."""
    if name in ("max pool", "product"):
        pytest.skip("not the sum of its paths: a maximum; a product of an input with itself")
    model, x = build(name)
    for module in list(model.modules()):
        for child, layer in module.named_children():
            if isinstance(layer, (nn.ReLU, nn.PReLU)):
                setattr(module, child, nn.Identity())
    ones = torch.ones_like(x)
    value = model(ones).sum()
    assert float(path_lifting(model, ones).sum()) == pytest.approx(value.item(), rel=1e-12)
    gradients = torch.autograd.grad(value, list(model.parameters()))
    torch.testing.assert_close(
        path_jacobian(model, ones).sum(0), torch.cat([g.flatten() for g in gradients])
    )


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "layer applied twice"])
def test_agrees_with_the_fast_pass(name: str) -> None:
    model, x = build(name, seed=1)
    fast = torch.cat([g.flatten() for g in pathlift.path_kernel_diagonal(model, x).values()])
    torch.testing.assert_close(path_gram(model, x).diagonal(), fast)
    norm = float(torch.linalg.vector_norm(path_lifting(model, x), 3))
    assert norm == pytest.approx(pathlift.path_norm(model, x, p=3), rel=1e-12)


def test_a_parameter_passed_twice_counts_as_in_a_monomial() -> None:
    layer = nn.Linear(1, 1, bias=False)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), layer)
    with torch.no_grad():
        layer.weight.fill_(-3.0)
    x = torch.ones(1, 1)
    assert path_lifting(model, x).tolist() == [-27.0]
    assert path_jacobian(model, x).tolist() == [[27.0]]  # 3 theta^2


def test_a_parameter_of_zero_has_paths() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(0.0)
        model[2].weight.fill_(2.0)
    x = torch.ones(1, 1)
    assert path_lifting(model, x).tolist() == [0.0]
    assert path_jacobian(model, x).tolist() == [[2.0, 0.0]]


def test_one_sample_of_a_batch_is_listed() -> None:
    for name in ("mlp", "batch norm", "sequence"):
        model, x = build(name)
        batch = torch.zeros(3, *x.shape[1:], dtype=torch.float64)
        torch.testing.assert_close(path_lifting(model, batch), path_lifting(model, x))
        torch.testing.assert_close(path_jacobian(model, batch), path_jacobian(model, x))


def test_rescaling_keeps_phi_and_scales_the_gram_matrix() -> None:
    model, x = build("batch norm")
    group = pathlift.rescaling_group(model, x)
    scales = torch.randint(-3, 4, (group.num_scales,), generator=torch.Generator().manual_seed(0))
    exponents = torch.cat(
        [(group.exponents(n) @ scales).flatten() for n, _ in model.named_parameters()]
    )
    phi, gram = path_lifting(model, x), path_gram(model, x)
    group.rescale_(model, scales)
    assert torch.equal(path_lifting(model, x), phi)
    inverse = 2.0**-exponents
    torch.testing.assert_close(path_gram(model, x), inverse[:, None] * gram * inverse)


def test_spectrum_and_rank() -> None:
    """At generic parameters the kernel of dPhi is the rescaling directions and nothing else."""
    for name in ("mlp", "deep", "skip", "without biases"):
        model, x = build(name)
        spectrum = path_kernel_spectrum(model, x)
        expected = torch.linalg.eigvalsh(path_gram(model, x)).flip(0)[: len(spectrum)]
        torch.testing.assert_close(spectrum, expected, rtol=1e-9, atol=1e-12 * float(spectrum[0]))
        parameters = sum(p.numel() for p in model.parameters())
        rank = int((spectrum > 1e-24 * spectrum[0]).sum())
        assert rank == parameters - pathlift.rescaling_group(model, x).num_scales


def test_divergence_at_the_best_reference() -> None:
    model, x = build("mlp")
    eigenvalues = path_kernel_spectrum(model, x)
    eigenvalues = eigenvalues[eigenvalues > 1e-24 * eigenvalues[0]]
    best = float(eigenvalues.mean())
    closed = len(eigenvalues) * (math.log(best) - float(eigenvalues.log().mean()))
    assert logdet_divergence(model, x) == pytest.approx(closed, rel=1e-10)
    assert logdet_divergence(model, x, best) == pytest.approx(closed, rel=1e-10)
    for alpha in (0.9 * best, 1.1 * best):
        assert logdet_divergence(model, x, alpha) > closed
    ratios = eigenvalues / 0.7
    expected = float((ratios - ratios.log() - 1).sum())
    assert logdet_divergence(model, x, 0.7) == pytest.approx(expected, rel=1e-10)


def test_divergence_of_an_identity_and_of_nothing() -> None:
    assert logdet_divergence(nn.Linear(3, 2), torch.zeros(1, 3)) == pytest.approx(0, abs=1e-12)
    zero = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    for p in zero.parameters():
        nn.init.zeros_(p)
    assert logdet_divergence(zero, torch.zeros(1, 2)) == 0.0


def test_determinant_on_the_range_under_rescaling() -> None:
    """``log pdet K(theta') = -2 ln2 sum(E s) + log det(E^T diag(theta')^2 E) + constant``.

    The second term is what the criterion F of METHOD section 3 leaves out.
    """
    for name in ("mlp", "deep", "skip"):
        model, x = build(name)
        group = pathlift.rescaling_group(model, x)
        paths = list_paths(model, x)
        exponents = np.concatenate(
            [group.exponents(n).reshape(-1, group.num_scales).numpy() for n in paths.columns]
        )
        rank = len(paths.theta) - group.num_scales
        random = np.random.default_rng(0)
        constants = []
        for _ in range(4):
            moved = exponents @ random.normal(size=group.num_scales)
            roots = np.linalg.svd(paths.jacobian().toarray() * 2.0**-moved, compute_uv=False)
            directions = (paths.theta * 2.0**moved)[:, None] * exponents
            constants.append(
                2 * np.log(roots[:rank]).sum()
                + 2 * math.log(2) * moved.sum()
                - np.linalg.slogdet(directions.T @ directions)[1]
            )
        np.testing.assert_allclose(constants, constants[0], rtol=0, atol=1e-9)


def test_conditioning_lowers_the_exact_divergence_of_a_bottleneck() -> None:
    torch.manual_seed(0)
    model, x = mlp(4, 6, 2, 6, 3).double(), torch.zeros(1, 4, dtype=torch.float64)
    before = logdet_divergence(model, x)
    conditioned = copy.deepcopy(model)
    pathlift.condition_(conditioned, x)
    assert logdet_divergence(conditioned, x) < before


def test_too_many_paths_are_refused_with_their_number() -> None:
    with pytest.raises(pathlift.PathliftError) as caught:
        path_lifting(mlp(100, 50, 10), torch.zeros(1, 100), max_paths=5050)
    assert str(caught.value).startswith(
        "50,500 paths end in the output of 'linear' (in module '2'), more than max_paths=5,050; "
        "the whole model has about 50,510. Listing is for small networks"
    )
    with pytest.raises(pathlift.PathliftError, match=r"the whole model has about 10\*\*\d+"):
        path_lifting(mlp(*[100] * 20), torch.zeros(1, 100))
    with pytest.raises(pathlift.PathliftError, match="12,000 paths end in the output of 'linear'"):
        path_lifting(nn.Linear(12000, 1), torch.zeros(1, 12000), max_paths=10_000)


def test_wide_jacobians_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_MAX_DENSE_ENTRIES", 100)
    model, x = build("mlp")
    with pytest.raises(pathlift.PathliftError, match="the dense Jacobian of 34 paths and 26 param"):
        path_jacobian(model, x)
    with pytest.raises(pathlift.PathliftError, match="the Gram matrix of 26 parameters has 676"):
        path_gram(model, x)
    assert path_lifting(model, x).shape == (34,)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.GELU(), "'gelu' (in module '1'): it has no paths"),
        (nn.Softmax(-1), "'softmax' (in module '1'): it has no paths"),
        (nn.ReLU6(), "'hardtanh' (in module '1'): with these bounds"),
        (nn.LayerNorm(4), "'layer_norm' (in module '1'): it has no paths"),
        (nn.BatchNorm1d(4, track_running_stats=False), "it divides by statistics of its input"),
        (Function(lambda m, x: x / x.sum()), "the divisor depends on the inputs or parameters"),
        (Function(lambda m, x: x.clamp(min=1.0)), "only bounds of 0 keep every path"),
        (Function(lambda m, x: torch.erf(x)), "paths can't be listed through"),
    ],
)  # fmt: skip
def test_what_has_no_paths_is_refused(layer: nn.Module, reason: str) -> None:
    with pytest.raises(pathlift.UnsupportedOperationError, match=re.escape(reason)):
        path_lifting(nn.Sequential(nn.Linear(3, 4), layer), torch.zeros(2, 3))


@pytest.mark.parametrize("max_paths", [0, 2.5, True, "many"])
def test_arguments_are_checked(max_paths: object) -> None:
    with pytest.raises(pathlift.ArgumentError, match="max_paths must be a positive integer"):
        path_lifting(nn.Linear(2, 2), torch.zeros(1, 2), max_paths=max_paths)


@pytest.mark.parametrize("alpha", [0, -1.0, math.inf, math.nan, "best"])
def test_reference_is_checked(alpha: object) -> None:
    with pytest.raises(pathlift.ArgumentError, match="alpha must be a positive number or None"):
        logdet_divergence(nn.Linear(2, 2), torch.zeros(1, 2), alpha)
