"""Room on disk for matrices that need not fit in memory."""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Matrices below this many bytes stay in memory.
_SMALL = 1_000_000


class Scratch:
    """A temporary file for matrices that the solver reads again and again.

    They are mapped: their pages are in memory as long as nothing else needs it. The file has no
    name where the system allows that, so nothing is left of it, whatever happens.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Scratch:
        self._file = tempfile.TemporaryFile(dir=self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def store(self, matrix: Tensor) -> Tensor:
        """The same values, in the file where it is worth it."""
        if matrix.nbytes < _SMALL or matrix.dim() < 2:
            return matrix
        offset = -(-self._file.seek(0, 2) // mmap.ALLOCATIONGRANULARITY)
        offset *= mmap.ALLOCATIONGRANULARITY
        self._file.seek(offset)
        values = matrix.contiguous().numpy()
        self._file.write(values.data)
        self._file.flush()
        mapped: NDArray[Any] = np.memmap(self._file, values.dtype, "r+", offset, values.shape)
        return torch.from_numpy(mapped)
