"""``pathlift compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pathlift.cli.progress import Lines

ABOUT = "Train every (method, architecture, data, optimiser, rate, seed); write a page."


def add_arguments(parser: Any) -> None:
    """The command's options, added when it is used: their values stand in slow modules."""
    parser.later = _options


def _options(parser: Any) -> None:
    from pathlift.experiments.compare import add_arguments

    add_arguments(parser)


def run(args: Any) -> dict[str, Any]:
    """The command."""
    from pathlift.experiments.compare import run

    check_place(args)
    lines = Lines()
    try:
        return run(args, lines)
    except KeyboardInterrupt:
        lines.close()
        raise KeyboardInterrupt(_kept(args.output / "cells")) from None
    finally:
        lines.close()


def check_place(args: Any) -> None:
    """Packages, output folder and device, before any work."""
    from pathlift.cli.places import check_device, check_folder, check_scheduler
    from pathlift.experiments.optional import need

    for module in ("joblib", "pyarrow", "matplotlib", "sklearn"):
        need(module, "this command", "pathlift[experiments]")
    check_device(args.device)
    check_scheduler(args.dask)
    check_folder(args.output)


def _kept(cells: Path) -> str:
    count = len(list(cells.glob("*.parquet")))
    return (
        f"interrupted; the {count} finished cells in {str(cells)!r} are kept. The same command "
        f"goes on from there"
    )
