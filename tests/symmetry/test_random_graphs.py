"""Random graphs of mixed operations: any element of the group keeps every bit, in both modes."""

from __future__ import annotations

import copy
import random

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pathlift

CHANNELS, SIZE = 4, 4


class RandomGraph(nn.Module):
    """Every step reads earlier activations, all of shape (N, 4, 4, 4), and adds one."""

    def __init__(self, seed: int, steps: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        torch.manual_seed(seed)
        self.plan: list[tuple[str, list[int], int]] = []
        self.layers = nn.ModuleDict()
        self.gains = nn.ParameterDict()
        for k in range(steps):
            # Half of the steps are layers, so that there is something to scale.
            kind = rng.choice(sorted(LAYERS if rng.random() < 0.5 else OPERATIONS))
            # The latest activations are read most often, so that depth grows.
            reads = [max(rng.randrange(k + 1), rng.randrange(k + 1)) for _ in range(2)]
            self.plan.append((kind, reads, rng.randrange(1000)))
            layer = LAYERS.get(kind)
            if layer is not None:
                self.layers[str(k)] = layer(rng)
            self.gains[str(k)] = nn.Parameter(torch.randn(CHANNELS, 1, 1))
        self.head = nn.Conv2d(CHANNELS, 2, 1)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                nn.init.normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for k, (kind, reads, number) in enumerate(self.plan):
            a, b = (values[i] for i in reads)
            layer = self.layers[str(k)] if str(k) in self.layers else None  # noqa: SIM401
            values.append(OPERATIONS[kind](a, b, layer, self.gains[str(k)], number))
        return self.head(values[-1]) + self.head(values[len(values) // 2]).mean()


def _conv(groups: int, kernel: int):
    def make(rng: random.Random) -> nn.Module:
        return nn.Conv2d(
            CHANNELS, CHANNELS, kernel, padding=kernel // 2, groups=groups, bias=rng.random() < 0.5
        )

    return make


class Memory(nn.Module):
    """Adds what the calls before have left in a buffer, and leaves something itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(CHANNELS, 1, 1))

    def forward(self, a: Tensor) -> Tensor:
        out = a + self.mean
        self.mean.mul_(0.5).add_(a.detach().mean((0, 2, 3)).view(CHANNELS, 1, 1))
        return out


class Attribute(nn.Module):
    """Keeps its input in a plain attribute: the next call meets it there."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, a: Tensor) -> Tensor:
        out = a if self.last is None else a + self.last
        self.last = a.detach().clone()
        return out


class Flag(nn.Module):
    """Another operation in either mode, read from a flag; the layer is used in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, a: Tensor) -> Tensor:
        return self.layer(a) if self.training else a.flip(1)


LAYERS = {
    "memory": lambda rng: Memory(),
    "attribute": lambda rng: Attribute(),
    "flag": lambda rng: Flag(),
    "conv": _conv(1, 3),
    "pointwise": _conv(1, 1),
    "grouped": _conv(2, 1),
    "depthwise": _conv(4, 3),
    "transposed": lambda rng: nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1, groups=2),
    "batch norm": lambda rng: nn.BatchNorm2d(CHANNELS),
    "group norm": lambda rng: nn.GroupNorm(2, CHANNELS),
    "linear": lambda rng: nn.Linear(SIZE, SIZE, bias=rng.random() < 0.5),
    "mixed channels": lambda rng: nn.Linear(CHANNELS, CHANNELS, bias=rng.random() < 0.5),
    "gate": lambda rng: nn.Conv2d(CHANNELS, CHANNELS, 1),
    "attention": lambda rng: nn.Linear(CHANNELS, 3 * CHANNELS),
    "prelu": lambda rng: nn.PReLU(CHANNELS),
}


def _attention(a: Tensor, layer: nn.Module) -> Tensor:
    q, k, v = layer(a.flatten(2).transpose(1, 2)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, (SIZE, SIZE))


def _without_gradients(a: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        c = a * 2
    return c + b


def _written(a: Tensor, b: Tensor, n: int) -> Tensor:
    c = a.clone()
    c[:, n % 4] = b[:, (n // 4) % 4]
    return c


def _written_in_a_view(a: Tensor, b: Tensor, n: int) -> Tensor:
    """Written through one view, read through another that was made before."""
    c = a.clone(memory_format=torch.contiguous_format)
    seen = c.flatten(2)[:, n % 3 :]
    c[:, 1:].add_(b[:, :-1])
    return torch.cat([seen, c.flatten(2)[:, : n % 3]], 1).unflatten(2, (SIZE, SIZE))


def _gathered(a: Tensor, b: Tensor, n: int) -> Tensor:
    largest, places = b.max(n % 3 + 1, keepdim=True)
    return b + a.gather(n % 3 + 1, places) * 2 - largest


def _split(a: Tensor, b: Tensor, n: int) -> Tensor:
    first, *rest = (a if n % 2 else b).unbind(1)
    variance, mean = torch.var_mean(a, n % 3 + 1, keepdim=True)
    low, high = torch.aminmax(b, dim=1, keepdim=True)
    return torch.stack([*rest, first], 1) + (mean + high if n % 4 < 2 else variance.sqrt() + low)


OPERATIONS = {
    **{
        name: lambda a, b, layer, g, n: layer(a)
        for name in LAYERS
        if name not in ("mixed channels", "gate", "attention")
    },
    "mixed channels": lambda a, b, layer, g, n: layer(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "gate": lambda a, b, layer, g, n: a * torch.sigmoid(layer(b.mean((2, 3), keepdim=True))),
    "attention": lambda a, b, layer, g, n: _attention(a, layer),
    "relu": lambda a, b, layer, g, n: F.relu(a),
    "leaky": lambda a, b, layer, g, n: F.leaky_relu(a, 0.1),
    "gelu": lambda a, b, layer, g, n: F.gelu(a),
    "add": lambda a, b, layer, g, n: a + b,
    "subtract": lambda a, b, layer, g, n: a - 2 * b,
    "multiply": lambda a, b, layer, g, n: a * b,
    "gain": lambda a, b, layer, g, n: a * g,
    "shift": lambda a, b, layer, g, n: a + g,
    "concatenate": lambda a, b, layer, g, n: torch.cat([a[:, : n % 4], b[:, n % 4 :]], 1),
    "chunks": lambda a, b, layer, g, n: torch.cat(a.chunk(2, 1)[::-1], 1),
    "index": lambda a, b, layer, g, n: a[:, [n % 4, (n // 4) % 4, 0, 3]],
    "maximum": lambda a, b, layer, g, n: torch.maximum(a, b),
    "max pool": lambda a, b, layer, g, n: F.max_pool2d(a, 3, 1, 1),
    "average": lambda a, b, layer, g, n: F.avg_pool2d(a, 3, 1, 1),
    "resize": lambda a, b, layer, g, n: F.interpolate(F.max_pool2d(a, 2), scale_factor=2.0),
    "mean": lambda a, b, layer, g, n: a + b.mean((2, 3), keepdim=True),
    "norm": lambda a, b, layer, g, n: a + b.flatten(2).norm(dim=2)[..., None, None],
    "roll": lambda a, b, layer, g, n: a.roll(n % 3, 1 + n % 3),
    "transpose": lambda a, b, layer, g, n: a.transpose(2, 3),
    "shuffle": lambda a, b, layer, g, n: F.channel_shuffle(a, 2),
    "matrix product": lambda a, b, layer, g, n: a @ b.transpose(2, 3),
    "square root": lambda a, b, layer, g, n: (a * a).sqrt(),
    "cumulative": lambda a, b, layer, g, n: a.cumsum(n % 3 + 1),
    "dropout": lambda a, b, layer, g, n: F.dropout(a, 0.3, training=n % 2 == 0),
    "where": lambda a, b, layer, g, n: torch.where(a > 0, a, b),
    "casts": lambda a, b, layer, g, n: a.bfloat16().to(a.dtype) + b.double().to(b.dtype),
    "rounded": lambda a, b, layer, g, n: a.int().to(a.dtype) if n % 2 else a * (b > 0),
    "without gradients": lambda a, b, layer, g, n: _without_gradients(a, b),
    "written": lambda a, b, layer, g, n: _written(a, b, n),
    "written in a view": lambda a, b, layer, g, n: _written_in_a_view(a, b, n),
    # Earlier values change, too: the model's input may be one of them.
    "in place": lambda a, b, layer, g, n: a.mul_(g) if n % 2 else a.transpose(1, 2).add_(b.clone()),
    "gathered": lambda a, b, layer, g, n: _gathered(a, b, n),
    "outputs": lambda a, b, layer, g, n: _split(a, b, n),
    "top": lambda a, b, layer, g, n: b.topk(SIZE, n % 3 + 1)[0],
    "sort": lambda a, b, layer, g, n: a.sort(n % 3 + 1).values,
}


def outputs(model: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    """All that two calls in a row show: outputs, buffers, and what they write into their input."""
    model = copy.deepcopy(model).train(training)
    torch.manual_seed(1)
    found = []
    with torch.no_grad():
        for factor in (1, -2):
            given = factor * x
            found += [model(given).clone(), given, *(b.clone() for b in model.buffers())]
    return found


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10**6), steps=st.integers(2, 12))
def test_every_bit_is_kept(seed: int, steps: int) -> None:
    model = RandomGraph(seed, steps)
    x = torch.randn(2, CHANNELS, SIZE, SIZE)
    before = [outputs(model, x, mode) for mode in (False, True)]
    group = pathlift.rescaling_group(model, x)
    generator = torch.Generator().manual_seed(seed)
    group.rescale_(model, torch.randint(-2, 3, (group.num_scales,), generator=generator))
    for mode in (False, True):
        for a, b in zip(before[mode], outputs(model, x, mode), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())
            assert torch.equal(a.isfinite(), b.isfinite())
