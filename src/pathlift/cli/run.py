"""Parse, run, print: an error is one line on stderr and an exit code, never a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from pathlift import __version__
from pathlift.cli import (
    advise,
    compare,
    condition,
    demo,
    distance,
    equalize,
    inspect,
    norms,
    reproduce,
)
from pathlift.cli.exits import DONE, EXPLAINED, PIPE, code, sentence
from pathlift.cli.parser import Parser
from pathlift.cli.quiet import quiet
from pathlift.text import fitted, width_of

COMMANDS = {
    "inspect": inspect,
    "advise": advise,
    "condition": condition,
    "equalize": equalize,
    "norms": norms,
    "distance": distance,
    "demo": demo,
    "compare": compare,
    "reproduce": reproduce,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: words after the program's name; those of the process if None.

    Returns:
        The exit code; ``pathlift --help`` lists them.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in words
    try:
        with quiet(verbose):
            _run(words)
    except BrokenPipeError:
        # Whoever read our output has gone; nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE
    except (Exception, KeyboardInterrupt) as error:
        if verbose:
            traceback.print_exc()
        line = f"pathlift: {' '.join(sentence(error).split())}"
        print(fitted(line, width_of(sys.stderr)), file=sys.stderr)
        return code(error)
    return DONE


def _run(words: list[str]) -> None:
    args = parser().parse_args(words)
    # What a model's own code and torch print is not the command's output.
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(sys.stderr if args.verbose else nowhere),
    ):
        result: dict[str, Any] = args.run(args)
    if args.json:
        print(json.dumps(result["data"]))
    else:
        width = width_of(sys.stdout)
        text = result["text"]
        print(fitted(text if isinstance(text, str) else text(width), width))
    sys.stdout.flush()


def parser() -> Parser:
    """The parser of all commands; cheap: nothing of torch is imported."""
    made = Parser(
        prog="pathlift",
        description="Rescale a ReLU network without changing its function.",
        epilog=EXPLAINED,
    )
    made.add_argument(
        "--version", action="version", version=f"pathlift {__version__}", help="print the version"
    )
    commands = made.add_subparsers(
        dest="command", required=True, parser_class=Parser, metavar="COMMAND"
    )
    for name, module in COMMANDS.items():
        sub = commands.add_parser(name, help=module.ABOUT, description=module.ABOUT)
        sub.set_defaults(run=module.run)
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        sub.add_argument(
            "--verbose", action="store_true", help="show warnings, logs and tracebacks"
        )
        module.add_arguments(sub)
    return made
