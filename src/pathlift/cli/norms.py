"""``pathlift norms``."""

from __future__ import annotations

from typing import Any

from pathlift.cli.parser import model_options
from pathlift.cli.progress import Lines

ABOUT = "Path norms and the imbalance of the path kernel."


def add_arguments(parser: Any) -> None:
    """The command's options."""
    model_options(parser)


def run(args: Any) -> dict[str, Any]:
    """The command."""
    import pathlift
    from pathlift.cli.models import model_and_inputs

    model, inputs = model_and_inputs(args)
    Lines()("path norms")
    data = {
        "path_norm_1": pathlift.path_norm(model, inputs, p=1),
        "path_norm_2": pathlift.path_norm(model, inputs, p=2),
        "imbalance": pathlift.imbalance(pathlift.path_kernel_diagonal(model, inputs)),
    }
    return {"data": data, "text": "\n".join(f"{k:<12} {v:.6g}" for k, v in data.items())}
