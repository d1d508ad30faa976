"""Real architectures: every bit of the outputs is kept, in both modes and two dtypes."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.capture.inputs import tensors_in
from zoo.libraries import randomise_

models = pytest.importorskip("torchvision.models")
timm = pytest.importorskip("timm")

TORCHVISION = {
    "resnet18": 64,
    "resnet50": 64,
    "vgg16": 32,
    "vgg11_bn": 32,
    "densenet121": 64,
    "googlenet": 96,
    "inception_v3": 299,
    "mobilenet_v2": 64,
    "mnasnet1_0": 64,
    "shufflenet_v2_x1_0": 64,
    "squeezenet1_0": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "efficientnet_b0": 64,
    "convnext_tiny": 64,
    "swin_t": 64,
    "vit_b_16": 32,
}
TIMM = {
    "hrnet_w18": 64,
    "nasnetalarge": 96,
    "legacy_senet154": 64,
    "xception41": 64,
    "gernet_s": 64,
    "convmixer_768_32": 32,
    "coat_mini": 64,
    "levit_384_s8": 64,
    "nextvit_small": 64,
}
QUICK = {
    "resnet18",
    "googlenet",
    "mobilenet_v2",
    "shufflenet_v2_x1_0",
    "squeezenet1_0",
    "regnet_x_400mf",
    "gernet_s",
}
ALL = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.zoo)
    for name in [*TORCHVISION, *TIMM]
]


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in TORCHVISION:
            extra = {"image_size": 32} if name == "vit_b_16" else {}
            if name in ("googlenet", "inception_v3"):
                extra = {"init_weights": False}
            model, size = models.get_model(name, weights=None, **extra), TORCHVISION[name]
        else:
            size = TIMM[name]
            extra = {"img_size": size} if name in ("coat_mini", "levit_384_s8") else {}
            model = timm.create_model(name, **extra)
    randomise_(model)
    return model, torch.randn(2, 3, size, size)


def outputs(model: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    """Outputs and updated buffers from one fixed seed; buffers are put back."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    model.train(training)
    torch.manual_seed(1)
    try:
        with torch.no_grad():
            found = [t.clone() for t in tensors_in(model(x))]
        return found + [b.clone() for b, _ in buffers]
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)


def identical(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ALL)
def test_every_bit_is_kept(name: str, dtype: torch.dtype) -> None:
    model, x = build(name)
    model, x = model.to(dtype), x.to(dtype)
    before = [outputs(model, x, mode) for mode in (False, True)]
    model.train()
    group = pathlift.rescaling_group(model, x)
    assert group.num_scales > 0
    scales = torch.randint(-3, 4, (group.num_scales,))
    group.rescale_(model, scales)
    assert all(identical(before[mode], outputs(model, x, bool(mode))) for mode in (0, 1))
    group.rescale_(model, -scales)
    model.train()
    pathlift.condition_(model, x, exact=True)
    assert all(identical(before[mode], outputs(model, x, bool(mode))) for mode in (0, 1))


def test_a_wrong_scale_is_seen() -> None:
    model, x = build("resnet18")
    before = outputs(model, x, False)
    with torch.no_grad():
        model.layer1[0].conv2.weight[:, 3] *= 2
    assert not identical(before, outputs(model, x, False))
