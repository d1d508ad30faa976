"""``pathlift distance``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pathlift.cli.parser import run_options
from pathlift.cli.progress import Lines

ABOUT = "Say whether two checkpoints are the same network up to rescaling."


def add_arguments(parser: Any) -> None:
    """The command's options."""
    add = parser.add_argument
    add("first", type=Path, help=".safetensors file, index or folder (or .pt/.pth/.bin)")
    add("second", type=Path, help="the other one")
    add("--model", required=True, dest="spec", metavar="SPEC", help="whose weights they are")
    run_options(parser)
    add("--batch-norm", choices=("pinned", "invariant"), default="pinned")


def run(args: Any) -> dict[str, Any]:
    """The command."""
    import pathlift
    from pathlift.cli.models import built, example
    from pathlift.cli.weights import check_weights, load_weights

    for path in (args.first, args.second):
        check_weights(path)
    inputs = tuple(example(text) for text in args.input)
    first, second = built(args), built(args)
    load_weights(first, args.first)
    load_weights(second, args.second)
    Lines()("finding the canonical forms")
    found = pathlift.orbit_distance(first, second, inputs, batch_norm=args.batch_norm)
    return {"data": found.to_dict(), "text": str(found)}
