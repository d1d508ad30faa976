"""Image data sets on disk: IDX (MNIST and its kin), and CIFAR-10 in three layouts.

CIFAR-10 is read from Parquet as data hubs lay it out (``train-00000-of-00001.parquet``: a column
``img`` or ``image``, structs of an encoded picture's ``bytes`` and its ``path``, and one of
``label``), from its binary version, or from a ``cifar10.npz`` (``x_train``, ``y_train``,
``x_test``, ``y_test``).
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathlift.errors import PathliftError
from pathlift.experiments.optional import need

Arrays = tuple[NDArray[Any], NDArray[Any]]
_SIDE = 32  # of a CIFAR picture
_PICTURES = ("img", "image")
_ROWS = 1000  # decoded at a time


class DataError(PathliftError):
    """A data set is not there, or its files are not what their names say."""


def idx_pair(folder: Path, split: str) -> Arrays | None:
    """MNIST's four files; None if they are not in this folder."""
    prefix = "train" if split == "train" else "t10k"
    found = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        # torchvision and some mirrors write a dot where the original has a hyphen.
        stems = (f"{prefix}-{kind}", f"{prefix}-{kind.replace('-idx', '.idx')}")
        paths = [folder / f"{stem}{end}" for stem in stems for end in ("", ".gz")]
        path = next((p for p in paths if p.is_file()), None)
        if path is None:
            return None
        found.append(read_idx(path))
    images, labels = found
    _check_pair(folder, images, labels, (28, 28))
    return images[:, None], labels


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An IDX file of bytes, gzipped if its name ends in ``.gz``.

    Format: two zero bytes, the type (8: unsigned byte), the number of axes, their lengths as
    big-endian 32-bit integers, the entries.

    Raises:
        DataError: the file is not of this format, or is cut short.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} can't be read: {error}. Fetch the file again.") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an IDX file of bytes. Fetch the file again.")
    axes = content[3]
    lengths = content[4 : 4 + 4 * axes]
    shape = tuple(int(n) for n in np.frombuffer(lengths, ">u4", len(lengths) // 4))
    entries = np.frombuffer(content, np.uint8, offset=min(4 + 4 * axes, len(content)))
    if len(shape) != axes or entries.size != math.prod(shape):
        raise DataError(
            f"{path} is cut short or damaged: its header says shape {shape}, and {entries.size} "
            f"bytes follow. Fetch the file again."
        )
    return entries.reshape(shape)


def cifar10(folder: Path, split: str) -> Arrays | None:
    """Bytes (N, 3, 32, 32) and labels (N,); None if no known file is in this folder."""
    tables = sorted(folder.glob(f"{split}-*.parquet"))
    if tables:
        images, labels = zip(*map(_cifar10_parquet, tables), strict=True)
        return np.concatenate(images), np.concatenate(labels)
    archive = folder / "cifar10.npz"
    if archive.is_file():
        return _cifar10_npz(archive, split)
    if split == "test":
        paths = [folder / "test_batch.bin"]
    else:
        paths = sorted(folder.glob("data_batch_*.bin"))
    paths = [p for p in paths if p.is_file()]
    if not paths:
        return None
    records = np.concatenate([_cifar10_records(p) for p in paths])
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def _cifar10_records(path: Path) -> NDArray[np.uint8]:
    """Rows of one label and 3 x 32 x 32 pixels."""
    content = np.frombuffer(path.read_bytes(), np.uint8)
    width = 1 + 3 * 32 * 32
    if content.size == 0 or content.size % width:
        raise DataError(
            f"{path} has {content.size} bytes, which is not a multiple of {width}: it is cut "
            f"short, or not CIFAR-10's binary version. Fetch the file again."
        )
    return content.reshape(-1, width)


def _cifar10_npz(path: Path, split: str) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, labels = archive[f"x_{split}"], archive[f"y_{split}"].reshape(-1)
    except (KeyError, ValueError, OSError) as error:
        raise DataError(
            f"{path} needs plain arrays x_train, y_train, x_test and y_test: {error}."
        ) from error
    if images.ndim == 2:
        images = images.reshape(-1, 3, 32, 32)
    elif images.ndim == 4 and images.shape[-1] == 3:
        images = images.transpose(0, 3, 1, 2)
    _check_pair(path, images, labels, (3, 32, 32))
    return np.ascontiguousarray(images), labels


def _check_pair(
    path: Path, images: NDArray[Any], labels: NDArray[Any], shape: tuple[int, ...]
) -> None:
    if images.shape[1:] != shape or labels.shape != (len(images),):
        raise DataError(
            f"{path}: images must have shape (N, {', '.join(map(str, shape))}) and labels (N,); "
            f"found {images.shape} and {labels.shape}."
        )


def _cifar10_parquet(path: Path) -> Arrays:
    """All pictures of one file, decoded."""
    parquet = need("pyarrow.parquet", "reading Parquet", "pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            column = next((n for n in _PICTURES if n in names), None)
            if column is None or "label" not in names:
                raise DataError(
                    f"{path} has columns {', '.join(names)}; needed are img (or image), structs of "
                    f"encoded bytes, and label. Fetch the file again in the layout of data hubs."
                )
            batches = list(file.iter_batches(_ROWS, columns=[column, "label"], use_threads=False))
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise DataError(f"{path} can't be read: {error}. Fetch the file again.") from error
    pictures = (p for b in batches for p in b.column(column).to_pylist())
    images = np.stack(list(_decoded(path, pictures)))
    labels = np.concatenate([b.column("label").to_numpy() for b in batches])
    return images, labels.astype(np.int64)


def _decoded(path: Path, pictures: Iterator[Any]) -> Iterator[NDArray[np.uint8]]:
    """(3, 32, 32) bytes of every struct of encoded bytes."""
    opened = need("PIL.Image", "decoding pictures", "pillow").open
    for row, picture in enumerate(pictures):
        content = picture.get("bytes") if isinstance(picture, dict) else None
        if not content:
            raise DataError(
                f"{path}: row {row} has no encoded picture. The column must be a struct with "
                f"bytes; files that hold paths alone are not read."
            )
        try:
            image = opened(io.BytesIO(content))
            size = image.size  # known before anything is decoded
            pixels = np.asarray(image.convert("RGB")) if size == (_SIDE, _SIDE) else None
        except (OSError, ValueError, SyntaxError) as error:  # what pillow raises
            raise DataError(f"{path}: row {row} can't be decoded: {error}.") from error
        if pixels is None:
            raise DataError(
                f"{path}: row {row} is a picture of {size[0]} x {size[1]}; CIFAR-10's are "
                f"{_SIDE} x {_SIDE}. Fetch the original sizes."
            )
        yield pixels.transpose(2, 0, 1)
