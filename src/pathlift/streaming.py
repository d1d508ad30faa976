"""Conditioning a checkpoint that need not fit in memory: tensor by tensor, from file to file.

The model is built without values, so that only its structure is in memory. The group is found from
the structure; the criterion reads a parameter where its formula needs it, hands its coefficients on
and lets both go; what stays are the coefficients summed over entries of equal scale, which is all
that the solver needs. Then every tensor is copied to the output, rescaled on the way.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from pathlift.apply import in_range, multiply_by_, power_factors
from pathlift.capture import capture, named_tensors, unwrap
from pathlift.checkpoint import (
    SUFFIX,
    Checkpoint,
    Shard,
    as_bytes,
    open_checkpoint,
    write_file,
    write_folder,
)
from pathlift.condition import check_arguments, choose_scales, summarised, timed
from pathlift.criteria import Criterion, as_criterion
from pathlift.errors import ArgumentError, CaptureError, CheckpointError
from pathlift.extents import Extent, extent, extent_bounds
from pathlift.report import ConditioningReport
from pathlift.solve.assemble import assemble_from
from pathlift.symmetry.group import RescalingGroup, infer_group

# Phase, bytes done, bytes to do (0 if not known).
Progress = Callable[[str, int, int], None]

# Bytes that are read, checked and written at a time where a tensor is not needed as a whole.
_PIECE = 8_000_000

# Matrices below this many bytes stay in memory.
_SMALL = 1_000_000

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def condition_checkpoint(
    build: Callable[[], nn.Module],
    example_inputs: object,
    weights: str | Path,
    output: str | Path,
    *,
    criterion: str | Criterion = "path-kernel",
    exact: bool = True,
    solver: str = "newton",
    tol: float | None = None,
    batch_norm: str = "pinned",
    progress: Progress | None = None,
) -> ConditioningReport:
    """Condition a checkpoint from file to file, with a few tensors in memory at a time.

    The result is that of :func:`pathlift.condition_` on the same model and weights, bit for bit.
    Tensors keep the dtype, the order and the files they have in the checkpoint.

    Memory: the structure of the model with its buffers, the activations of ``example_inputs``, and
    about three tensors of the size of the largest parameter in float32 (more for a float64 model).
    The solver's matrices are as large as a weight where every row and every column has a scale of
    its own, in float32 for the path kernel and float64 for the others. They lie in a temporary
    file beside ``output``, which the solver reads through the page cache: fast where they fit in
    free memory, else as fast as the disk. Free disk space for it: the size of a float32 checkpoint
    for the path kernel, else twice that; twice more where hundreds of layers make the solver
    normalise its matrices.

    Args:
        build: makes the model; called once, with every parameter put on the meta device as it is
            registered. Buffers keep their values.
        example_inputs: as for :func:`pathlift.condition_`; batch 1 needs the least memory.
        weights: a ``.safetensors`` file, an index (``….index.json``) or a folder with either.
        output: a ``.safetensors`` file, or a folder, which gets as many files as ``weights`` has
            and an index. It is replaced at once, when all is written; see
            :mod:`pathlift.checkpoint.writing`. It may be ``weights`` itself.
        criterion: ``"path-kernel"``, ``"weight-norm"``, ``"range"``, or a criterion such as
            ``weight_norm(q=1)`` from :mod:`pathlift.criteria`.
        exact, solver, tol, batch_norm: see :func:`pathlift.condition_`.
        progress: called with a phase, the bytes done in it and the bytes to do (0: not known).

    Returns:
        The report; outputs are not verified (exactness is proven by the ranges of the weights, and
        the activations of no input are looked at).

    Raises:
        CheckpointError: the checkpoint is broken, does not fit the model or can't be written.
        RangeError: a tensor would leave the normal range of its dtype.
        ArgumentError, CaptureError: see :func:`pathlift.condition_`.

    In every case of failure the output is as before.
    """
    check_arguments(exact, None, tol, True)
    chosen = as_criterion(criterion)
    weights, output = Path(weights), Path(output)
    report = progress or (lambda phase, done, total: None)
    seconds: dict[str, float] = {}
    report("reading headers", 0, 0)
    with open_checkpoint(weights) as checkpoint, Scratch(output.resolve().parent) as scratch:
        with timed(seconds, "capture"):
            report("building the model without values", 0, 0)
            with parameters_on_meta():
                model = unwrap(build())
            owners = match(model, checkpoint)
            places = {owners[n]: n for n in reversed(checkpoint.tensors)}
            _load_buffers(model, checkpoint, places)
            values = _Values(checkpoint, places, report)
            program = capture(model, example_inputs, source=values)
        with timed(seconds, "symmetry"):
            report("finding the rescaling group", 0, 0)
            group = infer_group(program, batch_norm)
        with timed(seconds, "criterion"):
            extents = _survey(group, checkpoint, places, report)
            lower, upper = extent_bounds(group, extents)
            values.phase = "criterion"
            assembled, approximated = assemble_from(
                group, chosen, program, lower=lower, upper=upper, store=scratch.store
            )
        with timed(seconds, "solve"):
            report("solving", 0, 0)
            solution, scales = choose_scales(assembled.operator, solver, tol, exact)
        with timed(seconds, "apply"):
            changes = _changes(group, scales, extents, values)
            factors = {n: changes[first] for n, first in owners.items() if first in changes}
            _write(checkpoint, factors, output, report)
    seconds["verify"] = 0.0
    return summarised(group, assembled, solution, scales, approximated, None, seconds)


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


# --------------------------------------------------------------------------- model without values


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put every floating-point parameter on the meta device as it is registered.

    Unlike under ``torch.device("meta")``, buffers keep their values (masks, frequencies, tables).
    A parameter that is registered twice stays one parameter.
    """

    def strip(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if (
            parameter is None
            or parameter.is_meta
            or not parameter.is_floating_point()
            or nn.parameter.is_lazy(parameter)
        ):
            return None
        stripped = parameter.__dict__.get("_pathlift_stripped")
        if stripped is None:
            empty = torch.empty_like(parameter, device="meta")
            stripped = nn.Parameter(empty, parameter.requires_grad)
            stripped.__dict__.update(parameter.__dict__)
            parameter.__dict__["_pathlift_stripped"] = stripped
        return stripped

    handle = register_module_parameter_registration_hook(strip)
    try:
        yield
    finally:
        handle.remove()


def match(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Name in the checkpoint -> first name in the model of the same tensor.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape or of a dtype that is not
            supported, or names that the model ties have different values.
    """
    parameters, _, aliases = named_tensors(model)
    own = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    stored = checkpoint.tensors
    for name in stored:
        if name not in own:
            raise CheckpointError(
                f"'{checkpoint.path}' holds '{name}', which the model does not have. Give the "
                f"weights of this model."
            )
    owners: dict[str, str] = {}
    places: dict[str, str] = {}
    for name in stored:
        first = owners[name] = aliases.get(name, name)
        info, shape = stored[name], tuple(own[name].shape)
        if info.shape != shape:
            raise CheckpointError(
                f"'{name}' has shape {info.shape} in '{checkpoint.path}' and {shape} in the "
                f"model. Give the weights of this model."
            )
        if first in parameters and parameters[first].is_floating_point():
            _check_dtype(name, info.dtype, checkpoint)
        other = places.setdefault(first, name)
        if other != name and not _same(checkpoint, other, name):
            raise CheckpointError(
                f"'{other}' and '{name}' are one tensor in the model and differ in "
                f"'{checkpoint.path}'. Untie them in the model, or store them once."
            )
    missing = [n for n in {**own, **parameters} if aliases.get(n, n) not in places]
    if missing:
        raise CheckpointError(
            f"'{checkpoint.path}' lacks {len(missing)} of the model's tensors, first "
            f"'{missing[0]}'. Give the weights of this model."
        )
    return owners


def _check_dtype(name: str, dtype: torch.dtype, checkpoint: Checkpoint) -> None:
    if dtype not in _FLOATS:
        raise CheckpointError(
            f"'{name}' is stored as {str(dtype).removeprefix('torch.')} in '{checkpoint.path}'. "
            f"Parameters can be rescaled in float64, float32, float16 and bfloat16. Convert the "
            f"checkpoint."
        )


def _same(checkpoint: Checkpoint, a: str, b: str) -> bool:
    if checkpoint.tensors[a].dtype != checkpoint.tensors[b].dtype:
        return False
    pairs = zip(checkpoint.raw(a, _PIECE), checkpoint.raw(b, _PIECE), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def _load_buffers(model: nn.Module, checkpoint: Checkpoint, places: Mapping[str, str]) -> None:
    """Fill what has memory (buffers, integer parameters) from the checkpoint."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            parameter.data.copy_(checkpoint.read(places[name]))
    for name, buffer in list(model.named_buffers()):
        path, _, leaf = name.rpartition(".")
        if buffer.is_meta and name in places:
            real = torch.empty(buffer.shape, dtype=buffer.dtype)
            model.get_submodule(path)._buffers[leaf] = real
            buffer = real
        if buffer.is_meta:
            raise CaptureError(
                f"buffer '{name}' is computed from parameters while the model is built and is not "
                f"in the checkpoint, so it has no values. Make it persistent and save it, or "
                f"condition without streaming."
            )
        if name in places:
            with torch.no_grad():
                buffer.copy_(checkpoint.read(places[name]))


@dataclass
class _Values:
    """The values of a parameter by its name in the model, read when asked for."""

    checkpoint: Checkpoint
    places: Mapping[str, str]
    report: Progress
    phase: str = "reading"
    done: int = 0

    def __call__(self, name: str) -> Tensor:
        place = self.places[name]
        self.done += self.checkpoint.tensors[place].nbytes
        self.report(self.phase, self.done, 0)
        return self.checkpoint.read(place)


# --------------------------------------------------------------------------- ranges and output


def _survey(
    group: RescalingGroup, checkpoint: Checkpoint, places: Mapping[str, str], report: Progress
) -> dict[str, Extent]:
    """Magnitudes of everything that may be rescaled, in one pass; refuses NaN and infinity."""
    found = {}
    done, total = 0, checkpoint.nbytes
    for name in group.parameters:
        place = places[name]
        low: list[int] = []
        high: list[int] = []
        for _, piece in checkpoint.pieces(place, _PIECE):
            done += piece.nbytes
            report("checking ranges", done, total)
            here = extent(piece)
            if not here.finite:
                raise ArgumentError(
                    f"'{place}' in '{checkpoint.path}' has entries that are NaN or infinite; its "
                    f"path kernel is not defined. Restore the weights."
                )
            if here.exponents is not None:
                low.append(here.exponents[0])
                high.append(here.exponents[1])
        span = (min(low), max(high)) if low else None
        found[name] = Extent(checkpoint.tensors[place].dtype, span)
    return found


def _changes(
    group: RescalingGroup,
    scales: NDArray[np.generic],
    extents: Mapping[str, Extent],
    values: Callable[[str], Tensor],
) -> dict[str, list[Tensor]]:
    """First name -> factors, of every tensor that changes; checked before anything is written."""
    variables = group.variables(scales)
    exponents = group.parameter_exponents(variables)
    if bool((variables == np.round(variables)).all()):
        exponents = in_range(values, exponents, extents)
    made = power_factors([(extents[n].dtype, e) for n, e in exponents.items()])
    return dict(zip(exponents, made, strict=True))


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
        yield from checkpoint.raw(name, _PIECE)
        return
    for start, piece in checkpoint.pieces(name, _PIECE):
        stop = start + (len(piece) if piece.dim() else 1)
        here = [f[start:stop] if f.dim() and f.shape[0] > 1 else f for f in factors]
        multiply_by_(piece, here)
        yield as_bytes(piece)
