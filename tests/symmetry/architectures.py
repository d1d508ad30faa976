"""Small networks, one or more for every rule, for the oracle and the bit tests.

``CASES`` maps a name to a function that returns (model, inputs). Everything is small enough that
the oracle's Jacobians stay below a few hundred columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Case = tuple[nn.Module, tuple[Tensor, ...]]
CASES: dict[str, Callable[[], Case]] = {}


class Net(nn.Module):
    """Submodules and parameters by name, and a function ``f(net, *inputs)`` as forward."""

    def __init__(self, function: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    CASES[function.__name__.replace("_", " ").strip()] = function
    return function


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def image(channels: int = 2, size: int = 5, batch: int = 2) -> tuple[Tensor]:
    return (torch.randn(batch, channels, size, size),)


def vector(size: int = 3, batch: int = 3) -> tuple[Tensor]:
    return (torch.randn(batch, size),)


def tokens(size: int = 4, length: int = 4, batch: int = 2) -> tuple[Tensor]:
    return (torch.randn(batch, length, size),)


def words(count: int = 5, length: int = 4) -> tuple[Tensor]:
    return (torch.arange(2 * length).reshape(2, length) % count,)


# ------------------------------------------------------------------ one operation in the middle


def sandwich(name: str, middle: Any, dims: int = 2, width: int = 4, out: int | None = None) -> None:
    """conv -> operation -> conv: the hidden channels are free where the operation lets them."""

    def make() -> Case:
        torch.manual_seed(0)
        conv = getattr(nn, f"Conv{dims}d")
        inner = middle() if isinstance(middle, type) or not _is_plain(middle) else None
        net = Net(
            (lambda m, x: m.last(middle(m.first(x))))
            if inner is None
            else (lambda m, x: m.last(m.inner(m.first(x)))),
            first=conv(2, width, 1),
            last=conv(out or width, 2, 1),
            **({} if inner is None else {"inner": inner}),
        )
        return net, (torch.randn(2, 2, *([4] * dims)),)

    CASES[name] = make


class _plain:
    """Marks a function of the activation (as opposed to a module's factory)."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


def _is_plain(value: object) -> bool:
    return isinstance(value, _plain)


for _name, _module in {
    "relu": nn.ReLU,
    "leaky relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "prelu per channel": lambda: nn.PReLU(4),
    "rrelu": nn.RReLU,
    "relu6": nn.ReLU6,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softmax": lambda: nn.Softmax(1),
    "softplus": nn.Softplus,
    "hardswish": nn.Hardswish,
    "hardtanh": lambda: nn.Hardtanh(0.0, 0.5),
    "dropout": lambda: nn.Dropout(0.3),
    "dropout2d": lambda: nn.Dropout2d(0.3),
    "alpha dropout": lambda: nn.AlphaDropout(0.3),
    "max pool": lambda: nn.MaxPool2d(2),
    "max pool ceil": lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "avg pool": lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "lp pool": lambda: nn.LPPool2d(2, 2),
    "adaptive avg pool": lambda: nn.AdaptiveAvgPool2d(3),
    "adaptive max pool": lambda: nn.AdaptiveMaxPool2d(2),
    "upsample nearest": lambda: nn.Upsample(scale_factor=2),
    "upsample bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "upsample bicubic": lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
    "pad zero": lambda: nn.ZeroPad2d(1),
    "pad reflect": lambda: nn.ReflectionPad2d(1),
    "pad replicate": lambda: nn.ReplicationPad2d(1),
    "pad circular": lambda: nn.CircularPad2d(1),
    "pad constant": lambda: nn.ConstantPad2d(1, 0.5),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "batch norm without affine": lambda: nn.BatchNorm2d(4, affine=False),
    "batch norm without statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "layer norm": lambda: nn.LayerNorm([4, 4, 4], elementwise_affine=False),
    "local response norm": lambda: nn.LocalResponseNorm(2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "grouped": lambda: nn.Conv2d(4, 4, 1, groups=2),
    "dilated": lambda: nn.Conv2d(4, 4, 2, dilation=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 2, stride=2),
    "transposed grouped": lambda: nn.ConvTranspose2d(4, 4, 2, groups=2),
    "channel shuffle": lambda: nn.ChannelShuffle(2),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
}.items():
    sandwich(_name, _module)

for _name, _function in {
    "absolute value": torch.abs,
    "negative": torch.neg,
    "square": torch.square,
    "relu squared": lambda x: F.relu(x) ** 2,
    "cube": lambda x: x**3,
    "square root": lambda x: x.abs().sqrt(),
    "reciprocal": lambda x: 1 / (x.abs()),
    "reciprocal square root": lambda x: torch.rsqrt(x.square()),
    "power one half": lambda x: x.abs() ** 0.5,
    "sign": lambda x: x * torch.sign(x),
    "clamp min": lambda x: x.clamp(min=0),
    "clamp max": lambda x: x.clamp(max=0),
    "clamp both": lambda x: x.clamp(0, 1),
    "times scalar": lambda x: 3 * x / 7,
    "plus scalar": lambda x: x + 1,
    "minus self": lambda x: x - x.flip(1),
    "maximum": lambda x: torch.maximum(x[:, :2], x[:, 2:]).repeat(1, 2, 1, 1),
    "minimum": lambda x: torch.minimum(x, x.roll(1, 1)),
    "maxout": lambda x: x.unflatten(1, (2, 2)).amax(2).repeat_interleave(2, 1),
    "roll space": lambda x: x.roll(1, 2),
    "roll channels": lambda x: x.roll(1, 1),
    "flip": lambda x: x.flip(2),
    "index channels": lambda x: x[:, [3, 1, 0, 0]],
    "index select": lambda x: x.index_select(1, torch.tensor([1, 1, 2, 3])),
    "gather": lambda x: x.gather(2, torch.zeros(2, 4, 4, 4, dtype=torch.int64)),
    "scatter": lambda x: torch.zeros_like(x).scatter(
        2, torch.arange(4).reshape(1, 1, 4, 1).expand(2, 4, 4, 4), x
    ),
    "scatter add": lambda x: torch.zeros_like(x).scatter_add(
        2, torch.zeros(2, 4, 4, 4, dtype=torch.int64), x
    ),
    "index add": lambda x: torch.zeros_like(x).index_add(2, torch.tensor([0, 0, 1, 2]), x),
    "cumulative sum space": lambda x: x.cumsum(2),
    "cumulative sum channels": lambda x: x.cumsum(1),
    "cumulative maximum": lambda x: x.cummax(2).values,
    "logarithmic cumulative sum": lambda x: x.logcumsumexp(2),
    "sort": lambda x: x.sort(2).values,
    "top k": lambda x: x.topk(3, 2).values,
    "median": lambda x: x - x.median(2, keepdim=True).values,
    "mean and max": lambda x: x.mean((2, 3), keepdim=True) + x.amax((2, 3), keepdim=True),
    "standard deviation": lambda x: x.std((2, 3), keepdim=True) + x,
    "variance": lambda x: x.var((2, 3), keepdim=True) + x**2,
    "norm over space": lambda x: x.flatten(2).norm(dim=2)[..., None, None] + x,
    "norm over channels": lambda x: x.norm(dim=1, keepdim=True) + x,
    "one norm": lambda x: torch.linalg.vector_norm(x, 1, (2, 3), keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=1),
    "divide by norm over space": lambda x: x / x.flatten(2).norm(dim=2)[..., None, None],
    "log": lambda x: x.abs().log(),
    "exp": lambda x: x.exp(),
    "where zero": lambda x: torch.where(torch.ones(4, 4).tril() > 0, x, 0),
    "where itself": lambda x: torch.where(x > 0, x, 0.1 * x),
    "where two": lambda x: torch.where(torch.ones(4, 4).tril() > 0, x, x.flip(1)),
    "masked fill": lambda x: x.masked_fill(torch.ones(4, 4).tril() > 0, 0.0),
    "masked fill one": lambda x: x.masked_fill(torch.ones(4, 4).tril() > 0, 1.0),
    "tril": torch.tril,
    "split and cat": lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1),
    "chunk and stack": lambda x: torch.stack(x.chunk(2, 1), 1).flatten(1, 2),
    "unbind": lambda x: sum(x.unbind(1))[:, None].repeat(1, 4, 1, 1),
    "pixel shuffle round trip": lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2),
    "space to channels": lambda x: F.pixel_unshuffle(x, 2)[:, ::4],
    "permute and view": lambda x: (
        x.permute(0, 2, 3, 1).reshape(2, 16, 4).transpose(1, 2).reshape(2, 4, 4, 4)
    ),
    "unfold and fold": lambda x: F.fold(F.unfold(x, 2), (4, 4), 2),
    "tensor unfold": lambda x: x.unfold(2, 2, 1).sum(-1),
    "diagonal": lambda x: torch.diagonal(x, dim1=2, dim2=3)[..., None],
    "expand": lambda x: x[:, :, :1, :1].expand(-1, -1, 3, 3),
    "slice with step": lambda x: x[:, :, ::2, 1:],
    "addcmul": lambda x: torch.addcmul(x, x, torch.ones(4, 1, 1)),
    "lerp": lambda x: torch.lerp(x, x.flip(2), 0.3),
    "einsum channels": lambda x: torch.einsum("bchw,bcvw->bchv", x, x),
    "hypot": lambda x: torch.hypot(x, x.flip(2)),
    "write into a view": lambda x: _write(x),
    "interpolate area": lambda x: F.interpolate(x, size=2, mode="area"),
    "grid sample": lambda x: F.grid_sample(
        x,
        torch.linspace(-1, 1, 32, dtype=x.dtype).reshape(1, 4, 4, 2).expand(2, 4, 4, 2),
        align_corners=False,
    ),
    "prod over space": lambda x: x.prod(2, keepdim=True),
    "logsumexp": lambda x: x.logsumexp(2, keepdim=True),
    "fft": lambda x: torch.fft.ifft2(torch.fft.fft2(x)).real,
    "glu": lambda x: F.glu(x, 1).repeat(1, 2, 1, 1),
    "reglu": lambda x: (x[:, :2] * F.relu(x[:, 2:])).repeat(1, 2, 1, 1),
    "softmax over space": lambda x: x.flatten(2).softmax(2).unflatten(2, (4, 4)) * x,
    "tanh gate": lambda x: torch.tanh(x[:, :2]) * x[:, 2:],
}.items():
    sandwich(_name, _plain(_function), out=2 if _name == "tanh gate" else None)


def _write(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :, 0] = F.relu(x[:, :, 1])
    y[:, 1:3] *= 2
    return y


for _dims in (1, 3):
    _suffix = f" {_dims}d"
    sandwich("max pool" + _suffix, (lambda d: lambda: getattr(nn, f"MaxPool{d}d")(2))(_dims), _dims)
    sandwich("avg pool" + _suffix, (lambda d: lambda: getattr(nn, f"AvgPool{d}d")(2))(_dims), _dims)
    sandwich("conv" + _suffix, (lambda d: lambda: getattr(nn, f"Conv{d}d")(4, 4, 2))(_dims), _dims)
    sandwich(
        "transposed" + _suffix,
        (lambda d: lambda: getattr(nn, f"ConvTranspose{d}d")(4, 4, 2))(_dims),
        _dims,
    )
    sandwich(
        "batch norm" + _suffix, (lambda d: lambda: getattr(nn, f"BatchNorm{d}d")(4))(_dims), _dims
    )
    sandwich(
        "adaptive avg pool" + _suffix,
        (lambda d: lambda: getattr(nn, f"AdaptiveAvgPool{d}d")(2))(_dims),
        _dims,
    )
    sandwich(
        "upsample linear" + _suffix,
        (lambda d: lambda: nn.Upsample(scale_factor=2, mode="linear" if d == 1 else "trilinear"))(
            _dims
        ),
        _dims,
    )
