"""``pathlift inspect``."""

from __future__ import annotations

from typing import Any

from pathlift.cli.parser import model_options
from pathlift.cli.progress import Lines

ABOUT = "Show every scale of a model, and what pins the rest."


def add_arguments(parser: Any) -> None:
    """The command's options."""
    model_options(parser)
    parser.add_argument("--batch-norm", choices=("pinned", "invariant"), default="pinned")


def run(args: Any) -> dict[str, Any]:
    """The command."""
    import pathlift
    from pathlift.cli.models import model_and_inputs

    model, inputs = model_and_inputs(args)
    Lines()("finding the rescaling group")
    group = pathlift.rescaling_group(model, inputs, batch_norm=args.batch_norm)
    pinned = {n: group.why_pinned(n) for n in group.parameters}
    data = {
        "num_scales": group.num_scales,
        "parameters": {n: list(s.shape) for n, s in group.parameters.items()},
        "pinned": {n: reasons for n, reasons in pinned.items() if reasons},
        "unsupported": group.unsupported,
    }
    return {"data": data, "text": group.summary()}
