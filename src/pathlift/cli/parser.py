"""Options: what every command shares, and words that suggest what may have been meant."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pathlift.errors import ArgumentError, closest

# Runs a command; returns {"data": for --json, "text": function of the width, or a string}.
Command = Callable[[Any], dict[str, Any]]


class Parser(argparse.ArgumentParser):
    """A parser that raises ArgumentError, suggests near words, and may get its options late.

    What the experiments offer is known to modules that take long to import: :attr:`later` adds
    those options when the command is used.
    """

    later: Callable[[Any], None] | None = None
    _words: Sequence[str] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        fill, self.later = self.later, None
        if fill is not None:
            fill(self)
        self._words = list(args or [])
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        options = self._option_string_actions
        for word in self._words:
            name = word.split("=")[0]
            if word.startswith("--") and not any(o.startswith(name) for o in options):
                raise ArgumentError(
                    f"option {name!r} is unknown.{closest(name, options)} {self._try()}"
                )
        raise ArgumentError(f"{message}. {self._try()}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known: Iterable[str] = [str(c) for c in action.choices]
            name = (action.option_strings or [action.dest])[-1]
            raise ArgumentError(
                f"{name} {value!r} is unknown. Supported: {', '.join(known)}."
                f"{closest(str(value), known)} {self._try()}"
            )

    def _try(self) -> str:
        return f"See: {self.prog} --help"


def model_options(parser: Any) -> None:
    """The options of commands that take a model."""
    add = parser.add_argument
    add("spec", help="torchvision:NAME, timm:NAME, package.module:FACTORY or file.py:FACTORY")
    add("--weights", type=Path, help=".safetensors file, index or folder (or .pt/.pth/.bin)")
    run_options(parser)


def run_options(parser: Any) -> None:
    """How the model of a command is made and run."""
    add = parser.add_argument
    add(
        "--input",
        action="append",
        metavar="SHAPE[:DTYPE]",
        required=True,
        help="shape of one input, such as 1,3,224,224; repeat for several inputs",
    )
    add("--mode", choices=("train", "eval"), default="train")
    add("--seed", type=seed, default=0, help="seed before the factory is called")


def seed(text: str) -> int:
    """A seed that torch takes."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a seed between 0 and 2^63 - 1")
    return value
