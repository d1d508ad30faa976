"""The picture of an equalization: where a weight's channels lie below its range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pathlift.plots import AFTER, BEFORE, empty_figure

# Layers in a picture; a table has them all. Channels of zeros are drawn at the left end.
_SHOWN = 40
_LOWEST = -12.0


def plot_layers(
    names: Sequence[str],
    before: Sequence[tuple[float, float]],
    after: Sequence[tuple[float, float]],
    sqnr: Sequence[tuple[float, float]],
    title: str,
) -> Any:
    """Ranges of channels (left) and predicted SQNR (right) per layer, before and after.

    Args:
        names: of the weights, in the model's order; the first 40 are drawn.
        before, after: log2 of the narrowest and of the median channel over the widest.
        sqnr: before and after, dB.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    shown = min(len(names), _SHOWN)
    made = empty_figure(9.5, 1.7 + 0.24 * max(6, shown))
    left, right = made.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    y = np.arange(shown)
    for values, colour, label, shift in (
        (before, BEFORE, "before", -0.2),
        (after, AFTER, "after", 0.2),
    ):
        low, middle = (np.maximum([v[k] for v in values[:shown]], _LOWEST) for k in (0, 1))
        left.barh(y + shift, -low, left=low, height=0.34, color=colour, alpha=0.35)
        left.plot(
            middle, y + shift, "|", color=colour, markersize=8, markeredgewidth=2, label=label
        )
    left.axvline(0, color="#555", linewidth=0.8)
    left.set_xlabel("bits below the widest channel (bar: all channels, tick: median)")
    left.set_title("how far channels stay below the tensor's range", fontsize=10)
    left.set_yticks(y, list(names[:shown]), fontsize=8)
    left.margins(x=0.03)
    left.invert_yaxis()
    first, last = ([pair[k] for pair in sqnr[:shown]] for k in (0, 1))
    right.hlines(y, first, last, color="#999", linewidth=1)
    right.plot(first, y, "o", color=BEFORE, markersize=4, label="before")
    right.plot(last, y, "o", color=AFTER, markersize=4, label="after")
    right.set_xlabel("dB; higher is better")
    right.set_title("predicted SQNR of this weight alone", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=8)
    more = f"; {len(names) - shown} further layers left out" if len(names) > shown else ""
    made.suptitle(title + more, fontsize=11)
    return made
