"""A checkpoint as it would be with some of its tensors changed, read from the one that it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from torch import Tensor

from pathlift.checkpoint.format import TensorInfo
from pathlift.checkpoint.reading import Checkpoint, File
from pathlift.checkpoint.writing import as_bytes

# First row and rows of a weight -> the same rows, changed.
Change = Callable[[int, Tensor], Tensor]


class Changed(Checkpoint):
    """A view of an opened checkpoint: some tensors changed by rows, some left out, some new.

    Args:
        source: opened; stays so as long as this is read.
        changed: name -> what is made of its rows, as they are read.
        left_out: names.
        values: name -> a (small) tensor; of that name instead of the one in the checkpoint, or new.
        behind: name of a new tensor -> name of the one that it follows in its file.
    """

    def __init__(
        self,
        source: Checkpoint,
        changed: Mapping[str, Change],
        left_out: Collection[str],
        values: Mapping[str, Tensor],
        behind: Mapping[str, str],
    ) -> None:
        self._source, self._changed, self._values = source, dict(changed), dict(values)
        followers: dict[str, list[str]] = {}
        for name, first in behind.items():
            followers.setdefault(first, []).append(name)
        files = []
        for file in source.files:
            held: list[TensorInfo] = []
            for info in file.tensors:
                if info.name not in left_out:
                    held.append(info)
                for name in followers.get(info.name, ()):
                    value = values[name]
                    held.append(TensorInfo(name, value.dtype, tuple(value.shape), -1))
            files.append(File(file.path, tuple(held), file.about))
        super().__init__(source.path, tuple(files), source.about, source.sharded)

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        if name in self._values:
            return self._values[name].clone()
        found = self._source.read(name)
        return self._changed[name](0, found) if name in self._changed else found

    def pieces(self, name: str, limit: int) -> Iterator[tuple[int, Tensor]]:
        """First row and rows of a tensor, as many at a time as ``limit`` bytes hold."""
        if name in self._values:
            yield 0, self.read(name)
            return
        change = self._changed.get(name)
        for start, rows in self._source.pieces(name, limit):
            yield start, rows if change is None else change(start, rows)

    def raw(self, name: str, limit: int) -> Iterator[Tensor]:
        """The bytes of a tensor, some at a time."""
        if name not in self._values and name not in self._changed:
            yield from self._source.raw(name, limit)
            return
        for _, rows in self.pieces(name, limit):
            yield as_bytes(rows)
