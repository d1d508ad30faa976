"""``equalize_checkpoint``: batch norms folded and ranges equalised from file to file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from pathlift.absorption import Fold, find_folds, put_folded_
from pathlift.capture.model import capture
from pathlift.capture.names import named_tensors, unwrap
from pathlift.checkpoint import Changed, Checkpoint, open_checkpoint
from pathlift.criteria import as_criterion
from pathlift.errors import ArgumentError
from pathlift.homes.checkpoint import Progress
from pathlift.homes.skeleton import load_buffers, match, parameters_on_meta
from pathlift.report import ConditioningReport
from pathlift.settings import Settings
from pathlift.streaming import condition_opened
from pathlift.timing import timed


@dataclass(frozen=True)
class StreamedReport:
    """What :func:`equalize_checkpoint` did.

    Attributes:
        folded: batch norms folded into layers.
        ranges: the report of equalising ranges.
    """

    folded: int
    ranges: ConditioningReport

    def to_dict(self) -> dict[str, object]:
        """Plain numbers, lists and strings, ready for JSON."""
        return {"folded": self.folded, **self.ranges.to_dict()}

    def __str__(self) -> str:
        return f"{self.ranges}\n{'folded':<12} {self.folded} batch norms"


def equalize_checkpoint(
    build: Callable[[], nn.Module],
    example_inputs: object,
    weights: str | Path,
    output: str | Path,
    *,
    fold: bool = True,
    progress: Progress | None = None,
) -> StreamedReport:
    """Prepare a checkpoint for quantisation from file to file, with a few tensors in memory.

    Batch norms are folded, then the ranges ``max |w|`` of rows and columns are equalised over the
    whole group (cross-layer equalization), with continuous scales: the result is that of
    :func:`pathlift.absorption.fold_batch_norms_` and ``pathlift.condition_(model, x,
    criterion="range", exact=False)``. Of what :func:`equalize_` does it leaves out what needs the
    whole model in memory: the error at the output as the criterion, which takes derivatives by all
    weights, trying the scales out, absorbing biases, other bounds of ReLU6, and activations.

    Args:
        build: makes the model in evaluation mode; see
            :func:`pathlift.streaming.condition_checkpoint`.
        example_inputs, weights, output, progress: see there.
        fold: fold batch norms.

    Returns:
        The report.

    Raises:
        ArgumentError: a wrong argument, or the model is in training mode.
        CheckpointError, RangeError, CaptureError: see
            :func:`pathlift.streaming.condition_checkpoint`.

    In every case of failure the output is as before.
    """
    if not isinstance(fold, bool):
        raise ArgumentError(f"fold must be True or False; found {fold!r}.")
    report = progress or (lambda phase, done, total: None)
    settings = Settings(as_criterion("range"), False, "newton", None, verify=False)
    seconds: dict[str, float] = {}
    report("reading headers", 0, 0)
    with open_checkpoint(Path(weights)) as checkpoint:
        source, make = checkpoint, build
        folds: list[Fold] = []
        if fold:
            with timed(seconds, "fold"):
                model, folds, source = _folded(build, example_inputs, checkpoint)
            make = lambda: model  # noqa: E731
        ranges = condition_opened(
            make, example_inputs, source, Path(output), settings, "pinned", report, seconds
        )
    return StreamedReport(len(folds), ranges)


def _folded(
    build: Callable[[], nn.Module], example_inputs: object, checkpoint: Checkpoint
) -> tuple[nn.Module, list[Fold], Checkpoint]:
    """The model without values and without batch norms, and the checkpoint as it would fit."""
    with parameters_on_meta():
        model = unwrap(build())
    if model.training:
        raise ArgumentError(
            "batch norms can be folded in evaluation mode only, and the model is in training "
            "mode. Call model.eval() in build."
        )
    owners = match(model, checkpoint)
    places = {owners[n]: n for n in reversed(checkpoint.tensors)}
    load_buffers(model, checkpoint, places)

    def value(name: str) -> Tensor:
        return checkpoint.read(places[name])

    program = capture(model, example_inputs, value, both=False)
    folds = find_folds(model, program, value)
    gone = _inside(model, [one.place for one in folds])
    left_out = [n for n, first in owners.items() if first in gone]
    put_folded_(model, folds)
    view = Changed(
        checkpoint,
        changed={places[one.weight]: _rows_of(one) for one in folds},
        left_out=left_out,
        values=_biases(folds, places, checkpoint),
        behind={one.bias: places[one.weight] for one in folds if not one.has_bias},
    )
    return model, folds, view


def _inside(model: nn.Module, paths: Sequence[str]) -> set[str]:
    """Names of the parameters and buffers of these modules."""
    parameters, buffers, _ = named_tensors(model)
    prefixes = {f"{path}." for path in paths}
    return {n for n in (*parameters, *buffers) if n[: n.rfind(".") + 1] in prefixes}


def _rows_of(one: Fold) -> Callable[[int, Tensor], Tensor]:
    def change(start: int, rows: Tensor) -> Tensor:
        return replace(one, factor=one.factor[start : start + len(rows)]).fold(rows)

    return change


def _biases(
    folds: Sequence[Fold], places: Mapping[str, str], checkpoint: Checkpoint
) -> dict[str, Tensor]:
    """Name in the checkpoint -> folded bias, of the dtype of the bias, or else of the weight."""
    found = {}
    for one in folds:
        name = places[one.bias] if one.has_bias else one.bias
        like = checkpoint.tensors[name if one.has_bias else places[one.weight]].dtype
        found[name] = one.folded.to(like)
    return found
