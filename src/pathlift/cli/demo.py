"""``pathlift demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pathlift.cli.progress import Lines

ABOUT = "Condition, verify and train on embedded data; write a page."


def add_arguments(parser: Any) -> None:
    """The command's options."""
    parser.add_argument("-o", "--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--quick", action="store_true", help="fewer seeds and epochs")


def run(args: Any) -> dict[str, Any]:
    """The command."""
    from pathlift.cli.places import check_folder
    from pathlift.experiments.demo import main
    from pathlift.experiments.optional import need

    need("matplotlib", "the demo", "pathlift[demo]")
    need("sklearn", "the demo", "pathlift[demo]")
    check_folder(args.output)
    lines = Lines()
    try:
        return main(args.output, quick=args.quick, progress=lines)
    finally:
        lines.close()
