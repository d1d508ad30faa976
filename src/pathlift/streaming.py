"""Conditioning a checkpoint that need not fit in memory; see :mod:`pathlift.homes.checkpoint`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from pathlift.checkpoint import Checkpoint, open_checkpoint
from pathlift.condition import condition_home, understood
from pathlift.criteria import Criterion, as_criterion
from pathlift.homes.checkpoint import CheckpointHome, Progress
from pathlift.homes.scratch import Scratch
from pathlift.homes.skeleton import parameters_on_meta
from pathlift.report import ConditioningReport
from pathlift.settings import Settings
from pathlift.timing import timed

__all__ = ["Progress", "condition_checkpoint", "parameters_on_meta"]


def condition_checkpoint(
    build: Callable[[], nn.Module],
    example_inputs: object,
    weights: str | Path,
    output: str | Path,
    *,
    criterion: str | Criterion = "path-kernel",
    exact: bool | None = None,
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

    >>> import pathlift, tempfile, torch
    >>> from pathlib import Path
    >>> from pathlift.checkpoint import Shard, as_bytes, write_file
    >>> from torch import nn
    >>> def build():
    ...     return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> state = build().state_dict()
    >>> shard = Shard([(n, t.dtype, tuple(t.shape)) for n, t in state.items()],
    ...               lambda: map(as_bytes, state.values()))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     weights, output = Path(folder, "in.safetensors"), Path(folder, "out.safetensors")
    ...     write_file(weights, shard)
    ...     report = pathlift.streaming.condition_checkpoint(
    ...         build, torch.zeros(1, 4), weights, output)
    ...     output.stat().st_size == weights.stat().st_size, report.num_scales
    (True, 32)
    """
    settings = Settings(as_criterion(criterion), exact, solver, tol, verify=False)
    report = progress or (lambda phase, done, total: None)
    report("reading headers", 0, 0)
    with open_checkpoint(Path(weights)) as checkpoint:
        return condition_opened(
            build, example_inputs, checkpoint, Path(output), settings, batch_norm, report, {}
        )


def condition_opened(
    build: Callable[[], nn.Module],
    example_inputs: object,
    checkpoint: Checkpoint,
    output: Path,
    settings: Settings,
    batch_norm: str,
    report: Progress,
    seconds: dict[str, float],
) -> ConditioningReport:
    """:func:`condition_checkpoint` from an opened checkpoint; ``seconds`` go into the report."""
    with Scratch(output.resolve().parent) as scratch:
        with timed(seconds, "capture"):
            home = CheckpointHome(build, checkpoint, output, scratch, report)
        known = understood(home, example_inputs, batch_norm, seconds)
        return condition_home(known, settings, seconds)
