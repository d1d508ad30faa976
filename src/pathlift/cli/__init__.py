"""The command line: ``pathlift inspect | advise | condition | norms | demo | compare | reproduce``.

One module a command; :mod:`pathlift.cli.run` turns what goes wrong into one line and an exit code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see :func:`pathlift.cli.run.main`."""
    try:
        # Imported here, so that Ctrl-C while it is imported is one line, too.
        from pathlift.cli.run import main as run
    except KeyboardInterrupt:
        print("pathlift: interrupted", file=sys.stderr)
        return 130
    return run(argv)
