"""Files and folders that are always whole: the old one or the new one, never a part.

One file is written beside its target, flushed to disk and renamed over it. A folder with an index
is as whole as what its index names: new files get names of their own, the index is replaced last,
and what only the old index named is removed after. What a killed run leaves behind (and no living
process holds a lock on) is removed by the next run with the same target.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pathlift.checkpoint.format import SUFFIX, header
from pathlift.checkpoint.reading import INDEX_NAME
from pathlift.errors import CheckpointError

try:
    import fcntl
except ImportError:  # pragma: no cover - not on Windows, which does not delete open files
    fcntl = None  # type: ignore[assignment]

_SHARD = re.compile(r"model-[0-9a-f]{16}-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Shard:
    """What one file will hold.

    Attributes:
        tensors: name, dtype and shape of each, in order.
        pieces: their bytes, one after the other, as uint8 tensors.
        about: the file's metadata.
    """

    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]
    pieces: Callable[[], Iterator[Tensor]]
    about: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(d.itemsize * torch.Size(s).numel() for _, d, s in self.tensors)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in C order, as a uint8 tensor (a view where possible)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def check_target(path: Path) -> None:
    """Nothing but a file or a folder is ever replaced: no device, no pipe, also not by a link.

    Raises:
        CheckpointError: it is something else.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise CheckpointError(
            f"the output '{path}' is a device or a pipe, which can't be written as a whole. Name a "
            f"file or a folder."
        )


def write_file(path: Path, shard: Shard) -> None:
    """Write one ``.safetensors`` file; at any moment ``path`` is what it was or the new file.

    Raises:
        CheckpointError: a dtype the format has no name for, or ``path`` is a device. ``path`` is
            as it was.
    """
    check_target(path)
    target = path.resolve()  # a link stays a link
    for left in target.parent.glob(f".{_escaped(target.name)}.*.tmp"):
        if _ours(left, target.name):
            _remove_orphan(left)
    with _temporary_file(target) as (file, temporary):
        _write(file, shard)
        os.replace(temporary, target)
    _sync(target.parent)


def write_folder(path: Path, shards: Sequence[Shard], about: dict[str, Any]) -> None:
    """Write a sharded checkpoint with its index; at any moment ``path`` is the old or the new one.

    Other files of the folder stay.

    Args:
        shards: one file each; no tensor in two of them.
        about: the metadata of the index; ``total_size`` is set.

    Raises:
        CheckpointError: another process is writing there, a dtype the format has no name for, or
            ``path`` is a device.
    """
    check_target(path)
    path = path.resolve()
    for left in path.parent.glob(f".{_escaped(path.name)}.*.tmp"):
        if _ours(left, path.name):
            _remove_orphan(left)
    if path.is_dir():
        _replace_in(path, shards, about)
        _sync(path.parent)
        return
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    temporary.mkdir()
    try:
        _replace_in(temporary, shards, about)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(path.parent)


def _replace_in(folder: Path, shards: Sequence[Shard], about: dict[str, Any]) -> None:
    with _locked_folder(folder):
        index = folder / INDEX_NAME
        old = _listed(index)
        for left in [*folder.glob(".*.tmp"), *folder.glob(f"model-*{SUFFIX}")]:
            # No other process writes here, so none of these is in use.
            known = _SHARD.fullmatch(left.name) and left.name not in old
            if known or _ours(left, "model") or _ours(left, INDEX_NAME):
                left.unlink(missing_ok=True)
        weights: dict[str, str] = {}
        for k, shard in enumerate(shards, 1):
            name = _write_shard(folder, shard, f"{k:05}-of-{len(shards):05}")
            weights |= {tensor: name for tensor, _, _ in shard.tensors}
        _sync(folder)
        total = {"total_size": sum(s.nbytes for s in shards)}
        text = json.dumps({"metadata": {**about, **total}, "weight_map": weights}, indent=2)
        with _temporary_file(index) as (file, temporary):
            file.write(text.encode() + b"\n")
            _flush(file)
            os.replace(temporary, index)
        _sync(folder)
        for name in old - set(weights.values()):
            (folder / name).unlink(missing_ok=True)


def _write_shard(folder: Path, shard: Shard, number: str) -> str:
    """Write a file under a name made from its content, so that no other content has that name."""
    with _temporary_file(folder / "model") as (file, temporary):
        digest = _write(file, shard)
        name = f"model-{digest[:16]}-{number}{SUFFIX}"
        os.replace(temporary, folder / name)
    return name


def _listed(index: Path) -> set[str]:
    """Plain names of the files an index names (none if there is no readable index)."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {n for n in names if isinstance(n, str) and Path(n).name == n and n.endswith(SUFFIX)}


def _write(file: BinaryIO, shard: Shard) -> str:
    """Write and flush to disk; returns the SHA-256 of the file."""
    digest = hashlib.sha256()
    start = header(shard.tensors, shard.about)
    digest.update(start)
    file.write(start)
    written = 0
    for piece in shard.pieces():
        data = piece.numpy().data
        digest.update(data)
        file.write(data)
        written += len(data)
    assert written == shard.nbytes
    _flush(file)
    return digest.hexdigest()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Flush a folder's entries, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _temporary_file(target: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A locked file beside ``target``, removed unless it was renamed."""
    while True:
        path = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
        try:
            file = path.open("xb")
        except OSError as error:
            error.filename = str(target)  # the name that means something to the user
            raise
        if _lock(file.fileno()) and path.exists():  # else taken for an orphan just now
            break
        file.close()
    try:
        # The mode of a new file, whatever the mode of what it replaces.
        with file:
            yield file, path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    if fcntl is None:  # pragma: no cover
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not _lock(handle):
            raise CheckpointError(
                f"another process is writing the checkpoint '{folder}'. Wait for it to end, or "
                f"write to another folder."
            )
        yield
    finally:
        os.close(handle)


def _lock(handle: int, unknown: bool = True) -> bool:
    """Take the lock that a living writer holds; False if another has it.

    ``unknown``: the answer on a file system without locks.
    """
    if fcntl is None:  # pragma: no cover
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return unknown
    return True


def _ours(path: Path, name: str) -> bool:
    """Whether this is the name of a temporary of ours for ``name``, and nobody else's file."""
    return re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{16}}\.tmp", path.name) is not None


def _remove_orphan(path: Path) -> None:
    """Remove what a killed run left; what a living one holds stays."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            if not _lock(handle, unknown=False):
                return
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        finally:
            os.close(handle)


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
