"""The objective by its definition, entries that become 0, the search and the trials."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy import optimize
from tests.quantization.test_equalize import cnn
from torch import Tensor, nn

import pathlift
from pathlift.absorption import fold_captured_
from pathlift.capture.model import capture
from pathlift.quantization import equalize_, objective, quantised, search
from pathlift.quantization.descent import Curvature, descend
from pathlift.quantization.formats import FORMATS
from pathlift.quantization.layers import weights
from pathlift.quantization.measure import run
from pathlift.quantization.objective import Errors, _Stage
from pathlift.quantization.search import Asked
from pathlift.quantization.terms import flattened, term, thinned
from pathlift.quantization.trial import Trials, apply_best_
from pathlift.symmetry.group import infer_group


def captured():
    model, x = cnn()
    _, program = fold_captured_(model, capture(model, x, both=False))
    return model, program, infer_group(program)


def product(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Sensitivities that are a product of rows and columns."""
    rows = torch.rand(len(weight), 1, generator=generator)
    g = rows * torch.rand(weight.shape[1], generator=generator)
    return g.reshape(*g.shape, *(1,) * (weight.dim() - 2)).expand(weight.shape).clone()


@pytest.mark.parametrize("sparse", [0.0, 2.0])
@pytest.mark.parametrize("q", [8.0, 32.0])
def test_smoothed_sum_by_its_definition(
    q: float, sparse: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``log sum over tensors (sum |w'|^q)^(2/q) / 12 steps^2 sum G'``, also far from the start."""
    monkeypatch.setattr(objective, "_SPARSE", sparse)  # none of the matrices, or all
    _, program, group = captured()
    generator = torch.Generator().manual_seed(0)
    names = ["0.weight", "3.weight", "11.weight"]
    g = {n: product(program.parameters[n], generator) for n in names}
    terms = [
        term(group.parameters[n], "weight", program.parameters[n], g[n], steps=7) for n in names
    ]
    stage = _Stage(Errors(terms, group.basis), q)
    stage(np.zeros(group.num_scales))
    for size in (0.01, 0.5, 3.0):
        point = size * np.random.default_rng(1).normal(size=group.num_scales)
        moved, total = group.factors(point), 0.0
        for name in names:
            weight = program.parameters[name].detach().double()
            factor = torch.exp2(sum(moved.get(name, []), torch.zeros(())).expand(weight.shape))
            # Entries of equal scale (all inputs here, all outputs of the last) count with the
            # largest of them.
            size = (weight * factor).abs()
            top = size.amax(0) if name == "11.weight" else size.flatten(1).amax(1)
            norm = float(top.pow(q).sum() ** (2 / q))
            total += norm / (12 * 49) * float((g[name].double() / factor**2).sum())
        # Sums of G have a thousandth of their mean added.
        assert stage(point)[0] == pytest.approx(np.log(total), abs=0.01)


def test_entries_that_become_zero_have_their_own_square_as_error() -> None:
    _, program, group = captured()
    generator = torch.Generator().manual_seed(0)
    name, steps = "11.weight", 7
    weight, spec = program.parameters[name].detach(), group.parameters[name]
    g = product(weight, generator)
    known = term(spec, "weight", weight, g, steps=steps)
    scales = torch.randn(group.num_scales, generator=generator, dtype=torch.float64)
    moved = group.factors(scales)[name]
    size = weight.abs().double() * torch.exp2(sum(moved, torch.zeros(())))
    dead = size < size.max() / (2 * steps)
    assert 0 < int(dead.sum()) < dead.numel()
    thin = thinned(known, spec, weight, g, moved, steps=steps)
    assert thin.fixed == pytest.approx(float((g * weight.square() * dead).sum()), rel=1e-5)
    alive = (g * ~dead).double()
    # Of every input, a thousandth of the mean added.
    expected = alive.sum(0) + 1e-3 * alive.sum(0).mean()
    np.testing.assert_allclose(thin.by_row, expected.numpy(), rtol=1e-5)


def test_flattened_sensitivities() -> None:
    _, program, group = captured()
    name = "3.weight"
    weight, spec = program.parameters[name].detach(), group.parameters[name]
    known = term(spec, "weight", weight, product(weight, torch.Generator().manual_seed(0)), steps=7)
    assert np.ptp(flattened(known, 0.0).by_row) < 1e-12
    np.testing.assert_allclose(flattened(known, 1.0).by_row, known.by_row)
    half = flattened(known, 0.5).by_row
    np.testing.assert_allclose(half[0] / half[1], (known.by_row[0] / known.by_row[1]) ** 0.5)


def test_descent_finds_what_the_reference_finds() -> None:
    """Within bounds, some of which are active."""
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(40, 20)) * np.exp(generator.normal(size=20))
    wanted = generator.normal(size=40)

    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        powers = np.exp(matrix @ x * 0.3 - wanted)
        return float(np.log(powers.sum())) + 0.05 * float(x @ x), (
            0.3 * matrix.T @ (powers / powers.sum()) + 0.1 * x
        )

    start = np.zeros(20)
    for bound, slack in ((10.0, 1e-4), (0.3, 2e-2)):
        lower, upper = np.full(20, -bound), np.full(20, bound)
        bounds = optimize.Bounds(lower, upper)
        reference = optimize.minimize(function, start, jac=True, method="L-BFGS-B", bounds=bounds)
        point, evaluations = descend(function, start, lower, upper, 200, Curvature())
        assert function(start)[0] > function(point)[0]
        assert function(point)[0] <= reference.fun + slack and evaluations < 250
        assert bool(np.all(np.abs(point) <= bound))


def trials_of(format: str = "int4"):
    model, program, group = captured()
    exact = run(model, program.inputs)
    asked = Asked(True, "shrink", "keep", 0.5, True, FORMATS[format], "tensor")
    before = copy.deepcopy(model.state_dict())
    trials = Trials(model, program, group, list(weights(model)), exact, asked, False)
    return model, group, trials, before


def test_best_of_what_is_tried_is_applied() -> None:
    model, group, trials, before = trials_of()
    drawn = np.random.default_rng(0).normal(size=(3, group.num_scales))
    limits = np.full(group.num_scales, -5.0), np.full(group.num_scales, 5.0)
    apply_best_(trials, list(drawn), limits, 4)
    assert len(trials.errors) == 8 and trials.error == min(trials.errors)
    expected = copy.deepcopy(model)
    expected.load_state_dict(before)
    if trials.scales.any():
        group.rescale_(expected, torch.from_numpy(trials.scales))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_model_is_as_it_was_where_nothing_is_better() -> None:
    model, group, trials, before = trials_of("int8")
    limits = np.full(group.num_scales, -5.0), np.full(group.num_scales, 5.0)
    apply_best_(trials, [np.full(group.num_scales, 4.0)], limits, 0)
    assert not trials.scales.any() and len(trials.errors) == 2
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_small_models_are_searched_nearby() -> None:
    model, x = cnn()
    report = equalize_(model, x, format="int4")
    assert len(report.tried) > 32 and report.measured_after == max(report.tried)


def test_larger_models_are_searched_further_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = cnn()
    monkeypatch.setattr(search, "_SMALL", 0)
    once, more = (
        equalize_(copy.deepcopy(model), x, format="int4", thorough=t) for t in (False, True)
    )
    assert len(once.tried) == 2 < len(more.tried)
    assert more.evaluations > once.evaluations
    assert more.measured_after >= more.measured_before


def test_no_outputs_by_weights_is_an_error() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.layer(x)
            return x * 2

    with pytest.raises(pathlift.ArgumentError, match="no weight of the model reaches an output"):
        equalize_(Constant().eval(), torch.randn(2, 3))


class ByOtherWays(nn.Module):
    """Its weights are reached through a list, and one has a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(6, 12), nn.Linear(12, 5)
        self.listed = [self.narrow.weight, self.wide.weight]
        self.again = nn.Linear(12, 5, bias=False)
        self.again.weight = self.wide.weight

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(nn.functional.linear(x, self.listed[0], self.narrow.bias))
        return nn.functional.linear(y, self.listed[1], self.wide.bias)


def test_weights_reached_by_other_ways_are_rounded_and_scaled() -> None:
    torch.manual_seed(0)
    model, x = ByOtherWays().eval(), torch.randn(16, 6)
    with torch.no_grad():
        model.narrow.weight.mul_(torch.logspace(-2, 2, 12)[:, None])
        exact = model(x)
    before = copy.deepcopy(model)
    before.listed = [before.narrow.weight, before.wide.weight]
    called = []
    model.wide.weight.register_hook(lambda gradient: called.append(gradient))
    model.narrow.bias.requires_grad_(False)
    report = equalize_(model, x)
    assert report.measured_after > report.measured_before + 3
    assert all(np.isfinite(row.sqnr_before) for row in report.layers) and len(report.layers) == 2
    model(x).sum().backward()
    assert len(called) == 1  # by the call above alone, and still there
    assert model.wide.weight.grad is not None and not model.narrow.bias.requires_grad
    assert torch.allclose(model(x), exact, rtol=1e-4, atol=1e-4)
    for one, measured in ((before, report.measured_before), (model, report.measured_after)):
        rounded = quantised(one)
        rounded.listed = [rounded.narrow.weight, rounded.wide.weight]
        error = float((rounded(x) - exact).detach().double().square().sum())
        power = float(exact.double().square().sum())
        assert measured == pytest.approx(10 * np.log10(power / error), abs=0.5)
