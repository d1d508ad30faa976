"""Checkpoints in the safetensors format: read piece by piece, written atomically."""

from pathlift.checkpoint.changed import Changed
from pathlift.checkpoint.format import SUFFIX, TensorInfo
from pathlift.checkpoint.reading import INDEX_NAME, Checkpoint, open_checkpoint
from pathlift.checkpoint.writing import Shard, as_bytes, check_target, write_file, write_folder

__all__ = [
    "INDEX_NAME",
    "SUFFIX",
    "Changed",
    "Checkpoint",
    "Shard",
    "TensorInfo",
    "as_bytes",
    "check_target",
    "open_checkpoint",
    "write_file",
    "write_folder",
]
