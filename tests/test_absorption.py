"""Folded batch norms and absorbed biases, against the function and a dense reference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.absorption import absorb_biases_, fold_batch_norms_, rescaled_statistics


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                m.weight.copy_(0.1 + torch.rand(m.weight.shape, generator=generator))
                m.bias.copy_(4 * torch.randn(m.bias.shape, generator=generator))
                m.running_mean.copy_(torch.randn(m.bias.shape, generator=generator))
                m.running_var.copy_(0.5 + torch.rand(m.bias.shape, generator=generator))
    return model.double().eval()


def mlp(bias: bool = True) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 12, bias=bias), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(12, 9, bias=bias), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3),
    )  # fmt: skip
    return randomise(model), torch.randn(40, 5, dtype=torch.float64)


def cnn(padding: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=4, padding=padding), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 4, 1), nn.Flatten(),
    )  # fmt: skip
    return randomise(model), torch.randn(6, 3, 7, 7, dtype=torch.float64)


@pytest.mark.parametrize("make", [mlp, lambda: mlp(False), cnn])
def test_folding_keeps_the_function(make) -> None:
    model, x = make()
    before = model(x)
    names = [n for n, _ in model.named_modules()]
    statistics = fold_batch_norms_(model, x[:2])
    assert list(statistics) == [n for n in ("0.bias", "3.bias", "4.bias") if n in statistics]
    assert len(statistics) == 2
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)
    assert [n for n, _ in model.named_modules()] == names
    without = nn.Sequential(
        *(m for m in model if not isinstance(m, nn.modules.batchnorm._BatchNorm))
    )
    torch.testing.assert_close(without(x), before, rtol=1e-10, atol=1e-10)


def test_a_batch_norm_elsewhere_stays() -> None:
    """In front of a layer, behind a sum, read twice, in training mode: not folded."""
    torch.manual_seed(0)
    shared = nn.BatchNorm1d(4)
    model = randomise(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), shared, nn.ReLU(), shared))
    x = torch.randn(5, 4, dtype=torch.float64)
    before, state = model(x), copy.deepcopy(model.state_dict())
    assert fold_batch_norms_(model, x) == {}
    assert torch.equal(model(x), before)
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())


def test_a_batch_norm_without_affine_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.ReLU(), nn.Linear(6, 2)
    )
    model(torch.randn(20, 4))
    model = model.double().eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    before = model(x)
    statistics = fold_batch_norms_(model, x)
    assert torch.equal(statistics["0.bias"][0], torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [mlp, cnn])
def test_absorbing_is_exact_where_nothing_is_cut(make) -> None:
    """With statistics that bound the data the function is kept; the changes are the formula's."""
    model, x = make()
    fold_batch_norms_(model, x[:2])
    before, old = model(x), copy.deepcopy(model.state_dict())
    # Least pre-activations on the data: absorbing them cuts nothing off.
    least: dict[str, tuple[Tensor, Tensor]] = {}
    for k, layer in enumerate(model):
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and k < len(model) - 2:
            values = model[: k + 1](x).transpose(0, 1).flatten(1)
            least[f"{k}.bias"] = (values.amin(1), torch.zeros(len(values), dtype=torch.float64))
    found = absorb_biases_(model, x[:2], least, sigmas=2.0)
    assert found and sum(found.values()) > 0
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)
    changed = [n for n, v in model.state_dict().items() if not torch.equal(v, old[n])]
    assert changed and all(n.endswith("bias") for n in changed)
    first = next(iter(found))
    excess = least[first][0].clamp(min=0)
    assert torch.allclose(model.state_dict()[first], old[first] - excess)


def test_against_the_publication_written_out() -> None:
    model, x = mlp()
    statistics = fold_batch_norms_(model, x[:2])
    a, b, c = (copy.deepcopy(model[k]) for k in (0, 4, 7))
    first = (statistics["0.bias"][0] - 3 * statistics["0.bias"][1]).clamp(min=0)
    second = (statistics["4.bias"][0] - 3 * statistics["4.bias"][1]).clamp(min=0)
    assert first.any() and second.any()
    assert absorb_biases_(model, x[:2], statistics) == {
        "0.bias": int(first.count_nonzero()),
        "4.bias": int(second.count_nonzero()),
    }
    torch.testing.assert_close(model[0].bias, a.bias - first)
    torch.testing.assert_close(model[4].bias, b.bias + b.weight @ first - second)
    torch.testing.assert_close(model[7].bias, c.bias + c.weight @ second)


def test_after_equalization_the_statistics_have_moved() -> None:
    model, x = mlp()
    statistics = fold_batch_norms_(model, x[:2])
    group = pathlift.rescaling_group(model, x[:2])
    before = model[:1](x).mean(0)
    report = pathlift.condition_(model, x[:2], criterion="range")
    assert report.log2_scales.any()
    moved = rescaled_statistics(statistics, group, report.log2_scales)
    factor = model[:1](x).mean(0) / before
    torch.testing.assert_close(moved["0.bias"][0], statistics["0.bias"][0] * factor)
    torch.testing.assert_close(moved["0.bias"][1], statistics["0.bias"][1] * factor)


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.b(y) + y


def test_what_does_not_qualify_is_left_alone() -> None:
    torch.manual_seed(0)
    high = (torch.full((4,), 5.0), torch.zeros(4))
    model = Skip()
    state = copy.deepcopy(model.state_dict())
    assert absorb_biases_(model, torch.randn(2, 4), {"a.bias": high}) == {}
    assert absorb_biases_(model, torch.randn(2, 4), {"b.bias": high}) == {}
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    padded, x = cnn(padding=1)
    statistics = fold_batch_norms_(padded, x[:2])
    assert list(absorb_biases_(padded, x[:2], statistics)) == ["3.bias"]
    assert list(absorb_biases_(padded, x[:2], statistics, padding="ignore")) == ["0.bias", "3.bias"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigmas": -1}, "sigmas must be a number of at least 0; found -1."),
        ({"padding": "zero"}, "padding must be 'refuse' or 'ignore'; found 'zero'."),
        ({"statistics": {"0.weight": (torch.ones(4),) * 2}}, "statistics has an entry '0.weight'"),
        ({"statistics": {"0.bias": (torch.ones(3),) * 2}}, "the bias has (12,)."),
    ],
)
def test_misuse(arguments: dict, message: str) -> None:
    model, x = mlp()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(pathlift.ArgumentError) as error:
        absorb_biases_(model, x[:2], **{"statistics": {}, **arguments})
    assert message in str(error.value)
    with pytest.raises(pathlift.ArgumentError, match="in evaluation mode only"):
        fold_batch_norms_(model.train(), x[:2])
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
