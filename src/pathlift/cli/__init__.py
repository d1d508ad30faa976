"""The command line: ``pathlift inspect | advise | condition | norms | demo | compare | reproduce``.

One module a command; :mod:`pathlift.cli.run` turns what goes wrong into one line and an exit code.
"""

from __future__ import annotations

from pathlift.cli.run import main

__all__ = ["main"]
