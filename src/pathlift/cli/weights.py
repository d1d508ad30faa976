"""Weights read for the command line, and written by it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathlift.checkpoint import (
    Shard,
    as_bytes,
    check_target,
    open_checkpoint,
    write_file,
    write_folder,
)
from pathlift.errors import ArgumentError

_PICKLED = (".pt", ".pth", ".bin")


def check_weights(path: Path) -> None:
    """There are weights of a known kind, before any work is done."""
    if not path.exists():
        raise ArgumentError(f"there is no weights file {str(path)!r}. Give a path that exists.")
    if not (path.is_dir() or path.suffix in (".safetensors", ".json", *_PICKLED)):
        raise ArgumentError(
            f"{str(path)!r} has suffix {path.suffix!r}. Supported: .safetensors, an "
            f"index (.json) or the folder of either, .pt, .pth, .bin."
        )


def state_of(path: Path) -> dict[str, Tensor]:
    check_weights(path)
    if path.suffix not in _PICKLED or path.is_dir():
        with open_checkpoint(path) as checkpoint:
            return {name: checkpoint.read(name) for name in checkpoint.tensors}
    try:
        # Never unpickle arbitrary objects: a checkpoint may come from anywhere.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ArgumentError(
            f"{str(path)!r} holds more than tensors, and running code from a checkpoint is "
            f"refused. Save the state dict alone, best as .safetensors."
        ) from error
    odd = not isinstance(state, dict) or any(not isinstance(t, Tensor) for t in state.values())
    if odd:
        raise ArgumentError(
            f"{str(path)!r} is not a state dict of tensors alone. Save model.state_dict()."
        )
    return dict(state)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a checkpoint into a model of the same tensors.

    Raises:
        ArgumentError: other tensors, or a pickle that holds more than tensors.
        CheckpointError: the file can't be read.
    """
    state = state_of(path)
    own = model.state_dict()
    aliases: dict[tuple[int, Any], str] = {}
    for name, tensor in own.items():
        first = aliases.setdefault((tensor.data_ptr(), tensor.shape), name)
        if name not in state and first in state and tensor.numel():
            state[name] = state[first]
    missing = [n for n in own if n not in state]
    unknown = [n for n in state if n not in own]
    shapes = [n for n in own if n in state and own[n].shape != state[n].shape]
    for what, names in (("lack", missing), ("add", unknown), ("change the shape of", shapes)):
        if names:
            raise ArgumentError(
                f"the weights in {str(path)!r} {what} {len(names)} of the model's tensors, "
                f"first {names[0]!r}. Give the weights of this model."
            )
    model.load_state_dict(state)


def check_output(path: Path) -> None:
    """The output can be written, as far as can be told before the work.

    A file ends in .safetensors; everything else is a folder, but for what means a file.
    """
    check_target(path)
    file = path.suffix in (".pt", ".pth", ".bin", ".json", ".npz", ".onnx") or path.is_file()
    if path.suffix != ".safetensors" and file:
        raise ArgumentError(
            f"the output {str(path)!r} must end in .safetensors, or be a folder for files with an "
            f"index."
        )
    if path.suffix == ".safetensors" and path.is_dir():
        raise ArgumentError(f"the output {str(path)!r} is a folder. Name a file, or another one.")
    if not path.parent.is_dir():
        raise ArgumentError(f"there is no folder {str(path.parent)!r}. Make it first.")
    place = path if path.is_dir() else path.parent
    if not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


def save(model: nn.Module, path: Path) -> None:
    """Write the state dict as one file, or as a folder of one file and an index; atomically.

    A tensor that stands under several names is stored once, under its first name; loading fills
    in the others.
    """
    stored: dict[str, Tensor] = {}
    seen: set[tuple[int, Any]] = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        stored[name] = tensor
    # Wide dtypes first, so that every tensor is aligned.
    order = sorted(stored, key=lambda name: -stored[name].dtype.itemsize)
    shard = Shard(
        [(n, stored[n].dtype, tuple(stored[n].shape)) for n in order],
        lambda: (as_bytes(stored[n]) for n in order),
        {"format": "pt"},
    )
    if path.suffix == ".safetensors":
        write_file(path, shard)
    else:
        write_folder(path, [shard], {})
