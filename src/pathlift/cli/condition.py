"""``pathlift condition``."""

from __future__ import annotations

import ctypes
from argparse import BooleanOptionalAction
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathlift.cli.parser import model_options
from pathlift.cli.progress import Lines, Meter
from pathlift.errors import ArgumentError, unknown

if TYPE_CHECKING:
    from pathlift.report import ConditioningReport

ABOUT = "Condition a model and write its weights."
RANDOM = (
    "the weights are random: without --weights the model is as its factory made it, with --seed {}"
)


def add_arguments(parser: Any) -> None:
    """The command's options."""
    model_options(parser)
    add = parser.add_argument
    add(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="out.safetensors, or a folder for files with an index",
    )
    add(
        "--stream",
        action="store_true",
        help="read and write tensor by tensor: for weights that do not fit in memory",
    )
    add("--criterion", default="path-kernel", help="path-kernel, weight-norm or range")
    add("--solver", default="newton", help="newton or coordinate")
    add("--tol", type=float, help="bound on the certificate (default: what suits the criterion)")
    add("--batch-norm", choices=("pinned", "invariant"), default="pinned")
    add(
        "--exact",
        action=BooleanOptionalAction,
        help="powers of two, which keep every bit, or continuous scales, which train better from "
        "scratch (default: continuous; powers of two for weights narrower than float32)",
    )


def run(args: Any) -> dict[str, Any]:
    """The command."""
    from pathlift.cli.weights import check_output

    check_output(args.output)
    options = _checked(args)
    lines = Lines()
    try:
        report = _streamed(args, options, lines) if args.stream else _whole(args, options, lines)
    finally:
        lines.close()
    return written(args, report, [])


def written(args: Any, report: Any, notes: Sequence[str]) -> dict[str, Any]:
    """What a command says that has written weights: the report, where they are, and notes."""
    notes = [*([] if args.weights else [RANDOM.format(args.seed)]), *notes]
    return {
        "data": {
            **report.to_dict(),
            "output": str(args.output),
            "random_weights": args.weights is None,
        },
        "text": "\n".join(
            [str(report), f"written      {args.output}", *(f"note         {n}" for n in notes)]
        ),
    }


def _checked(args: Any) -> dict[str, Any]:
    """Arguments of ``condition_``, looked at before any model is loaded."""
    from pathlift.criteria import as_criterion
    from pathlift.settings import Settings
    from pathlift.solve import SOLVERS

    options = {
        "criterion": args.criterion,
        "solver": args.solver,
        "tol": args.tol,
        "exact": args.exact,
        "batch_norm": args.batch_norm,
    }
    Settings(as_criterion(args.criterion), options["exact"], tol=args.tol)
    if args.solver not in SOLVERS:
        raise unknown("solver", args.solver, SOLVERS)
    if args.stream and args.weights is None:
        raise ArgumentError("--stream reads weights as they are needed. Add --weights PATH.")
    return options


def _whole(args: Any, options: dict[str, Any], lines: Lines) -> ConditioningReport:
    import pathlift
    from pathlift.cli.models import model_and_inputs
    from pathlift.cli.weights import save

    model, inputs = model_and_inputs(args)
    lines("conditioning")
    report = pathlift.condition_(model, inputs, **options)
    lines(f"writing {args.output}")
    save(model, args.output)
    return report


def _streamed(args: Any, options: dict[str, Any], lines: Lines) -> ConditioningReport:
    from pathlift.streaming import condition_checkpoint

    report: ConditioningReport = streamed(condition_checkpoint, args, options, lines)
    return report


def streamed(work: Callable[..., Any], args: Any, options: dict[str, Any], lines: Lines) -> Any:
    """A command from file to file; ``work`` is called as ``condition_checkpoint`` is."""
    from pathlift.cli.models import built, example

    _return_freed_memory()
    return work(
        lambda: built(args),
        tuple(example(text) for text in args.input),
        args.weights,
        args.output,
        progress=Meter(lines),
        **options,
    )


def _return_freed_memory() -> None:
    """Have the C library give every larger block back to the system when it is freed.

    By default glibc keeps blocks of up to 32 MB for later and memory grows with the number of
    tensors read, not with the largest. Elsewhere nothing is done.
    """
    threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(threshold, 1 << 20)
