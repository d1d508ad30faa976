"""Data sets: some come with scikit-learn, the others are read from files in their usual formats.

Nothing is downloaded unless ``download=True`` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathlift.errors import ArgumentError, unknown
from pathlift.experiments.image_files import Arrays, DataError, cifar10, idx_pair
from pathlift.experiments.optional import need

SPLITS = ("train", "test", "all")
_HELD_OUT = 5  # of the sets without a test set of their own, one sample in five is held out
_PATCH = 8
_PIECE = 64
# Line feed and printable ASCII; what else there is counts as a question mark.
_CHARACTERS = {c: k for k, c in enumerate("\n" + "".join(map(chr, range(32, 127))))}


@dataclass(frozen=True)
class Data:
    """Samples and what to learn from them.

    Attributes:
        name: of the set.
        inputs: (N, *shape), floating point, about zero mean and unit mean square; of text
            (N, T) int64 characters.
        targets: (N,) int64 classes (of text (N, T), the next characters), (N, outputs) numbers to
            be predicted, or None: the inputs are to be reconstructed.
        classes: number of classes; 0 without.
    """

    name: str
    inputs: Tensor
    targets: Tensor | None
    classes: int = 0

    @property
    def kind(self) -> str:
        """``"classification"``, ``"regression"`` or ``"reconstruction"``."""
        if self.targets is None:
            return "reconstruction"
        return "regression" if self.targets.is_floating_point() else "classification"

    @property
    def wanted(self) -> Tensor:
        """What a network is to give for the inputs: the targets, or the inputs themselves."""
        return self.inputs if self.targets is None else self.targets

    @property
    def outputs(self) -> int:
        """How many numbers are to be given for a sample."""
        return self.classes if self.kind == "classification" else self.wanted[0].numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and losses."""
        floats = self.inputs.is_floating_point()
        return self.inputs.dtype if floats else torch.get_default_dtype()

    def reconstruction(self) -> Data:
        """The same inputs, flat and without their classes: (N, features)."""
        return Data(self.name, self.inputs.flatten(1), None)

    def completion(self) -> Data:
        """The lower half of every image from the upper one, both flat: (N, features / 2)."""
        images = self.inputs if self.inputs.dim() > 2 else self.inputs[:, :, None]
        upper, lower = (half.flatten(1) for half in images.chunk(2, dim=-2))
        return Data(self.name, upper, lower)

    def to(self, device: torch.device | str) -> Data:
        """The same on a device."""
        targets = None if self.targets is None else self.targets.to(device)
        return replace(self, inputs=self.inputs.to(device), targets=targets)

    def first(self, count: int | None) -> Data:
        """The first samples; None: all."""
        targets = None if self.targets is None else self.targets[:count]
        return replace(self, inputs=self.inputs[:count], targets=targets)


def load(
    name: str, root: Path | str | None = None, *, split: str = "train", download: bool = False
) -> Data:
    """A data set by name.

    Args:
        name: ``"two-moons"`` (inputs (N, 2)), ``"digits"`` (N, 64), ``"digits-pixelwise"`` (the
            same, every pixel scaled by itself), ``"photographs"`` (grey 8x8 patches, (N, 64),
            reconstruction) and ``"python-manual"`` (text in pieces of 64 characters: what
            ``help()`` of this Python shows of its language) need no files; ``"mnist"`` and
            ``"fashion-mnist"`` (N, 1, 28, 28) are read from IDX files, gzipped or not, and
            ``"cifar10"`` (N, 3, 32, 32) from Parquet as data hubs lay it out, the binary version
            or a ``cifar10.npz``; see :mod:`pathlift.experiments.image_files`.
        root: folder with the files, or with a folder that has them. Fashion-MNIST is also looked
            for where Debian's ``dataset-fashion-mnist`` puts it.
        split: ``"train"``, ``"test"`` or ``"all"``, both. Sets without a test set hold out one
            sample in five.
        download: without files, fetch from OpenML through scikit-learn, whose cache goes to
            ``root``; a copy already there needs no network.

    Raises:
        ArgumentError: an unknown name or split.
        DataError: the files are missing, damaged or can't be downloaded.
        MissingDependencyError: scikit-learn (or for Parquet pyarrow or pillow) is needed and not
            installed.
    """
    if split not in SPLITS:
        raise ArgumentError(f"split must be 'train', 'test' or 'all'; found {split!r}.")
    if name in _EMBEDDED:
        return _held_out(_EMBEDDED[name](), split)
    if name not in _FILES:
        raise unknown("data", name, DATA_SETS)
    parts = ("train", "test") if split == "all" else (split,)
    found = [_images(name, root, part, download) for part in parts]
    images, labels = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return _normalised(name, images, labels)


def digits() -> Tensor:
    """The 1797 handwritten digits of scikit-learn, (1797, 64) float32.

    Each pixel has its mean taken out, and all are divided by one number such that the mean square
    is 1: a squared error is then the share of the variance left unexplained.
    """
    return _standardised(_sklearn("the digits data").load_digits().data)


def _sklearn(purpose: str) -> Any:
    return need("sklearn.datasets", purpose, "scikit-learn")


def _standardised(values: NDArray[Any]) -> Tensor:
    """Means of the columns taken out, all divided by one number: mean square 1."""
    found = torch.tensor(values, dtype=torch.float32)
    found = found - found.mean(0)
    return found / found.square().mean().sqrt()


def _digits() -> Data:
    targets = _sklearn("the digits data").load_digits().target
    return Data("digits", digits(), torch.tensor(targets, dtype=torch.int64), 10)


def _digits_pixelwise() -> Data:
    """Every pixel divided by its own deviation plus 1 (of 16 grey levels): mean square 0.52."""
    found = _sklearn("the digits data").load_digits()
    pixels = torch.tensor(found.data, dtype=torch.float32)
    inputs = (pixels - pixels.mean(0)) / (pixels.std(0) + 1)
    return Data("digits-pixelwise", inputs, torch.tensor(found.target, dtype=torch.int64), 10)


def _two_moons() -> Data:
    points, labels = _sklearn("the two-moons data").make_moons(2000, noise=0.1, random_state=0)
    return Data("two-moons", _standardised(points), torch.tensor(labels, dtype=torch.int64), 2)


def _photographs() -> Data:
    """Grey 8x8 patches of the two photographs of scikit-learn, side by side, (8480, 64)."""
    found = []
    for image in _sklearn("the photographs").load_sample_images().images:
        grey = torch.tensor(image, dtype=torch.float32).mean(-1)
        patches = grey.unfold(0, _PATCH, _PATCH).unfold(1, _PATCH, _PATCH)
        found.append(patches.reshape(-1, _PATCH * _PATCH))
    return Data("photographs", _standardised(torch.cat(found).numpy()), None)


def _python_manual() -> Data:
    """Non-overlapping pieces of the text, (N, 64), each with the piece one character on."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    codes = torch.tensor([_CHARACTERS.get(c, _CHARACTERS["?"]) for c in text], dtype=torch.int64)
    count = (len(codes) - 1) // _PIECE
    inputs, targets = (codes[k : k + count * _PIECE].view(count, _PIECE) for k in (0, 1))
    return Data("python-manual", inputs, targets, len(_CHARACTERS))


def _held_out(data: Data, split: str) -> Data:
    """Four fifths or the other fifth, by a shuffle that is always the same; or all, unshuffled."""
    if split == "all":
        return data
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(data.inputs), generator=generator)
    cut = len(order) // _HELD_OUT
    chosen = order[:cut] if split == "test" else order[cut:]
    targets = None if data.targets is None else data.targets[chosen]
    return replace(data, inputs=data.inputs[chosen], targets=targets)


# The training set's mean and standard deviation per channel, on a scale from 0 to 1.
_FILES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "mnist": ((0.1307,), (0.3081,)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
_EMBEDDED: dict[str, Callable[[], Data]] = {
    "two-moons": _two_moons,
    "digits": _digits,
    "digits-pixelwise": _digits_pixelwise,
    "photographs": _photographs,
    "python-manual": _python_manual,
}
DATA_SETS = (*_EMBEDDED, *_FILES)
# Numbers in a sample, and classes (characters of text).
SIZES = {
    "two-moons": (2, 2),
    "digits": (64, 10),
    "digits-pixelwise": (64, 10),
    "photographs": (64, 0),
    "python-manual": (_PIECE, len(_CHARACTERS)),
    "mnist": (784, 10),
    "fashion-mnist": (784, 10),
    "cifar10": (3072, 10),
}
_FOLDERS = {
    "mnist": ("mnist", "MNIST/raw", "MNIST"),
    "fashion-mnist": ("fashion-mnist", "FashionMNIST/raw", "FashionMNIST"),
    "cifar10": ("cifar10", "cifar-10-batches-bin", "cifar-10"),
}
# Where systems put data sets that they package.
_SYSTEM = {"fashion-mnist": (Path("/usr/share/datasets/fashion-mnist"),)}
_OPENML = {"mnist": "mnist_784", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR_10"}
_TRAIN_SIZE = {"mnist": 60_000, "fashion-mnist": 60_000, "cifar10": 50_000}


def _normalised(name: str, images: NDArray[Any], labels: NDArray[Any]) -> Data:
    mean, deviation = (torch.tensor(v).reshape(-1, 1, 1) for v in _FILES[name])
    inputs = (torch.tensor(images, dtype=torch.float32) / 255 - mean) / deviation
    return Data(name, inputs, torch.tensor(labels, dtype=torch.int64), 10)


def _images(name: str, root: Path | str | None, split: str, download: bool) -> Arrays:
    """Bytes (N, channels, height, width) and labels (N,)."""
    places = [] if root is None else [Path(root) / part for part in ("", *_FOLDERS[name])]
    read = cifar10 if name == "cifar10" else idx_pair
    for folder in [*places, *_SYSTEM.get(name, ())]:
        found = read(folder, split)
        if found is not None:
            return found
    if download:
        return _openml(name, root, split)
    raise DataError(_missing(name, root))


def _missing(name: str, root: Path | str | None) -> str:
    if root is None:
        where = "no folder is given (root is None)"
    elif Path(root).is_dir():
        where = f"there is none in {Path(root).resolve()}"
    else:
        where = f"there is no folder {Path(root).resolve()}"
    files = (
        "train-*.parquet and test-*.parquet as data hubs lay them out, data_batch_1.bin to "
        "data_batch_5.bin and test_batch.bin (the binary version), or cifar10.npz"
        if name == "cifar10"
        else "train-images-idx3-ubyte, train-labels-idx1-ubyte and the two of t10k, gzipped or not"
    )
    debian = " (Debian: apt install dataset-fashion-mnist)" if name == "fashion-mnist" else ""
    return (
        f"{name} is read from files, and {where}. Put {files}, in a folder{debian} and name it by "
        f"root (--root), or pass download=True (--download) where OpenML can be reached."
    )


def _openml(name: str, root: Path | str | None, split: str) -> Arrays:
    fetch = _sklearn(f"downloading {name}").fetch_openml
    home = None if root is None else str(root)
    try:
        found = fetch(_OPENML[name], version=1, as_frame=False, parser="liac-arff", data_home=home)
    except OSError as error:  # URLError, HTTPError, timeouts
        raise DataError(
            f"{name} can't be downloaded from OpenML: {error}. Copy the files here by other "
            f"means and pass their folder as root."
        ) from error
    shape = (3, 32, 32) if name == "cifar10" else (1, 28, 28)
    images = np.asarray(found.data, dtype=np.uint8).reshape(-1, *shape)
    labels = np.asarray(found.target).astype(np.int64)
    cut = _TRAIN_SIZE[name]
    part = slice(None, cut) if split == "train" else slice(cut, None)
    return images[part], labels[part]
