"""Parameters in a checkpoint that need not fit in memory: tensor by tensor, from file to file.

The model is built without values, so that only its structure is in memory. The group is found from
the structure; the criterion reads a parameter where its formula needs it, hands its coefficients on
and lets both go; what stays are the coefficients summed over entries of equal scale, which is all
that the solver needs. Then every tensor is copied to the output, rescaled on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathlift.capture.names import unwrap
from pathlift.checkpoint import SUFFIX, Checkpoint, Shard, as_bytes, write_file, write_folder
from pathlift.homes.scratch import Scratch
from pathlift.homes.skeleton import PIECE, load_buffers, match, parameters_on_meta
from pathlift.tensors.extents import Extent, Factors, extent
from pathlift.tensors.rescale import Target, Undo, in_range, multiply_by_, power_factors, whole
from pathlift.tensors.state import Optimizers

# Phase, bytes done, bytes to do (0 if not known).
Progress = Callable[[str, int, int], None]


class CheckpointHome:
    """A checkpoint and where its rescaled copy goes; see :class:`pathlift.homes.home.Home`.

    Args:
        build: makes the model; called once, under :func:`parameters_on_meta`.
        checkpoint: opened.
        output: a ``.safetensors`` file or a folder.
        scratch: where large matrices are kept.
        report: called with a phase, the bytes done in it and the bytes to do.

    Raises:
        CheckpointError: the checkpoint does not fit the model.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        checkpoint: Checkpoint,
        output: Path,
        scratch: Scratch,
        report: Progress,
    ) -> None:
        self.checkpoint, self.output = checkpoint, output
        self._scratch, self._report = scratch, report
        self._done = 0
        self.model: nn.Module | None = None
        report("building the model without values", 0, 0)
        with parameters_on_meta():
            self.structure = unwrap(build())
        # Name in the checkpoint -> first name in the model, and back.
        self._owners = match(self.structure, checkpoint)
        self._places = {self._owners[n]: n for n in reversed(checkpoint.tensors)}
        load_buffers(self.structure, checkpoint, self._places)

    def value(self, name: str) -> Tensor:
        """A parameter, read when asked for."""
        place = self._places[name]
        self._done += self.checkpoint.tensors[place].nbytes
        self._report("criterion", self._done, 0)
        return self.checkpoint.read(place)

    def label(self, name: str) -> str:
        """How messages speak of a parameter."""
        return f"'{self._places[name]}' in '{self.checkpoint.path}'"

    def extents(self, names: Iterable[str]) -> dict[str, Extent]:
        """The magnitudes of these tensors, in one pass over the files."""
        found = {}
        done, total = 0, self.checkpoint.nbytes
        for name in names:
            place = self._places[name]
            dtype = self.checkpoint.tensors[place].dtype
            if dtype.is_floating_point:
                pieces = []
                for _, piece in self.checkpoint.pieces(place, PIECE):
                    done += piece.nbytes
                    self._report("checking ranges", done, total)
                    pieces.append(extent(piece))
                found[name] = Extent.of_all(dtype, pieces)
        return found

    def store(self, matrix: Tensor) -> Tensor:
        """The same values, on disk where they are many."""
        return self._scratch.store(matrix)

    def settle(self) -> None:
        """Nothing runs here."""

    def worst(self, change: float) -> float:
        """The number itself: there is one process."""
        return change

    def agree(self, scales: NDArray[Any]) -> NDArray[Any]:
        """The scales themselves: there is one process."""
        return scales

    def multiply_(
        self,
        factors: Mapping[str, Factors],
        known: Mapping[str, Extent] | None = None,
        optimizer: Optimizers = None,
    ) -> Undo:
        """Write the rescaled checkpoint; everything is checked before anything is written."""
        assert optimizer is None
        known = known or self.extents(factors)
        if whole(factors):
            factors = in_range(self.value, factors, known)
        # Factors depend on a tensor's dtype alone.
        targets = [Target(torch.empty(0, dtype=known[n].dtype), e) for n, e in factors.items()]
        changes = dict(zip(factors, power_factors(targets), strict=True))
        by_place = {n: changes[first] for n, first in self._owners.items() if first in changes}
        _write(self.checkpoint, by_place, self.output, self._report)
        return lambda: None


def _write(
    checkpoint: Checkpoint, factors: Mapping[str, list[Tensor]], output: Path, report: Progress
) -> None:
    """Copy every file, tensors of ``factors`` multiplied: into one file, or one by one."""
    stored = checkpoint.tensors
    done = 0

    def shard(names: Iterable[str], about: dict[str, str]) -> Shard:
        tensors = [(n, stored[n].dtype, stored[n].shape) for n in names]

        def pieces() -> Iterator[Tensor]:
            nonlocal done
            for name, _, _ in tensors:
                for piece in _rescaled_pieces(checkpoint, name, factors.get(name, [])):
                    done += piece.nbytes
                    report("writing", done, checkpoint.nbytes)
                    yield piece

        return Shard(tensors, pieces, about)

    report("writing", 0, checkpoint.nbytes)
    files = checkpoint.files
    if output.suffix == SUFFIX:
        about = {k: v for file in reversed(files) for k, v in file.about.items()}
        write_file(output, shard(stored, about))
    else:
        shards = [shard((t.name for t in file.tensors), file.about) for file in files]
        write_folder(output, shards, checkpoint.about)


def _rescaled_pieces(
    checkpoint: Checkpoint, name: str, factors: Sequence[Tensor]
) -> Iterator[Tensor]:
    """The bytes of a tensor times its factors, each of which broadcasts to its shape."""
    if not factors:
        yield from checkpoint.raw(name, PIECE)
        return
    for start, piece in checkpoint.pieces(name, PIECE):
        stop = start + (len(piece) if piece.dim() else 1)
        here = [f[start:stop] if f.dim() and f.shape[0] > 1 else f for f in factors]
        multiply_by_(piece, here)
        yield as_bytes(piece)
