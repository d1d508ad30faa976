"""Expected conditioning: closed forms against sampling and against minimising F directly."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import nn

import pathlift
from pathlift.capture.model import capture
from pathlift.lifting.lifted import diagonal
from pathlift.theory import (
    INITIALIZATIONS,
    expected_diagonal,
    expected_log2_scales,
    mean_squares,
    predict_log2_scales,
    weight_variance,
)


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def squares_of(model: nn.Module, initialization: str = "pytorch") -> dict[str, float]:
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            a, b = layer.in_features, layer.out_features
            found[f"{name}.weight"] = weight_variance(initialization, a, b)
            if layer.bias is not None:
                found[f"{name}.bias"] = 1 / (3 * a)
    return found


def expected_g(
    widths: list[int], v: list[float], u: list[float]
) -> tuple[list[float], list[float]]:
    """``E g`` of a weight and of a bias per layer, path sums written out."""
    depth = len(v)
    weight, bias = [], []
    for layer in range(depth):
        out = math.prod(widths[k + 1] * v[k] for k in range(layer + 1, depth))
        into = math.prod(widths[k] * v[k] for k in range(layer))
        for start in range(layer):
            into += u[start] * math.prod(widths[k] * v[k] for k in range(start + 1, layer))
        weight.append(into * out)
        bias.append(out)
    return weight, bias


DRAWS = {
    "pytorch": lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)),
    "kaiming_normal": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"),
    "kaiming_uniform": lambda w: nn.init.kaiming_uniform_(w, nonlinearity="relu"),
    "xavier": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
}


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_variances_are_those_of_the_initialisations(
    initialization: str, shape: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    drawn = torch.stack([DRAWS[initialization](torch.empty(shape)) for _ in range(100)])
    expected = weight_variance(initialization, shape[1], shape[0])
    assert float(drawn.double().square().mean()) == pytest.approx(expected, rel=0.03)
    assert weight_variance(initialization, 3, 5, gain=2.0) == pytest.approx(
        4 * weight_variance(initialization, 3, 5)
    )


@pytest.mark.parametrize("initialization", ["pytorch", "orthogonal"])
def test_expected_diagonal_is_the_mean_over_samples(initialization: str) -> None:
    torch.manual_seed(0)
    widths = (3, 6, 2, 4)
    model, x = mlp(*widths), torch.zeros(1, 3)
    program = capture(model, x)
    expected = expected_diagonal(model, x, squares_of(model, initialization))
    total = {n: torch.zeros_like(g) for n, g in expected.items()}
    samples = 1500
    for _ in range(samples):
        drawn = {
            n: nn.Parameter(
                DRAWS[initialization](torch.empty_like(p))
                if p.dim() == 2
                else torch.empty_like(p).uniform_(-1, 1) / math.sqrt(model[int(n[0])].in_features)
            )
            for n, p in program.parameters.items()
        }
        values, shift, _ = diagonal(replace(program, parameters=drawn), False)
        for n, g in values.items():
            total[n] += g * 2.0**shift / samples
    for n, g in expected.items():
        # Entries of a layer have one expectation; their mean has the least noise.
        assert float(total[n].mean()) == pytest.approx(float(g.mean()), rel=0.05)
        assert float(g.max()) == pytest.approx(float(g.min()), rel=1e-6)


def test_expected_diagonal_of_a_chain_is_the_written_out_sum() -> None:
    widths, v, u = [3, 6, 2, 4], [0.2, 0.5, 0.1], [0.3, 0.0, 0.7]
    model = mlp(*widths)
    squares = {}
    for k in range(3):
        squares[f"{2 * k}.weight"], squares[f"{2 * k}.bias"] = v[k], u[k]
    found = expected_diagonal(model, torch.zeros(1, 3), squares)
    weight, bias = expected_g(widths, v, u)
    for k in range(3):
        torch.testing.assert_close(
            found[f"{2 * k}.weight"], torch.full_like(found[f"{2 * k}.weight"], weight[k])
        )
        torch.testing.assert_close(
            found[f"{2 * k}.bias"], torch.full_like(found[f"{2 * k}.bias"], bias[k])
        )


@pytest.mark.parametrize("bias", ["pytorch", "zero", [0.3, 0.01, 2.0]])
@pytest.mark.parametrize("gain", [0.05, 1.0, 20.0])
def test_scales_minimise_f(bias: object, gain: float) -> None:
    widths, v = [5, 40, 3, 7], [0.2, 0.01, 0.4]
    u = {"pytorch": [1 / 15, 1 / 120, 1 / 9], "zero": [0.0] * 3}.get(str(bias), bias)
    weight, offset = expected_g(widths, [gain**2 * x for x in v], list(u))
    count = np.array([5 * 40, 40 * 3, 3 * 7, 40, 3, 7], dtype=float)
    log_g = np.log(np.array(weight + offset))

    def objective(s: np.ndarray) -> float:
        full = np.array([0.0, *s, 0.0])
        logs = log_g - 2 * math.log(2) * np.concatenate([np.diff(full), full[1:]])
        return float(np.log((count * np.exp(logs)).sum()) - (count @ logs) / count.sum())

    expected = optimize.minimize(
        objective, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14}
    )
    found = expected_log2_scales(widths, v, gain=gain, bias=bias)
    np.testing.assert_allclose(found, expected.x, atol=1e-5)


def test_closed_form_without_biases() -> None:
    """Equal squared Frobenius norms, whatever the gain; the limit of a large gain with biases."""
    widths = [10, 80, 5, 40, 7]
    counts = np.array(widths[1:]) * np.array(widths[:-1])
    for initialization in INITIALIZATIONS:
        scales = expected_log2_scales(widths, initialization, bias="none")
        v = [weight_variance(initialization, a, b) for a, b in itertools.pairwise(widths)]
        norms = counts * np.array(v) * 4.0 ** np.diff([0.0, *scales, 0.0])
        np.testing.assert_allclose(norms, norms[0], rtol=1e-12)
        again = expected_log2_scales(widths, initialization, bias="none", gain=1e-5)
        np.testing.assert_allclose(again, scales, atol=1e-12)


def test_a_layer_alone_has_no_scale_and_equal_layers_are_balanced() -> None:
    assert expected_log2_scales([4, 3]).shape == (0,)
    assert expected_log2_scales([4, 3], bias="none").shape == (0,)
    np.testing.assert_allclose(expected_log2_scales([64] * 9, bias="none"), 0, atol=1e-12)


@pytest.mark.parametrize("bias", ["pytorch", "none"])
@pytest.mark.parametrize("initialization", ["pytorch", "xavier"])
def test_any_network_agrees_with_the_chain(initialization: str, bias: str) -> None:
    widths = (6, 20, 3, 12, 4)
    model, x = mlp(*widths, bias=bias != "none"), torch.zeros(1, 6)
    found = predict_log2_scales(model, x, squares_of(model, initialization), tol=1e-11)
    chain = expected_log2_scales(widths, initialization, bias=bias)
    np.testing.assert_allclose(found.numpy(), np.repeat(chain, widths[1:-1]), atol=1e-5)


def test_no_depth_or_scale_breaks_the_layer_problem() -> None:
    for gain in (1e-3, 1e3):
        scales = expected_log2_scales([64] * 101, "kaiming_normal", gain=gain)
        assert np.isfinite(scales).all()
    shallow = expected_log2_scales([64] * 3, "kaiming_normal", gain=1e-150)
    assert np.isfinite(shallow).all() and shallow[0] < -100


def test_samples_scatter_around_the_prediction() -> None:
    torch.manual_seed(0)
    widths = (64, 256, 16, 256, 10)
    model, x = mlp(*widths), torch.zeros(1, 64)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    predicted = predict_log2_scales(model, x)
    solved = pathlift.condition_(model, x, exact=False).log2_scales
    chain = np.split(np.repeat(expected_log2_scales(widths), widths[1:-1]), [256, 272])
    for part, expected in zip(solved.split([256, 16, 256]), chain, strict=True):
        assert abs(float(part.mean()) - expected[0]) < 0.08
    assert rms(predicted - solved) < 0.3 * rms(solved)
    # Scales are in the order of the layers: the first layer's weights show theirs.
    moved = (model[0].weight / before["0.weight"]).log2().mean(1).double()
    torch.testing.assert_close(moved, solved[:256], atol=1e-4, rtol=0)


def test_convolutions_and_norms() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 32, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 10),
    ).eval()  # fmt: skip
    model[4].num_batches_tracked.fill_(1)  # the prediction takes running statistics
    x = torch.zeros(1, 3, 12, 12)
    predicted = predict_log2_scales(model, x)
    values = [float(v) for v in predicted]
    layers = [values[:32], values[32:40], values[40:]]
    assert all(max(v) - min(v) < 1e-4 for v in layers)
    solved = pathlift.condition_(model, x, exact=False).log2_scales
    assert rms(predicted - solved) < 0.4 * rms(solved)


def test_prediction_leaves_the_model_alone_and_is_an_element_of_the_group() -> None:
    torch.manual_seed(0)
    model, x = mlp(8, 32, 4, 3), torch.randn(5, 8)
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    scales = predict_log2_scales(model, x)
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())
    outputs = model(x)
    pathlift.rescaling_group(model, x).rescale_(model, scales.round())
    assert torch.equal(model(x), outputs)


def test_mean_squares() -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 3.0]]))
        model.bias.fill_(-2.0)
    assert mean_squares(model) == {"weight": 5.0, "bias": 4.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": [3]}, "widths must be at least two positive integers"),
        ({"widths": [3, 0, 2]}, "widths must be at least two positive integers"),
        ({"widths": [3, 2.5]}, "widths must be at least two positive integers"),
        ({"initialization": "lecun"}, "initialization 'lecun' is unknown. Supported: 'pytorch'"),
        ({"initialization": [0.1]}, "initialization must be a name or 2 positive variances"),
        ({"initialization": [0.1, 0.0]}, "initialization must be a name or 2 positive variances"),
        ({"bias": "ones"}, "bias 'ones' is unknown. Supported: 'pytorch', 'zero', 'none'"),
        ({"bias": [0.1, -1]}, "bias must be a name or 2 non-negative variances"),
        ({"gain": 0}, "gain must be a positive number"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(pathlift.ArgumentError, match=message):
        expected_log2_scales(**{"widths": [4, 5, 6], **arguments})


@pytest.mark.parametrize(
    ("squares", "message"),
    [
        ({"1.weight": 1.0}, "squares names '1.weight', which is no parameter"),
        ({"0.weight": -1.0}, "the expected square of '0.weight' is negative or not finite"),
        ({"0.weight": math.nan}, "the expected square of '0.weight' is negative or not finite"),
        ({"0.weight": torch.ones(7)}, r"has shape \(7,\), which does not broadcast to \(3, 2\)"),
    ],
)
def test_squares_are_checked(squares: dict[str, object], message: str) -> None:
    with pytest.raises(pathlift.ArgumentError, match=message):
        predict_log2_scales(mlp(2, 3, 2), torch.zeros(1, 2), squares)


def test_range_and_operations_without_paths() -> None:
    deep = mlp(*[64] * 120)
    x = torch.zeros(1, 64)
    huge = {n: 1e9 for n, _ in deep.named_parameters()}
    with pytest.raises(pathlift.PathliftError, match="the expected diagonal reaches 2"):
        expected_diagonal(deep, x, huge)
    assert bool(torch.isfinite(predict_log2_scales(deep, x, huge)).all())
    smooth = nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 1))
    with pytest.raises(pathlift.UnsupportedOperationError):
        expected_diagonal(smooth, torch.zeros(1, 2))
