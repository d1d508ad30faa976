"""A checkpoint of one file or of many with an index, read a piece at a time.

Files are read, not mapped: what is in memory is what was asked for, and a file cut off while it is
read is an error and not a signal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pathlift.checkpoint.format import SUFFIX, TensorInfo, read_header
from pathlift.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class File:
    """One file of a checkpoint: what it holds, in order."""

    path: Path
    tensors: tuple[TensorInfo, ...]
    about: dict[str, str]


@dataclass
class Checkpoint:
    """An opened checkpoint; a context manager that keeps its files open.

    Attributes:
        path: as it was given.
        files: in the order of the index.
        about: the metadata of the index (empty for a single file).
        sharded: whether there is an index.
    """

    path: Path
    files: tuple[File, ...]
    about: dict[str, Any] = field(default_factory=dict)
    sharded: bool = False

    def __post_init__(self) -> None:
        self._where = {t.name: (file, t) for file in self.files for t in file.tensors}
        self._stack = ExitStack()
        self._handles: dict[Path, BinaryIO] = {}

    def __enter__(self) -> Checkpoint:
        for file in self.files:
            self._handles[file.path] = self._stack.enter_context(file.path.open("rb", buffering=0))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._handles.clear()

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """name -> dtype, shape and place of every tensor, in the order of the files."""
        return {name: tensor for name, (_, tensor) in self._where.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        _, info = self._where[name]
        return self._read(name, 0, info.nbytes).view(info.dtype).reshape(info.shape)

    def pieces(self, name: str, limit: int) -> Iterator[tuple[int, Tensor]]:
        """First row and rows of a tensor, as many at a time as ``limit`` bytes hold (at least one).

        A tensor without dimensions comes as one piece.
        """
        _, info = self._where[name]
        if not info.shape or not info.nbytes:
            yield 0, self.read(name)
            return
        row = info.nbytes // info.shape[0]
        step = max(1, limit // row)
        for start in range(0, info.shape[0], step):
            rows = min(step, info.shape[0] - start)
            raw = self._read(name, start * row, rows * row)
            yield start, raw.view(info.dtype).reshape(rows, *info.shape[1:])

    def raw(self, name: str, limit: int) -> Iterator[Tensor]:
        """The bytes of a tensor, ``limit`` at a time."""
        _, info = self._where[name]
        for start in range(0, info.nbytes, limit):
            yield self._read(name, start, min(limit, info.nbytes - start))

    def _read(self, name: str, start: int, length: int) -> Tensor:
        file, info = self._where[name]
        data = torch.empty(length, dtype=torch.uint8)
        view, done = memoryview(data.numpy().data), 0
        handle = self._handles[file.path]
        handle.seek(info.begin + start)
        while done < length:
            count = handle.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(
                    f"'{file.path}' ends inside '{name}': it was cut off while it was read. "
                    f"Nothing was written. Restore the file."
                )
            done += count
        return data


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a checkpoint.

    Args:
        path: a ``.safetensors`` file, an index (``….index.json``) or a folder with either.

    Raises:
        CheckpointError: no such file, a broken one, or files and index do not agree.
    """
    if path.is_dir():
        return open_checkpoint(_in_folder(path))
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint '{path}'. Give a path that exists.")
    if path.suffix == ".json":
        return _indexed(path)
    if path.suffix != SUFFIX:
        raise CheckpointError(
            f"'{path}' has suffix '{path.suffix}'. Supported: a {SUFFIX} file, an index "
            f"(model{SUFFIX}.index.json) or the folder of either."
        )
    return Checkpoint(path, (_file(path),))


def _in_folder(folder: Path) -> Path:
    if (folder / INDEX_NAME).is_file():
        return folder / INDEX_NAME
    found = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob(f"*{SUFFIX}"))
    if len(found) != 1:
        raise CheckpointError(
            f"the folder '{folder}' holds {len(found)} possible checkpoints and no {INDEX_NAME}. "
            f"Give the file or the index itself."
        )
    return found[0]


def _file(path: Path) -> File:
    with path.open("rb") as file:
        tensors, about = read_header(file, path)
    return File(path, tuple(tensors), about)


def _indexed(path: Path) -> Checkpoint:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        listed = {str(name): str(file) for name, file in index["weight_map"].items()}
        about = dict(index.get("metadata") or {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"'{path}' is not an index: it needs a mapping 'weight_map' of tensor names to file "
            f"names ({type(error).__name__}: {error})."
        ) from error
    files = []
    for name in dict.fromkeys(listed.values()):
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(
                f"'{path}' lists the file '{name}'. Files must lie beside their index; give plain "
                f"file names."
            )
        if not (path.parent / name).is_file():
            raise CheckpointError(
                f"'{path}' lists the file '{name}', which is missing. Fetch it again."
            )
        files.append(_file(path.parent / name))
    held = {t.name: file.path.name for file in files for t in file.tensors}
    for name, shard in listed.items():
        if held.get(name) != shard:
            place = f"it is in '{held[name]}'" if name in held else "no file has it"
            raise CheckpointError(
                f"'{path}' says that '{shard}' holds '{name}', but {place}. The index and the "
                f"files are not of one checkpoint; fetch them again."
            )
    extra = [n for n in held if n not in listed]
    if extra or sum(len(f.tensors) for f in files) != len(listed):
        name = extra[0] if extra else "a tensor that another file holds too"
        raise CheckpointError(
            f"'{path}' does not list everything its files hold, such as '{name}'. The index and "
            f"the files are not of one checkpoint; fetch them again."
        )
    return Checkpoint(path, tuple(files), about, sharded=True)
