"""Pictures of reports and groups: matplotlib figures, and HTML for notebooks."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pathlift.errors import MissingDependencyError

if TYPE_CHECKING:
    from pathlift.report import Histogram, ParameterRow
    from pathlift.symmetry.group import RescalingGroup

BEFORE, AFTER = "#D55E00", "#0072B2"  # told apart by the colour-blind
# Okabe and Ito's palette, light enough to write on.
_TINTS = ("#A6CEE3", "#FDD49E", "#B2DF8A", "#F4B6C2", "#CAB2D6", "#FFF2AE", "#B3CDE3", "#E5D8BD")
_PINNED = "#E6E6E6"
_SHOWN = 40  # parameters in a picture; a table has them all
_CELL = "padding:2px 10px 2px 0;text-align:left;border:0"


def empty_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, made without any window or global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "plots need matplotlib. Run: pip install 'pathlift[plots]'."
        ) from error

    class Shown(Figure):
        """Shows itself in a notebook, also where pyplot was never imported."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=100)
            return buffer.getvalue()

    made = Shown(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def plot_report(
    rows: Sequence[ParameterRow], spread: Histogram | None = None, imbalance: str = ""
) -> Any:
    """Log2 factors per parameter and, if known, the diagonal before and after.

    Args:
        rows: of the parameters, in the model's order; at most 40 are drawn, the widest ranges.
        spread: of the diagonal.
        imbalance: the title, such as ``"1.2 -> 0.3"``.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    shown = _widest(rows)
    height = 1.4 + 0.22 * max(6, len(shown))
    made = empty_figure(9.0 if spread else 5.5, height)
    axes = made.subplots(1, 2, squeeze=False)[0] if spread else [made.add_subplot()]
    _draw_factors(axes[0], shown, len(rows) - len(shown))
    if spread is not None:
        _draw_spread(axes[1], spread)
    if imbalance:
        made.suptitle(f"imbalance {imbalance}", fontsize=11)
    return made


def span(row: ParameterRow) -> str:
    """The range of a parameter's log2 factors, in words."""
    if row.lowest == row.highest:
        return f"{row.lowest:g}"
    return f"{row.lowest:g} to {row.highest:g}"


def _widest(rows: Sequence[ParameterRow]) -> list[ParameterRow]:
    """The parameters that moved most, in the model's order."""
    order = sorted(range(len(rows)), key=lambda k: -max(-rows[k].lowest, rows[k].highest))
    return [rows[k] for k in sorted(order[:_SHOWN])]


def _draw_factors(axes: Any, rows: Sequence[ParameterRow], left: int) -> None:
    y = np.arange(len(rows))
    low = np.array([row.lowest for row in rows])
    high = np.array([row.highest for row in rows])
    axes.barh(y, high - low, left=low, height=0.55, color=AFTER, alpha=0.45)
    axes.plot(low, y, "<", color=AFTER, markersize=4)
    axes.plot(high, y, ">", color=AFTER, markersize=4)
    axes.axvline(0, color="#555", linewidth=0.8)
    axes.set_yticks(y, [row.name for row in rows], fontsize=8)
    axes.invert_yaxis()
    more = f" ({left} that moved less left out)" if left else ""
    axes.set(xlabel="log2 factor of an entry, lowest to highest")
    axes.set_title(f"scales per parameter{more}", fontsize=10)
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_spread(axes: Any, spread: Histogram) -> None:
    for counts, colour, label, style in (
        (spread.before, BEFORE, "before", "-"),
        (spread.after, AFTER, "after", "--"),
    ):
        axes.stairs(counts, spread.edges, color=colour, label=label, linestyle=style, linewidth=1.5)
    axes.set(xlabel="log2 of an entry of the diagonal", ylabel="entries", yscale="symlog")
    axes.set_ylim(bottom=0)
    axes.set_title("diagonal of the path kernel", fontsize=10)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


class Cell(NamedTuple):
    """Dimensions of a parameter that scale together, or are pinned.

    Attributes:
        dims: which.
        scales: how many; 0 if pinned.
        label: the class of all dimensions that carry the very same scales: A, B, ...; empty if
            pinned.
        reason: what pins it.
    """

    dims: tuple[int, ...]
    scales: int
    label: str
    reason: str = ""


def group_cells(group: RescalingGroup) -> dict[str, list[Cell]]:
    """Parameter name -> its cells; a parameter without any has none."""
    classes: dict[tuple[int, ...], str] = {}
    found: dict[str, list[Cell]] = {}
    for name, spec in group.parameters.items():
        cells = []
        for axes, terms in spec.components():
            variables = np.unique(np.concatenate([ids.numpy().ravel() for _, ids in terms]))
            key = tuple(variables[variables > 0].tolist())
            label = classes.setdefault(key, _letters(len(classes)))
            cells.append(Cell(axes, len(key), label))
        pinned = group.why_pinned(name)
        cells += [Cell((d,), 0, "", reason) for d, reason in pinned.items()]
        found[name] = sorted(cells)
    return found


def _letters(number: int) -> str:
    """0 -> A, 25 -> Z, 26 -> AA."""
    text = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        text = chr(ord("A") + digit) + text
    return text


def plot_group(group: RescalingGroup) -> Any:
    """Which channels share a scale, what is pinned and by whom: one line per parameter.

    Dimensions with the same letter and colour carry the very same scales, with equal or opposite
    sign. At most 40 parameters are drawn, the first ones; ``group.summary()`` has them all.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    cells = group_cells(group)
    names = list(cells)[:_SHOWN]
    made = empty_figure(9.0, 1.0 + 0.34 * max(3, len(names)))
    axes = made.add_subplot()
    wide = max((len(cells[n]) for n in names), default=1) or 1
    for y, name in enumerate(names):
        for x, cell in enumerate(cells[name] or [Cell((), 0, "", "never rescaled")]):
            _draw_cell(axes, x, y, cell)
    shapes = {n: "x".join(map(str, group.parameters[n].shape)) or "scalar" for n in names}
    axes.set_yticks(range(len(names)), [f"{n}  {shapes[n]}" for n in names], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, max(2, wide))
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    left = len(cells) - len(names)
    more = f"; {left} further parameters left out" if left else ""
    axes.set_title(
        f"{group.num_scales:,} free scales. One letter, one set of scales; grey is pinned{more}",
        fontsize=10,
        loc="left",
    )
    return made


def _draw_cell(axes: Any, x: int, y: int, cell: Cell) -> None:
    colour = _PINNED
    if cell.label:
        number = sum((ord(c) - 64) * 26**k for k, c in enumerate(reversed(cell.label))) - 1
        colour = _TINTS[number % len(_TINTS)]
    axes.barh(y, 0.96, left=x + 0.02, height=0.8, color=colour)
    dims = "dim " + ", ".join(map(str, cell.dims)) if cell.dims else "all"
    plural = "scale" if cell.scales == 1 else "scales"
    text = f"{dims}: {cell.label}, {cell.scales:,} {plural}" if cell.label else ""
    text = text or f"{dims}: {cell.reason}"
    if len(text) > 52:
        text = text[:51] + "…"
    axes.text(x + 0.04, y, text, va="center", fontsize=7.5)


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain HTML table for a notebook."""
    top = "".join(f'<th style="{_CELL}">{html.escape(h)}</th>' for h in head)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{html.escape(c)}</td>' for c in row) + "</tr>"
        for row in rows
    )
    return f'<div style="overflow-x:auto"><table><tr>{top}</tr>{body}</table></div>'


def report_html(summary: Iterable[tuple[str, str]], rows: Sequence[ParameterRow]) -> str:
    """A short table, and a bar of log2 factors for each parameter that moved."""
    lines = "".join(
        f'<tr><th style="{_CELL}">{html.escape(title)}</th>'
        f'<td style="{_CELL};white-space:normal">{html.escape(text)}</td></tr>'
        for title, text in summary
    )
    return f'<div><table style="margin:0">{lines}</table>{_bars(rows)}</div>'


def _bars(rows: Sequence[ParameterRow]) -> str:
    moved = [row for row in rows if row.lowest or row.highest]
    shown = _widest(moved)
    if not shown:
        return ""
    low = min(0.0, *(row.lowest for row in shown))
    high = max(0.0, *(row.highest for row in shown))
    scale = 100 / (high - low)

    def bar(row: ParameterRow) -> str:
        start, width = (row.lowest - low) * scale, (row.highest - row.lowest) * scale
        return (
            f'<tr><td style="{_CELL}">{html.escape(row.name)}</td>'
            f'<td style="{_CELL};width:16em"><div style="position:relative;height:0.8em;'
            f'background:#f2f2f2"><div style="position:absolute;left:{-low * scale:.1f}%;width:1px;'
            f'height:100%;background:#555"></div><div style="position:absolute;'
            f"left:{min(start, 98):.1f}%;width:{max(width, 2):.1f}%;height:100%;"
            f'background:{AFTER};opacity:0.6"></div></div></td>'
            f'<td style="{_CELL}">{span(row)}</td></tr>'
        )

    left = len(moved) - len(shown)
    more = f"; {left} that moved less left out" if left else ""
    return (
        f"<p style='margin:0.6em 0 0.2em'>log2 factors per parameter{more}</p>"
        f'<div style="overflow-x:auto"><table style="margin:0">{"".join(map(bar, shown))}'
        f"</table></div>"
    )
