"""Figures and self-contained pages, shared by the demo, the comparison and the reproductions.

Figures are small with large type, so that they read on a phone and in a column of print.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pathlift.errors import MissingDependencyError

# Okabe and Ito's palette: told apart by the colour-blind. Dashes help in print.
COLOURS = (
    *("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00"),
    *("#56B4E9", "#000000", "#7F7F7F", "#8C510A"),
)
DASHES = ("-", "-", "--", "-.", ":", "--", "-.", ":", "-")
MARKERS = "osD^vPX*<"
_INTERVAL = re.compile(r"\[[^\]]*\]")
SIZE = (4.8, 3.7)  # inches

# One sentence for every page.
PATH_KERNEL = """A path runs from an input (or a bias) to an output and weighs the product of the
parameters along it; the path kernel is the matrix of inner products between the gradients of these
weights, so it says how fast a gradient step moves each path, and which paths move together."""

Draw = Callable[[Any], None]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto;
  padding: 0 1rem; color: #1a1a1a; }
h1 { line-height: 1.2; } h2 { margin-top: 2.2rem; line-height: 1.25; }
img { display: block; width: 100%; max-width: 36rem; height: auto; margin: 1rem 0 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { text-align: right; padding: 0.3rem 0.6rem; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td { white-space: nowrap; }
td:first-child { white-space: normal; min-width: 5.5rem; }
@media (max-width: 640px) { table { font-size: 0.8rem; } th, td { padding: 0.3rem 0.35rem; }
  td .interval { display: block; } td:first-child, th:first-child { min-width: 0;
  max-width: 6.5rem; } }
code { background: #f2f2f2; padding: 0.1em 0.3em; overflow-wrap: anywhere; }
@media print { body { margin: 0; max-width: none; font-size: 11pt; } img { max-width: 12cm; }
  .wide { overflow: visible; } table { font-size: 7pt; } th, td { padding: 0.15rem 0.3rem; }
  h2 { break-after: avoid; } img { break-inside: avoid; } }
"""


def line(index: int) -> dict[str, Any]:
    """Colour and dashes of the curve of this number."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}


def legend(axes: Any) -> None:
    """Below the axes where it would hide the curves."""
    labels = axes.get_legend_handles_labels()[1]
    columns = 1 if max(map(len, labels), default=0) > 30 else 2  # what the width holds
    if len(labels) > 3:
        axes.figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    elif labels:
        axes.legend(frameon=False)


def ticks(axes: Any, values: Sequence[float]) -> None:
    """Mark the values themselves on a logarithmic axis, as many as fit side by side."""
    kept = list(values)
    while len(kept) > 6:
        kept = kept[::2]
    axes.set_xscale("log")
    axes.set_xticks(kept, [f"{v:g}" for v in kept])
    axes.set_xticks([], minor=True)


# From coarse to fine: what is marked in every decade.
_MARKS = (
    (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
    [1 + k / 2 for k in range(18)],
    [1 + k / 10 for k in range(90)],
)


def plain_ticks(axes: Any) -> None:
    """0.4, not 4 x 10^-1, on a logarithmic vertical axis that spans little."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    if axes.get_yscale() != "log":
        return
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter(NullFormatter())
    for marks in _MARKS:
        inside = [v for k in range(-12, 12) for m in marks if low <= (v := m * 10.0**k) <= high]
        if len(inside) > 2:
            break
    if len(inside) < 9:
        axes.yaxis.set_major_locator(FixedLocator(inside))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def figure(draw: Draw, size: tuple[float, float] = SIZE) -> Any:
    """A matplotlib figure with one pair of axes, drawn without any window or global state.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "plots need matplotlib. Run: pip install 'pathlift[plots]'."
        ) from error
    with rc_context({"font.size": 11, "legend.fontsize": 9.5, "axes.labelsize": 11}):
        made = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(made)
        axes = made.add_subplot()
        draw(axes)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        # The ticks' labels take the font of the moment they are laid out.
        made.canvas.draw()
    return made


def svg(made: Any) -> bytes:
    """The figure as SVG: the same bytes for the same figure, without the date."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "pathlift"}):
        made.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def embed(draw: Draw, alt: str, size: tuple[float, float] = SIZE) -> str:
    """The figure as an image inside the page."""
    data = base64.b64encode(svg(figure(draw, size))).decode()
    return f'<img src="data:image/svg+xml;base64,{data}" alt="{html.escape(alt)}">'


def save(draw: Draw, path: Path, size: tuple[float, float] = SIZE) -> None:
    """Write ``path`` with the suffixes .png and .svg."""
    made = figure(draw, size)
    path.with_suffix(".svg").write_bytes(svg(made))
    made.savefig(path.with_suffix(".png"), dpi=160, metadata={"Software": None})


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table that scrolls sideways where it is too wide."""
    head = "".join(f"<th>{html.escape(h)}" for h in headings)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _cell(text: str) -> str:
    """Escaped; an interval in brackets goes below on narrow screens."""
    return _INTERVAL.sub(r'<span class="interval">\g<0></span>', html.escape(text))


def page(title: str, body: str) -> str:
    """A whole HTML page that needs no other file."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style></head><body>
{body}
</body></html>
"""
