"""What a long task says of its progress: lines of text, some of which can be counted."""

from __future__ import annotations

from collections.abc import Callable

# Called with a line of text now and then; ``print`` will do.
Progress = Callable[[str], object]


class Step(str):
    """A line of progress that says how much of how much is done.

    Whoever takes lines of text can take it; the command line draws a bar with the time left.

    Attributes:
        done, total: in the same unit.
        unit: what is counted: ``"B"`` for bytes, or a plural.
    """

    done: float
    total: float
    unit: str

    def __new__(cls, text: str, done: float, total: float, unit: str) -> Step:
        made = super().__new__(cls, text)
        made.done, made.total, made.unit = done, total, unit
        return made
