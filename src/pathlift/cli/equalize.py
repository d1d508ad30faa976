"""``pathlift equalize``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathlift.cli.condition import streamed, written
from pathlift.cli.parser import model_options
from pathlift.cli.progress import Lines
from pathlift.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

ABOUT = "Prepare a model for quantisation and write its weights."
NOISE = (
    "sensitivities were measured on standard normal inputs; typical ones (--examples) serve better"
)
STREAMED = (
    "ranges were equalised and not the error at the output; scales were not tried out and no bias "
    "was absorbed, for which the model must be in memory"
)
# What streaming does not do, by the name of the option.
_WHOLE = {
    "--relu6": "relu6",
    "--examples": "examples",
    "--per": "per",
    "--format": "format",
    "--thorough": "thorough",
}


def add_arguments(parser: Any) -> None:
    """The command's options."""
    model_options(parser)
    parser.set_defaults(mode="eval")
    add = parser.add_argument
    add(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="out.safetensors, or a folder for files with an index",
    )
    add("--format", help="int8 (default), int4 or float8_e4m3")
    add("--per", help="tensor (default) or channel: what has one step")
    add("--relu6", help="keep (default), relu or per-channel")
    add("--biases", default="shrink", help="shrink (default) or ignore")
    add("--no-fold", action="store_true", help="leave batch norms")
    add("--no-absorb", action="store_true", help="leave high biases")
    add("--thorough", action="store_true", help="search longer: worth some decibels at int4")
    add(
        "--examples",
        type=Path,
        help=".safetensors (or .pt) file of typical inputs, in the order of --input",
    )
    add(
        "--stream",
        action="store_true",
        help="fold and equalise ranges tensor by tensor, for weights that do not fit in memory",
    )


def run(args: Any) -> dict[str, Any]:
    """The command."""
    from pathlift.cli.weights import check_output

    check_output(args.output)
    lines = Lines()
    try:
        if args.stream:
            report: Any = _streamed(args, lines)
            notes = [STREAMED]
        else:
            report = _whole(args, lines)
            notes = [] if args.examples else [NOISE]
    finally:
        lines.close()
    return written(args, report, notes)


def _whole(args: Any, lines: Lines) -> Any:
    from pathlift.cli.models import model_and_inputs
    from pathlift.cli.weights import save
    from pathlift.quantization import equalize_

    model, inputs = model_and_inputs(args)
    inputs = _given(args.examples, inputs) if args.examples else _noise(inputs, args.seed)
    lines("equalising")
    report = equalize_(
        model,
        inputs,
        fold=not args.no_fold,
        biases=args.biases,
        relu6=args.relu6 or "keep",
        absorb=not args.no_absorb,
        format=args.format or "int8",
        per=args.per or "tensor",
        thorough=args.thorough,
    )
    lines(f"writing {args.output}")
    save(model, args.output)
    return report


def _streamed(args: Any, lines: Lines) -> Any:
    for option, name in _WHOLE.items():
        if getattr(args, name):
            raise ArgumentError(
                f"{option} needs the model in memory; --stream folds batch norms and equalises "
                f"ranges alone. Leave out one of them."
            )
    if args.weights is None:
        raise ArgumentError("--stream reads weights as they are needed. Add --weights PATH.")
    from pathlift.quantization import equalize_checkpoint

    return streamed(equalize_checkpoint, args, {"fold": not args.no_fold}, lines)


def _noise(inputs: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """Standard normal numbers for floating-point inputs; others stay."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(x.shape, generator=generator).to(x.dtype) if x.is_floating_point() else x
        for x in inputs
    )


def _given(path: Path, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors of a file, one per input, alike but for the size of the batch."""
    from pathlift.cli.weights import state_of

    found = tuple(state_of(path).values())
    shapes = [(tuple(x.shape[1:]), x.dtype) for x in inputs]
    if [(tuple(x.shape[1:]), x.dtype) for x in found] != shapes:
        raise ArgumentError(
            f"the tensors in {str(path)!r} are {[tuple(x.shape) for x in found]}; --input says "
            f"{[tuple(x.shape) for x in inputs]}. Give one tensor per input, in the same order."
        )
    return found
