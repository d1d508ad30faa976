"""The safetensors format: 8 bytes header length, a JSON header, the raw bytes of every tensor.

The length is an unsigned little-endian integer. The header maps names to
``{"dtype", "shape", "data_offsets": [begin, end]}``, offsets counted from the end of the header,
and ``"__metadata__"`` to a mapping of strings. Tensors lie one behind the other without holes, in
C order, little-endian (https://github.com/huggingface/safetensors, section Format).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pathlift.errors import CheckpointError

SUFFIX = ".safetensors"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The reference implementation refuses longer headers too.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a header; ``begin`` counts from the start of the file, in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], about: Any) -> bytes:
    """Length and header of a file whose tensors follow in this order.

    Args:
        tensors: name, dtype and shape of each.
        about: the mapping of strings under ``"__metadata__"``; left out if empty.

    Raises:
        CheckpointError: a dtype the format has no name for.
    """
    entries: dict[str, Any] = {"__metadata__": dict(about)} if about else {}
    at = 0
    for name, dtype, shape in tensors:
        if dtype not in NAMES:
            raise CheckpointError(
                f"'{name}' has dtype {dtype}, which .safetensors has no name for. Supported: "
                f"{', '.join(str(d).removeprefix('torch.') for d in NAMES)}. Convert it."
            )
        end = at + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_header(file: BinaryIO, path: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """Entries in the order in which they lie in the file, and the metadata.

    Raises:
        CheckpointError: not a safetensors file, truncated, or a dtype that is not supported.
    """
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(8)
    if len(start) < 8:
        raise _broken(path, f"it has {size} bytes, too few for a header")
    (length,) = struct.unpack("<Q", start)
    if length > _MAX_HEADER or not file.read(1) == b"{":
        raise _broken(path, "it does not start with a header of the format")
    if 8 + length > size:
        raise _broken(path, f"its header ends at byte {8 + length:,} of {size:,}")
    file.seek(8)
    try:
        entries = json.loads(file.read(length).decode(), object_pairs_hook=_without_repeats)
        about = entries.pop("__metadata__", {})
        found = [_entry(path, name, entry, 8 + length) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, f"its header can't be read ({error})") from error
    found.sort(key=lambda t: (t.begin, t.nbytes))
    at = 8 + length
    for tensor in found:
        if tensor.begin != at:
            raise _broken(path, f"'{tensor.name}' does not start where the tensor before it ends")
        at += tensor.nbytes
    if at != size:
        raise _broken(path, f"its header describes {at:,} bytes, and it has {size:,}")
    return found, {str(k): str(v) for k, v in about.items()}


def _entry(path: Path, name: str, entry: Mapping[str, Any], base: int) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"'{name}' in '{path}' has dtype {entry['dtype']}, which is not supported. Supported: "
            f"{', '.join(DTYPES)}. Convert the checkpoint."
        )
    shape = tuple(entry["shape"])
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"shape of {name!r}")
    begin, end = entry["data_offsets"]
    tensor = TensorInfo(name, DTYPES[entry["dtype"]], shape, base + int(begin))
    if end - begin != tensor.nbytes:
        raise ValueError(f"{name!r} has {end - begin} bytes, its shape {tensor.nbytes}")
    return tensor


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"'{path}' is not a whole .safetensors file: {why}. It may have been cut off while it was "
        f"copied or written. Fetch or write it again."
    )
