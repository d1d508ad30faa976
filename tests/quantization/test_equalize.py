"""``equalize_``: function kept, error by its definition, all or nothing, ReLU6 per channel."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.absorption import fold_captured_
from pathlift.capture.inputs import as_inputs
from pathlift.capture.model import capture
from pathlift.quantization import FORMATS, BoundedReLU, equalize_, objective, quantised
from pathlift.quantization import equalize as equalize
from pathlift.quantization.layers import channel_axis, weights
from pathlift.quantization.measure import measure
from pathlift.quantization.objective import Errors, _Stage
from pathlift.quantization.terms import input_scales, term
from pathlift.quantization.trial import rounded_range
from pathlift.symmetry.group import infer_group


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.weight.copy_((torch.randn(m.weight.shape, generator=generator)).exp())
                m.bias.copy_(torch.randn(m.bias.shape, generator=generator))
                m.running_mean.copy_(torch.randn(m.bias.shape, generator=generator))
                m.running_var.copy_(0.5 + torch.rand(m.bias.shape, generator=generator))
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                shape = (len(m.weight), *(1,) * (m.weight.dim() - 1))
                m.weight.mul_(torch.randn(shape, generator=generator).exp())
    return model.eval()


def cnn(relu: type[nn.Module] = nn.ReLU) -> tuple[nn.Module, Tensor]:
    """Plain, depthwise and grouped convolutions."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), relu(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), relu(),
        nn.Conv2d(8, 12, 1, groups=2), nn.BatchNorm2d(12), relu(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip
    return randomise(model), torch.randn(6, 3, 9, 9)


def transformer(seed: int = 7) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    return randomise(nn.Sequential(nn.Linear(4, 16), layer, nn.Linear(16, 3))), torch.randn(6, 7, 4)


def error(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - other(x)).double().square().sum())


def dithered(model: nn.Module, per: str, x: Tensor) -> float:
    """Error by rounding with independent errors: what one way of rounding makes is luck."""
    total = 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        made = copy.deepcopy(model)
        with torch.no_grad():
            for _, module, weight in weights(made):
                size = weight.abs()
                axes = [d for d in range(weight.dim()) if d != channel_axis(module)]
                top = size.max() if per == "tensor" else size.amax(axes, keepdim=True)
                weight += (torch.rand(weight.shape, generator=generator) - 0.5) * top / 127
        total += error(model, made, x) / 20
    return total


@pytest.mark.parametrize("make", [cnn, transformer])
@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_function_kept_and_error_as_predicted(make, per: str) -> None:
    model, x = make()
    made = copy.deepcopy(model)
    report = equalize_(made, x, per=per, absorb=False)
    torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-4)
    assert report.folded == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    y = torch.randn(64, *x.shape[1:])
    folded = copy.deepcopy(model)
    pathlift.absorption.fold_batch_norms_(folded, x)
    power = float(model(y).detach().double().square().sum())
    before, after = (10 * math.log10(power / dithered(m, per, y)) for m in (folded, made))
    assert before == pytest.approx(report.sqnr_before, abs=1.5)
    assert after == pytest.approx(report.sqnr_after, abs=1.5)
    assert after > before + 0.5


def test_weights_stay_where_rounding_was_luckier_than_predicted() -> None:
    """Of what is tried, what rounding harms least is applied; that may be nothing."""
    model, x = transformer(seed=0)
    made = copy.deepcopy(model)
    report = equalize_(made, x, absorb=False)
    assert not report.log2_scales.any() and report.sqnr_after == report.sqnr_before
    assert report.measured_after == report.measured_before == max(report.tried)
    assert all(torch.equal(t, state(made)[n]) for n, t in state(model).items())
    assert "left as they were" in str(report)


@pytest.mark.parametrize("options", [{}, {"format": "int4"}, {"format": "float8_e4m3"}])
@pytest.mark.parametrize("activations", [False, True])
def test_what_is_measured(options: dict[str, str], activations: bool) -> None:
    model, x = cnn()
    made = copy.deepcopy(model)
    calibration = {"activations": [x]} if activations else {}
    report = equalize_(made, x, absorb=False, **calibration, **options)
    assert report.measured_after == max(report.tried) >= report.measured_before
    if not activations:
        rounded = quantised(made, report.format, report.per)
        power = float(model(x).detach().double().square().sum())
        measured = 10 * math.log10(power / error(model, rounded, x))
        assert measured == pytest.approx(report.measured_after, abs=1e-2)


def test_rounded_inputs() -> None:
    """Steps of the range, zero among the values, at most half a step of error."""
    x = torch.linspace(-0.3, 1.0, 1001).reshape(7, -1)
    for name, count in (("int8", 256), ("int4", 16)):
        found = rounded_range(x, FORMATS[name])
        step = 1.3 / (count - 1)
        assert len(found.unique()) <= count and bool((found == 0).any())
        assert float((found - x).abs().max()) <= 0.5001 * step


def by_definition(weight: Tensor, g: Tensor, moved: Tensor, steps: float, per: str) -> float:
    """``sum over groups of (max |w'| / steps)^2 / 12 * sum G'`` in float64."""
    weight, g = weight.double() * 2**moved, g.double() * 2 ** (-2 * moved)
    if per == "tensor":
        return float((weight.abs().max() / steps) ** 2 / 12 * g.sum())
    rows = weight.abs().flatten(1).amax(1)
    return float(((rows / steps) ** 2 / 12 * g.flatten(1).sum(1)).sum())


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_terms_against_their_definition(per: str) -> None:
    """With G a product of rows and columns, as the terms take it."""
    model, x = cnn()
    _, program = fold_captured_(model, capture(model, x, both=False))
    group = infer_group(program)
    generator = torch.Generator().manual_seed(1)
    scales = torch.randn(group.num_scales, generator=generator, dtype=torch.float64)
    moved = group.factors(scales)
    for name in ("0.weight", "3.weight", "6.weight", "11.weight"):
        weight = program.parameters[name].detach()
        g = torch.rand(len(weight), 1, generator=generator) * torch.rand(
            weight.shape[1], generator=generator
        )
        g = g.reshape(*g.shape, *(1,) * (weight.dim() - 2)).expand(weight.shape).clone()
        axis = 0 if per == "channel" else None
        one = term(group.parameters[name], "weight", weight, g, steps=127, axis=axis)
        found = Errors([one], group.basis).total(scales.numpy())
        shift = sum(moved.get(name, []), torch.zeros(()))
        expected = by_definition(weight, g, shift.expand(weight.shape), 127.0, per)
        # Sums of G have a thousandth of their mean added; grouped columns are no product.
        assert found == pytest.approx(expected, rel=0.01 if name != "6.weight" else 0.5), name


@pytest.mark.parametrize("sparse", [0.0, 2.0])
def test_gradient_of_the_smoothed_sum(sparse: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "_SPARSE", sparse)  # none of the matrices, or all
    model, x = cnn()
    _, program = fold_captured_(model, capture(model, x, both=False))
    group = infer_group(program)
    names = [n for n, p in program.parameters.items() if p.dim() > 1]
    found = measure(model, program, [], names, []).sensitivity
    for axis in (None, 0):
        terms = [
            term(group.parameters[n], "weight", program.parameters[n], g, steps=1, axis=axis)
            for n, g in found.items()
        ]
        stage = _Stage(Errors(terms, group.basis), 8.0)
        point = np.random.default_rng(0).normal(size=group.num_scales)
        _, gradient = stage(point)
        for k in range(0, group.num_scales, 5):
            step = 1e-3 * np.eye(group.num_scales)[k]
            slope = (stage(point + step)[0] - stage(point - step)[0]) / 2e-3
            assert gradient[k] == pytest.approx(slope, rel=2e-3, abs=1e-5)


def test_sensitivities_against_derivatives() -> None:
    """Averaged over signs, ``G`` is the sum over outputs of squared derivatives."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).eval(), torch.randn(4, 3)
    program = capture(model, x, both=False)
    found = measure(model, program, list(weights(model)), ["0.weight", "2.bias"], [as_inputs(x)])
    expected = torch.zeros(4, 3)
    for row in x:  # one output: every sign gives the same square
        (gradient,) = torch.autograd.grad(model(row[None]).sum(), [model[0].weight])
        expected += gradient.square() / len(x)
    torch.testing.assert_close(found.sensitivity["0.weight"], expected)
    torch.testing.assert_close(found.sensitivity["2.bias"], torch.ones(1))
    matters, span = found.inputs["2.weight"]
    torch.testing.assert_close(matters, model[2].weight[0].square().detach())
    hidden = model[1](model[0](x)).detach()
    torch.testing.assert_close(span, hidden.amax(0) - hidden.amin(0).clamp(max=0))


def test_input_scales_are_those_of_the_activations() -> None:
    """Divided out of a layer's columns is what its input was multiplied by, in grouped ones too."""
    model, x = cnn()
    _, program = fold_captured_(model, capture(model, x, both=False))
    group = infer_group(program)
    layers = {"3.weight": (3, 8), "6.weight": (6, 2), "11.weight": (11, 1)}
    with torch.no_grad():
        before = {n: model[:k](x).transpose(0, 1).flatten(1) for n, (k, _) in layers.items()}
        scales = torch.randn(group.num_scales, dtype=torch.float64)
        group.rescale_(model, scales)
        values = group.variables(scales)
        for name, (k, groups) in layers.items():
            spec = input_scales(group.parameters[name], groups)
            assert spec is not None
            moved = sum(c * torch.from_numpy(values[ids.numpy()]) for c, ids in spec.terms)
            now = model[:k](x).transpose(0, 1).flatten(1)
            torch.testing.assert_close(now, before[name] * (2**moved).float()[:, None])


def test_activations_and_strength() -> None:
    """At 1 only activations count, at 0 only weights; 0.5 is no worse than either for the sum."""
    model, x = cnn()
    found = {}
    for strength in (0.0, 0.5, 1.0):
        made = copy.deepcopy(model)
        equalize_(made, x, activations=[x], strength=strength, absorb=False)
        found[strength] = equalize_(made, x, activations=[x], absorb=False).sqnr_before
    assert found[0.5] >= max(found[0.0], found[1.0]) - 0.1


def test_relu6_per_channel_keeps_the_function_and_frees_channels() -> None:
    model, x = cnn(nn.ReLU6)
    pinned, freed = copy.deepcopy(model), copy.deepcopy(model)
    before = equalize_(pinned, x, absorb=False)
    after = equalize_(freed, x, relu6="per-channel", absorb=False)
    assert before.num_scales == 0 and after.num_scales == 28 and after.relu6_replaced == 3
    assert sum(isinstance(m, BoundedReLU) for m in freed.modules()) == 3
    assert not torch.equal(freed[2].bound, torch.full_like(freed[2].bound, 6.0))
    y = 40 * x  # beyond the bounds
    assert float((model[:3](y) == 6).float().mean()) > 0.1
    torch.testing.assert_close(freed(y), model(y), rtol=1e-4, atol=1e-4)
    assert after.sqnr_after > before.sqnr_after
    again = pathlift.rescaling_group(freed, x)
    assert again.num_scales == 28


def test_relu6_made_relu_says_what_it_changed() -> None:
    model, x = cnn(nn.ReLU6)
    y = 40 * x
    made = copy.deepcopy(model)
    report = equalize_(made, y, relu6="relu", absorb=False)
    size = model(y).detach().abs().max()
    assert report.change_relu6 == pytest.approx(
        float((made(y) - model(y)).detach().abs().max() / size), rel=1e-3
    )
    assert report.num_scales == 28 and report.change_relu6 > 0.01


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("step", ["apply_best_", "_report", "absorb_captured_"])
def test_all_or_nothing(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = cnn(nn.ReLU6)
    before, names = state(model), [type(m) for m in model.modules()]
    out = model(x)

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(equalize, step, fails)
    with pytest.raises(RuntimeError, match="broken"):
        equalize_(model, x, relu6="per-channel")
    assert [type(m) for m in model.modules()] == names
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    assert torch.equal(model(x), out)


def test_high_biases_are_absorbed_where_that_costs_little() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[1].bias.fill_(8.0)
        model[1].weight.fill_(0.5)
    x = torch.randn(8, 4)
    for _ in range(100):
        model.train()(torch.randn(256, 4))
    model.eval()
    before = model(x)
    report = equalize_(model, x, format="int4")
    assert report.absorbed == 6 and report.change_absorbed < 1e-5
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_formats_round_to_their_values() -> None:
    x = torch.linspace(-1, 1, 1001)
    for name, steps in (("int8", 127), ("int4", 7)):
        rounded = FORMATS[name].rounded(x)
        whole = rounded * steps
        torch.testing.assert_close(whole, whole.round())
        assert float((rounded - x).abs().max()) <= 0.5001 / steps
        variance = float((rounded - x).double().square().mean())
        assert variance == pytest.approx(1 / (12 * steps**2), rel=0.05)
    values = torch.exp(torch.linspace(-5, 0, 10001)).double()
    rounded = FORMATS["float8_e4m3"].rounded(values)
    relative = ((rounded - values) / values).square().mean()
    assert float(relative) == pytest.approx(FORMATS["float8_e4m3"].relative, rel=0.1)
    per_channel = FORMATS["int8"].rounded(torch.stack([x, 100 * x]), axis=0)
    torch.testing.assert_close(per_channel[1], 100 * per_channel[0])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"format": "int3"}, "format 'int3'"),
        ({"per": "row"}, "per 'row'"),
        ({"biases": "keep"}, "biases 'keep'"),
        ({"relu6": "yes"}, "relu6 'yes'"),
        ({"strength": 2}, "strength must be a number from 0 to 1"),
        ({"fold": 1}, "fold must be True or False"),
        ({"activations": []}, "activations is empty"),
    ],
)
def test_wrong_arguments(options: dict[str, object], text: str) -> None:
    model, x = cnn()
    with pytest.raises(pathlift.ArgumentError, match=text):
        equalize_(model, x, **options)


def test_tables_of_embeddings_stay() -> None:
    """Also where a layer shares its weight with one; a weight of two layers is rounded once."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    model["head"].weight = model["table"].weight
    model["one"] = model["two"] = nn.Linear(4, 4)
    assert [name for name, _, _ in weights(model)] == ["one.weight"]
    made = quantised(model, "int4")
    assert torch.equal(made["head"].weight, model["head"].weight)
    assert made["two"].weight.unique().numel() <= 15


def test_training_mode_is_refused() -> None:
    model, x = cnn()
    with pytest.raises(pathlift.ArgumentError, match=r"model\.eval"):
        equalize_(model.train(), x)


def test_report() -> None:
    model, x = cnn()
    report = equalize_(model, x)
    assert [row.name for row in report.table()] == ["0.weight", "3.weight", "6.weight", "11.weight"]
    weight = model[3].weight.detach().abs().flatten(1).amax(1)
    assert report.layers[1].after.highest == pytest.approx(float(weight.max()))
    assert report.layers[1].after.lowest == pytest.approx(float(weight.min()))
    assert report.to_dict()["layers"][1]["after"]["highest"] == pytest.approx(float(weight.max()))
    text = str(report)
    assert "int8 per tensor" in text and "3 batch norms" in text and "dB" in text
    assert "11.weight" in str(report.table())
    pytest.importorskip("matplotlib")
    assert len(report.plot().axes) == 2
