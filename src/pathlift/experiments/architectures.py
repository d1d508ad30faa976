"""Networks the experiments train, with PyTorch's default initialisation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pathlift.errors import ArgumentError, unknown
from pathlift.experiments.data import Data
from pathlift.experiments.transformer import HEADS, LanguageModel, hidden_units


def mlp(widths: Sequence[int], batch_norm: bool = False) -> nn.Sequential:
    """Fully connected ReLU network: ``(N, widths[0]) -> (N, widths[-1])``."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths[:-1]):
        layers.append(nn.Linear(fan_in, fan_out))
        if batch_norm:
            layers.append(nn.BatchNorm1d(fan_out))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def autoencoder(widths: Sequence[int] = (64, 128, 32, 8, 32, 128, 64)) -> nn.Sequential:
    """An MLP that narrows to a code and widens again; 64 inputs are the digits' pixels."""
    return mlp(widths)


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut (1x1 where the shape changes)."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or fan_in != fan_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), nn.BatchNorm2d(fan_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18(num_classes: int = 10, in_channels: int = 3, width: int = 64) -> nn.Sequential:
    """ResNet-18 for small images: 3x3 stem, four stages of two blocks, global average pooling."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    fan_in = width
    for stage in range(4):
        fan_out = width * 2**stage
        layers += [_Block(fan_in, fan_out, 2 if stage else 1), _Block(fan_out, fan_out, 1)]
        fan_in = fan_out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(fan_in, num_classes)]
    return nn.Sequential(*layers)


def randomise_norms_(model: nn.Module, seed: int = 0) -> None:
    """Statistics and affine parameters as after training (the defaults hide errors)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 2, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)


class _Global(nn.Module):
    """(N, C, H, W) -> (N, C), the mean over positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def fully_convolutional(
    num_classes: int = 10, in_channels: int = 3, width: int = 128, batch_norm: bool = False
) -> nn.Sequential:
    """Nine convolutions without a linear layer, after Gitman and Ginsburg (arXiv 1709.08145).

    Three of ``width`` channels, three of ``2 width``, then ``5/2 width`` twice and the classes,
    averaged over positions; all 3x3 but the last two, which are 1x1; the last of each group of
    three halves the resolution. With width 128: 3x128, 3x256, 320, 320, 10 channels.
    """
    last = width * 5 // 2
    channels = [width] * 3 + [2 * width] * 3 + [last, last]
    layers: list[nn.Module] = []
    fan_in = in_channels
    for k, fan_out in enumerate(channels):
        kernel = 3 if k < 7 else 1
        layers.append(nn.Conv2d(fan_in, fan_out, kernel, 2 if k in (2, 5) else 1, kernel // 2))
        if batch_norm:
            layers.append(nn.BatchNorm2d(fan_out))
        layers.append(nn.ReLU())
        fan_in = fan_out
    return nn.Sequential(*layers, nn.Conv2d(fan_in, num_classes, 1), _Global())


def data_for(name: str, data: Data) -> Data:
    """The data for what a network of a name does: reconstruct, complete or classify."""
    task = _TASKS.get(name.partition(":")[0])
    if task is None:
        return data
    return data.reconstruction() if task == "reconstruction" else data.completion()


def widths_of(name: str) -> list[int]:
    """Channels of the hidden layers of a name that :func:`build` knows."""
    kind, _, text = name.partition(":")
    sizes = [int(w) for w in text.split("-")]
    if kind == "autoencoder":
        return [*sizes, *sizes[-2::-1]]
    if kind == "transformer":
        return [sizes[0], hidden_units(sizes[0])]
    if kind == "convolutional":
        return [sizes[0]] * 3 + [2 * sizes[0]] * 3 + [sizes[0] * 5 // 2] * 2
    return [sizes[0] * 2**k for k in range(4)] if kind == "resnet18" else sizes


def width_ratio(name: str) -> float:
    """The widest hidden layer over the narrowest."""
    widths = widths_of(name)
    return max(widths) / min(widths)


INITIALIZATIONS = ("pytorch", "kaiming-normal")


def build(
    name: str,
    data: Data,
    *,
    batch_norm: bool = False,
    initialization: str = "pytorch",
    seed: int = 0,
) -> nn.Module:
    """The network of a name for a data set.

    Args:
        name: ``"mlp:64-32"`` (hidden widths), ``"autoencoder:128-32-8"`` (widths down to the code,
            mirrored), ``"completion:128-32"`` (hidden widths of a network from half an image to
            the other half), ``"convolutional:128"`` or ``"resnet18:64"`` (width of the first
            layers), or ``"transformer:32-2"`` (width and layers), for text. Inputs are flattened
            for the first three, and made square one-channel images of for the next two where they
            are flat.
        data: gives the sizes of inputs and outputs.
        batch_norm: put batch norm in front of every hidden ReLU (ResNet-18 has it anyway).
        initialization: ``"pytorch"`` (the modules' own) or ``"kaiming-normal"`` (weights of
            variance 2 / fan_in, biases 0).
        seed: of torch's generator, before the network is made.

    Raises:
        ArgumentError: an unknown name or initialisation, or data the network can't take.
    """
    kind, _, widths = name.partition(":")
    try:
        sizes = [int(w) for w in widths.split("-")]
    except ValueError:
        sizes = [0]
    counts = {"transformer": 2, **dict.fromkeys(IMAGE_KINDS, 1)}
    wrong = kind not in _KINDS or min(sizes) < 1 or len(sizes) != counts.get(kind, len(sizes))
    if wrong:
        raise ArgumentError(
            f"architecture {name!r} is unknown. Supported: mlp:64-32 (hidden widths), "
            f"autoencoder:128-32-8 (widths down to the code), completion:128-32 (hidden widths), "
            f"convolutional:16, resnet18:8 (width), transformer:32-2 (width and layers)."
        )
    if initialization not in INITIALIZATIONS:
        raise unknown("initialization", initialization, INITIALIZATIONS)
    if _TASKS.get(kind, "classification") != data.kind:
        raise ArgumentError(
            f"architecture {name!r} does not fit data {data.name!r}, whose task is {data.kind}: "
            f"an autoencoder reconstructs, a completion predicts numbers, the others classify."
        )
    if (kind == "transformer") == data.inputs.is_floating_point():
        raise ArgumentError(
            f"architecture {name!r} does not fit data {data.name!r}: a transformer reads text, "
            f"such as python-manual, and the others do not."
        )
    torch.manual_seed(seed)
    shape = tuple(data.inputs.shape[1:])
    model = _MODELS.get(kind, _flat_network)
    network = model(kind, sizes, shape, data, batch_norm)
    if initialization == "kaiming-normal":
        kaiming_normal_(network)
    return network


IMAGE_KINDS = ("convolutional", "resnet18")
_TASKS = {"autoencoder": "reconstruction", "completion": "regression"}
_KINDS = ("mlp", *_TASKS, *IMAGE_KINDS, "transformer")


def _flat_network(
    kind: str, sizes: list[int], shape: tuple[int, ...], data: Data, batch_norm: bool
) -> nn.Module:
    features = math.prod(shape)
    hidden = [*sizes, *sizes[-2::-1]] if kind == "autoencoder" else sizes
    network = mlp([features, *hidden, data.outputs], batch_norm)
    return network if len(shape) == 1 else nn.Sequential(nn.Flatten(), *network)


def _image_network(
    kind: str, sizes: list[int], shape: tuple[int, ...], data: Data, batch_norm: bool
) -> nn.Module:
    front: list[nn.Module] = []
    if len(shape) == 1:
        side = math.isqrt(shape[0])
        if side * side != shape[0]:
            raise ArgumentError(
                f"data {data.name!r} has {shape[0]} features, which is no square image. Use an "
                f"mlp or an autoencoder."
            )
        front, shape = [nn.Unflatten(1, (1, side, side))], (1, side, side)
    if kind == "resnet18":
        network = resnet18(data.classes, shape[0], sizes[0])
    else:
        network = fully_convolutional(data.classes, shape[0], sizes[0], batch_norm)
    return nn.Sequential(*front, *network)


def _language_model(
    kind: str, sizes: list[int], shape: tuple[int, ...], data: Data, batch_norm: bool
) -> nn.Module:
    width, layers = sizes
    if width % (2 * HEADS) or batch_norm:
        raise ArgumentError(
            f"a transformer has RMS norms and no batch norm, and its width is a multiple of "
            f"{2 * HEADS}; found width {width}{' and batch norm' if batch_norm else ''}."
        )
    return LanguageModel(data.classes, width, layers, shape[0])


_MODELS = {"transformer": _language_model, **dict.fromkeys(IMAGE_KINDS, _image_network)}


def kaiming_normal_(model: nn.Module) -> None:
    """Weights of variance 2 / fan_in, biases 0, from torch's generator."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
