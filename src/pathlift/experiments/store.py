"""Finished cells of a comparison: one Parquet file of one row each, named by the cell's key.

A file appears whole or not at all, so a sweep may end at any time and go on later, and several
sweeps may share a folder.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pathlift.errors import PathliftError
from pathlift.experiments.optional import need

Row = dict[str, Any]


class StoreError(PathliftError):
    """A stored file can't be read."""


class Store:
    """A folder of rows.

    Args:
        folder: made if it is not there.

    Raises:
        MissingDependencyError: pyarrow is not installed.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._arrow = need("pyarrow", "the store of finished cells")
        self._parquet = need("pyarrow.parquet", "the store of finished cells", "pyarrow")
        self.folder.mkdir(parents=True, exist_ok=True)

    def keys(self) -> set[str]:
        """Keys of all rows that are there."""
        return {path.stem for path in self.folder.glob("*.parquet")}

    def write(self, key: str, row: Mapping[str, Any]) -> None:
        """Add or replace a row, atomically: a temporary file beside it, flushed, then renamed."""
        table = self._arrow.Table.from_pylist([{"key": key, **row}])
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                self._parquet.write_table(table, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / f"{key}.parquet")
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def read(self, keys: Iterable[str]) -> list[Row]:
        """The rows of these keys, in their order.

        Raises:
            StoreError: a row is missing or its file is damaged.
        """
        return [self._read(self.folder / f"{key}.parquet") for key in keys]

    def _read(self, path: Path) -> Row:
        try:
            # Not read_table, which takes a file for a data set and starts threads for one row.
            with self._parquet.ParquetFile(path) as file:
                rows: list[Row] = file.read(use_threads=False).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's errors derive from these
            raise StoreError(
                f"{path} can't be read: {error}. Delete the file and run the comparison again; "
                f"only its cell is computed anew."
            ) from error
        return rows[0]
