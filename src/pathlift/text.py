"""Text that fits the terminal it is printed on."""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import TextIO

_NARROWEST = 40


def width_of(stream: TextIO) -> int | None:
    """Columns of the terminal behind a stream; None where there is none: then nothing is wrapped.

    ``COLUMNS`` in the environment comes first, as everywhere.
    """
    told = os.environ.get("COLUMNS", "")
    if not (told.isdigit() and int(told) > 0) and not stream.isatty():
        return None
    return max(_NARROWEST, shutil.get_terminal_size().columns)


def fitted(text: str, width: int | None) -> str:
    """The text with longer lines wrapped, the rest of a line set in under its beginning.

    A line ``title    words`` (two blanks or more) goes on under its words where those start in the
    first half of the width, and else eight columns in from its own indent.
    """
    if width is None:
        return text
    return "\n".join(_wrapped(line, width) for line in text.split("\n"))


def _wrapped(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    indent = len(line) - len(line.lstrip())
    column = re.match(r"\s*\S+(?: \S+)*\s{2,}", line)
    hang = column.end() if column and column.end() <= width // 2 else indent + 8
    return "\n".join(
        textwrap.wrap(
            line,
            width,
            subsequent_indent=" " * hang,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def columns(rows: Sequence[Sequence[str]], width: int | None) -> str:
    """A table as text: the first column to the left, the others to the right.

    Where the width does not hold all columns, what is left over goes into further tables below,
    each with the first column again.
    """
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    parts: list[list[int]] = [[]]
    for k in range(1, len(widths)):
        used = widths[0] + sum(2 + widths[j] for j in parts[-1])
        if width is not None and parts[-1] and used + 2 + widths[k] > width:
            parts.append([])
        parts[-1].append(k)
    return "\n\n".join(
        "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(row[k].rjust(widths[k]) for k in part)]).rstrip()
            for row in rows
        )
        for part in parts
    )
