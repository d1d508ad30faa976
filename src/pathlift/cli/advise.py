"""``pathlift advise``."""

from __future__ import annotations

from typing import Any

from pathlift.cli.parser import model_options
from pathlift.cli.progress import Lines

ABOUT = "Say whether conditioning a model is worth it, and with which settings."


def add_arguments(parser: Any) -> None:
    """The command's options."""
    model_options(parser)
    parser.add_argument("--optimizer", help="what will train it: sgd, adamw, muon, ...")


def run(args: Any) -> dict[str, Any]:
    """The command."""
    import pathlift
    from pathlift.cli.models import model_and_inputs

    model, inputs = model_and_inputs(args)
    Lines()("conditioning a copy")
    advice = pathlift.advise(model, inputs, args.optimizer)
    return {"data": advice.to_dict(), "text": str(advice)}
