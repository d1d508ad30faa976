"""Finished cells of a comparison: one Parquet file of one row each, named by the cell's key.

A file appears whole or not at all, so a sweep may end at any time and go on later, and several
sweeps may share a folder. Many rows can be packed into one file, which is kept and handed on.
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
        packs: files of many rows (see :meth:`pack`), read where the folder lacks a row.

    Raises:
        MissingDependencyError: pyarrow is not installed.
        StoreError: a pack is damaged.
    """

    def __init__(self, folder: Path | str, packs: Iterable[Path] = ()) -> None:
        self.folder = Path(folder)
        self.packs = tuple(packs)
        self._arrow = need("pyarrow", "the store of finished cells")
        self._parquet = need("pyarrow.parquet", "the store of finished cells", "pyarrow")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._packed = {row["key"]: row for pack in self.packs for row in self._rows(pack)}

    def keys(self) -> set[str]:
        """Keys of all rows that are there."""
        return {path.stem for path in self.folder.glob("*.parquet")} | self._packed.keys()

    def packed(self) -> set[str]:
        """Keys of the rows that the packs hold."""
        return set(self._packed)

    def pack(self, keys: Iterable[str], path: Path) -> None:
        """Write these rows to one file, atomically; curves in single precision.

        Raises:
            StoreError: a row is missing or its file is damaged.
        """
        rows = self.read(sorted(set(keys)))
        # Newer rows say more than older ones.
        names = dict.fromkeys(name for row in rows for name in row)
        rows = [{name: row.get(name) for name in names} for row in rows]
        self._write(self._narrow(self._arrow.Table.from_pylist(rows)), path)

    def _narrow(self, table: Any) -> Any:
        """Lists of doubles as lists of floats: losses were computed in single precision."""
        narrow = self._arrow.list_(self._arrow.float32())
        wide = self._arrow.list_(self._arrow.float64())
        fields = [f.with_type(narrow) if f.type == wide else f for f in table.schema]
        return table.cast(self._arrow.schema(fields))

    def write(self, key: str, row: Mapping[str, Any]) -> None:
        """Add or replace a row, atomically: a temporary file beside it, flushed, then renamed."""
        table = self._arrow.Table.from_pylist([{"key": key, **row}])
        self._write(table, self.folder / f"{key}.parquet")

    def _write(self, table: Any, path: Path) -> None:
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                self._parquet.write_table(table, file, compression="zstd")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def read(self, keys: Iterable[str]) -> list[Row]:
        """The rows of these keys, in their order.

        Raises:
            StoreError: a row is missing or its file is damaged.
        """
        return [self._one(key) for key in keys]

    def _one(self, key: str) -> Row:
        path = self.folder / f"{key}.parquet"
        if key in self._packed and not path.exists():
            return dict(self._packed[key])
        return self._rows(path)[0]

    def _rows(self, path: Path) -> list[Row]:
        try:
            # Not read_table, which takes a file for a data set and starts threads for one row.
            with self._parquet.ParquetFile(path) as file:
                rows: list[Row] = file.read(use_threads=False).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's errors derive from these
            raise StoreError(
                f"{path} can't be read: {error}. Delete the file and run the comparison again; "
                f"only its cells are computed anew."
            ) from error
        return rows
