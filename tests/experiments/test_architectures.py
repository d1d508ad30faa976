"""Networks by name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import pathlift
from pathlift.errors import ArgumentError
from pathlift.experiments.architectures import build
from pathlift.experiments.data import Data

FLAT = Data("flat", torch.randn(4, 64), torch.tensor([0, 1, 2, 3]), 10)
IMAGES = Data("images", torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]), 10)


def _shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(m.weight.shape) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


@pytest.mark.parametrize("data", [FLAT, IMAGES], ids=["flat", "images"])
@pytest.mark.parametrize("name", ["mlp:12-6", "convolutional:2", "resnet18:2", "autoencoder:12-3"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_every_network_fits_and_conditions_to_the_same_bits(
    data: Data, name: str, batch_norm: bool
) -> None:
    if name.startswith("auto"):
        data = data.reconstruction()
    model = build(name, data, batch_norm=batch_norm)
    out = model(data.inputs)
    assert out.shape == ((4, data.inputs.shape[1]) if name.startswith("auto") else (4, 10))
    norms = sum(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in model.modules())
    expected = {"mlp": 2, "convolutional": 8, "resnet18": 20, "autoencoder": 3}[name.split(":")[0]]
    assert norms == (expected if batch_norm or name.startswith("resnet") else 0)
    report = pathlift.condition_(model, data.inputs, exact=True)
    assert report.max_output_change == 0 and report.num_scales > 0


TEXT = Data("text", torch.arange(16).view(2, 8), torch.arange(16).view(2, 8), 96)


def test_a_language_model_reads_what_came_before() -> None:
    model = build("transformer:8-2", TEXT)
    out = model(TEXT.inputs)
    assert out.shape == (2, 96, 8)
    changed = TEXT.inputs.clone()
    changed[:, 5] += 1
    assert torch.equal(model(changed)[..., :5], out[..., :5])
    assert not torch.equal(model(changed)[..., 6], out[..., 6])
    assert pathlift.condition_(model, TEXT.inputs, exact=True).max_output_change == 0
    assert pathlift.advise(model, TEXT.inputs, "adamw").verdict == "don't"
    # Rotated positions: a score depends on how far apart two places are.
    block = model.blocks[0]
    q, k = torch.randn(2, 1, 2).expand(2, 8, 2)[:, None]
    scores = block._rotated(q) @ block._rotated(k).transpose(-1, -2)
    assert torch.allclose(scores.diagonal(2, -2, -1), scores[..., 0, 2].expand(1, 6), atol=1e-5)


def test_shapes() -> None:
    assert _shapes(build("autoencoder:12-3", FLAT.reconstruction())) == [
        (12, 64),
        (3, 12),
        (12, 3),
        (64, 12),
    ]
    channels = [s[0] for s in _shapes(build("convolutional:128", IMAGES))]
    assert channels == [128] * 3 + [256] * 3 + [320, 320, 10]


def test_initialisation_and_seed() -> None:
    wide = build("mlp:2000", FLAT, initialization="kaiming-normal", seed=3)
    first = next(m for m in wide.modules() if isinstance(m, nn.Linear))
    assert float(first.weight.detach().std()) == pytest.approx(math.sqrt(2 / 64), rel=0.02)
    assert not bool(first.bias.any())
    again = build("mlp:2000", FLAT, initialization="kaiming-normal", seed=3)
    assert all(
        torch.equal(a, b) for a, b in zip(wide.parameters(), again.parameters(), strict=True)
    )
    other = build("mlp:2000", FLAT, initialization="kaiming-normal", seed=4)
    assert not torch.equal(first.weight, next(other.parameters()))


@pytest.mark.parametrize(
    "name", ["vgg:8", "transformer:8", "mlp", "mlp:", "mlp:a", "mlp:0", "resnet18:2-3", "mlp:-3"]
)
def test_unknown_names(name: str) -> None:
    with pytest.raises(ArgumentError, match="is unknown. Supported: mlp:64-32"):
        build(name, FLAT)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ArgumentError, match="a completion predicts numbers, the others"):
        build("mlp:8", FLAT.reconstruction())
    with pytest.raises(ArgumentError, match="a transformer reads text"):
        build("mlp:8", TEXT)
    with pytest.raises(ArgumentError, match="a transformer reads text"):
        build("transformer:8-2", FLAT)
    with pytest.raises(ArgumentError, match="a multiple of 8; found width 12"):
        build("transformer:12-2", TEXT)
    with pytest.raises(ArgumentError, match="has 2 features, which is no square image"):
        build("resnet18:2", Data("pairs", torch.randn(4, 2), torch.zeros(4).long(), 2))
    with pytest.raises(ArgumentError, match="initialization 'zeros' is unknown"):
        build("mlp:8", FLAT, initialization="zeros")
