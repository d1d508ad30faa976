"""diag(G) and path norms equal the listing of all paths, on random small networks."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pathlift
from pathlift.capture.model import capture
from pathlift.criteria import path_kernel
from reference.listing import Listing

BLOCKS = (
    "conv",
    "grouped",
    "depthwise",
    "norm",
    "skip",
    "concat",
    "maxpool",
    "avgpool",
    "prelu",
    "scale",
    "parameter",
    "resize",
    "bilinear",
    "transposed",
    "roll",
    "pad",
)


class Random(nn.Module):
    """A chain of random blocks over images of 2 channels, then a linear head."""

    def __init__(self, seed: int, depth: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        torch.manual_seed(seed)
        self.kinds = [rng.choice(BLOCKS) for _ in range(depth)]
        self.layers = nn.ModuleList(self._layer(kind, rng.random() < 0.7) for kind in self.kinds)
        self.gains = nn.ParameterList(torch.randn(2, 1, 1) for _ in range(depth))
        self.head = nn.Linear(2, rng.choice((1, 2)), bias=rng.random() < 0.5)
        self.reduce = rng.choice(("mean", "adaptive", "sum"))

    def _layer(self, kind: str, bias: bool) -> nn.Module:
        if kind in ("conv", "skip"):
            return nn.Conv2d(2, 2, 2, padding="same" if kind == "skip" else 0, bias=bias)
        if kind == "concat":
            return nn.Conv2d(4, 2, 1, bias=bias)
        if kind in ("grouped", "depthwise"):
            return nn.Conv2d(2, 2, 1 if kind == "grouped" else 2, groups=2, padding=1, bias=bias)
        if kind == "norm":
            norm = nn.BatchNorm2d(2, affine=bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if bias:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
            return norm
        if kind == "prelu":
            return nn.PReLU(2)
        if kind == "transposed":
            return nn.ConvTranspose2d(2, 2, 2, stride=1, padding=1, groups=1, bias=bias)
        return nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for kind, layer, gain in zip(self.kinds, self.layers, self.gains, strict=True):
            if min(x.shape[-2:]) < 2 or x.shape[-1] > 3:
                break
            if kind == "skip":
                x = x + torch.relu(layer(x))
            elif kind == "concat":
                x = layer(torch.cat([x, torch.relu(x)], 1))
            elif kind == "maxpool":
                x = F.max_pool2d(x, 2, 1, 1)
            elif kind == "avgpool":
                x = F.avg_pool2d(x, 2, 1, 1, count_include_pad=len(self.kinds) % 2 == 0)
            elif kind == "scale":
                x = -0.7 * x
            elif kind == "parameter":
                x = gain * x
            elif kind == "resize":
                x = F.interpolate(x[..., :2, :2], scale_factor=1.5, mode="nearest")
            elif kind == "bilinear":
                x = F.interpolate(x[..., :2, :2], size=(2, 3), mode="bilinear")
            elif kind == "roll":
                x = torch.roll(x, 1, -1)
            elif kind == "pad":
                x = F.pad(x[..., :2], (1, 0))
            else:
                x = torch.relu(layer(x))
        if self.reduce == "adaptive":
            x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        else:
            x = getattr(x, self.reduce)((2, 3))
        return self.head(x)


def check(model: nn.Module, *inputs: Tensor) -> None:
    model = model.double().eval()
    listing = Listing(model, *inputs)
    found = pathlift.path_kernel_diagonal(model, inputs)
    for name, expected in listing.diagonal().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=0.0)
    for p in (1, 2, 3):
        expected_norm = listing.norm(p)
        assert pathlift.path_norm(model, inputs, p=p) == pytest.approx(expected_norm, rel=1e-10)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10**6), depth=st.integers(1, 2))
def test_random_convolutional_graphs(seed: int, depth: int) -> None:
    check(Random(seed, depth), torch.zeros(1, 2, 2, 2, dtype=torch.float64))


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 10**6),
    widths=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    bias=st.booleans(),
)
def test_random_fully_connected_graphs(seed: int, widths: list[int], bias: bool) -> None:
    torch.manual_seed(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(widths)
            )
            self.skip = nn.Linear(widths[0], widths[-1], bias=not bias)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            h = x
            for layer in self.layers:
                h = F.leaky_relu(layer(h), 0.1)
            return h - self.skip(y), torch.cat([h, y], -1)

    x = torch.zeros(1, widths[0], dtype=torch.float64)
    check(Net(), x, x)


@pytest.mark.parametrize("seed", range(10))
def test_a_parameter_met_twice_by_one_path(seed: int) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(3, 3, bias=seed % 2 == 0)
            self.tied = nn.Parameter(torch.randn(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.shared(torch.relu(self.shared(x))))
            code = torch.relu(F.linear(h, self.tied))
            return F.linear(code, self.tied.transpose(0, 1)) + self.shared(x)

    torch.manual_seed(seed)
    x = torch.zeros(1, 3, dtype=torch.float64)
    check(Twice().double(), x)


def test_values_are_per_sample() -> None:
    torch.manual_seed(0)
    model = Random(3, 2).double().eval()
    one = pathlift.path_kernel_diagonal(model, torch.zeros(1, 2, 2, 2, dtype=torch.float64))
    five = pathlift.path_kernel_diagonal(model, torch.zeros(5, 2, 2, 2, dtype=torch.float64))
    for name, g in one.items():
        torch.testing.assert_close(five[name], g, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_no_depth_or_scale_leaves_the_range(scale: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(m for _ in range(100) for m in (nn.Linear(6, 6, bias=False), nn.ReLU()))
    )
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    x = torch.zeros(1, 6)
    values = path_kernel(capture(model, x)).values
    assert all(bool(torch.isfinite(g).all()) for g in values.values())
    assert all(bool((g > 0).all()) for n, g in values.items())
    assert not math.isnan(pathlift.path_norm(model, x))


def test_operations_without_paths_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 1))
    with pytest.raises(pathlift.UnsupportedOperationError) as caught:
        pathlift.path_norm(model, torch.zeros(1, 2))
    assert str(caught.value).startswith(
        "the path lifting is not defined for 'gelu' (in module '1'): it is not piecewise linear"
    )
