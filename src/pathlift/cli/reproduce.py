"""``pathlift reproduce``."""

from __future__ import annotations

from typing import Any

from pathlift.cli.compare import check_place
from pathlift.cli.progress import Lines

ABOUT = "Reproduce the paper's experiments: figures, tables and what they say."


def add_arguments(parser: Any) -> None:
    """The command's options, added when it is used: their values stand in slow modules."""
    parser.later = _options


def _options(parser: Any) -> None:
    from pathlift.experiments.reproduce import add_arguments

    add_arguments(parser)


def run(args: Any) -> dict[str, Any]:
    """The command."""
    from pathlift.experiments.reproduce import main

    check_place(args)
    lines = Lines()
    try:
        return main(args, lines)
    finally:
        lines.close()
