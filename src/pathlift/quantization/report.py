"""What :func:`pathlift.quantization.equalize_` did, in numbers, as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pathlift import plots
from pathlift.quantization.figure import plot_layers
from pathlift.text import columns


class Spread(NamedTuple):
    """Largest magnitudes of a weight's output channels.

    Attributes:
        lowest, median, highest: over channels; the highest is the range of the tensor.
    """

    lowest: float
    median: float
    highest: float

    @property
    def bits_lost(self) -> float:
        """``log2(highest / median)``: what the median channel has less of than the widest."""
        return math.log2(self.highest / self.median) if self.median > 0 else 0.0


def spread_of(weight: Tensor, axis: int) -> Spread:
    """The spread of a weight's channels along ``axis``."""
    values, others = weight.detach(), [d for d in range(weight.dim()) if d != axis]
    tops = torch.maximum(-values.amin(others), values.amax(others)).float().sort().values
    return Spread(float(tops[0]), float(tops[len(tops) // 2]), float(tops[-1]))


class LayerRow(NamedTuple):
    """One line of :meth:`EqualizationReport.table`.

    Attributes:
        name: of the weight.
        before, after: the ranges of its channels.
        sqnr_before, sqnr_after: predicted, in dB: the output's power over that of the error which
            this weight alone makes there when it is quantised.
    """

    name: str
    before: Spread
    after: Spread
    sqnr_before: float
    sqnr_after: float


class LayerTable(list[LayerRow]):
    """Rows of a report; prints as a table, in a notebook as one of HTML."""

    def cells(self) -> list[tuple[str, ...]]:
        """Headings and cells as text."""
        head = ("weight", "range", "after", "median bits lost", "after", "SQNR dB", "after")
        lines: list[tuple[str, ...]] = [head]
        lines += [
            (
                row.name,
                f"{row.before.highest:.3g}",
                f"{row.after.highest:.3g}",
                f"{row.before.bits_lost:.2f}",
                f"{row.after.bits_lost:.2f}",
                f"{row.sqnr_before:.1f}",
                f"{row.sqnr_after:.1f}",
            )
            for row in self
        ]
        return lines

    def __str__(self) -> str:
        return columns(self.cells(), None)

    def _repr_html_(self) -> str:
        head, *lines = self.cells()
        return plots.html_table(head, lines)


@dataclass(frozen=True)
class EqualizationReport:
    """The result of :func:`pathlift.quantization.equalize_`; ``print(report)`` is a short table.

    Attributes:
        format, per: what was quantised for.
        num_scales: dimension of the rescaling group after folding.
        folded: batch norms folded into layers.
        relu6_replaced: ReLU6 that were given bounds per channel (or made ReLU).
        absorbed: channels whose high bias was absorbed.
        sqnr_before, sqnr_after: predicted, in dB, of all that is quantised together (weights, and
            layers' inputs where activations were given); of the folded model and the result.
        measured_before, measured_after: what rounding really makes of the outputs on the example
            inputs, in dB, before the scales and with those that were applied.
        tried: measured, of no scales and of every candidate; the best was applied.
        change: largest change of an output by folding and rescaling, relative to the output's
            largest entry; rounding.
        change_absorbed: the same by absorbing biases; 0 where none was absorbed.
        change_relu6: the same by making ReLU6 a ReLU; 0 where it was not.
        log2_scales: float64 tensor (num_scales,), what was applied.
        layers: one row per weight.
        evaluations: of the objective.
        seconds: per step.
    """

    format: str
    per: str
    num_scales: int
    folded: int
    relu6_replaced: int
    absorbed: int
    sqnr_before: float
    sqnr_after: float
    measured_before: float
    measured_after: float
    tried: tuple[float, ...]
    change: float
    change_absorbed: float
    change_relu6: float
    log2_scales: Tensor = field(repr=False)
    layers: tuple[LayerRow, ...] = field(repr=False)
    evaluations: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, ready for JSON."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["log2_scales"] = self.log2_scales.tolist()
        plain["layers"] = [
            {**row._asdict(), "before": row.before._asdict(), "after": row.after._asdict()}
            for row in self.layers
        ]
        return plain

    def table(self) -> LayerTable:
        """Per weight: range, what the median channel loses against the widest, predicted SQNR."""
        return LayerTable(self.layers)

    def plot(self) -> Any:
        """A matplotlib figure: ranges of every weight's channels before and after.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        return plot_layers(
            [row.name for row in self.layers],
            [_bits(row.before) for row in self.layers],
            [_bits(row.after) for row in self.layers],
            [(row.sqnr_before, row.sqnr_after) for row in self.layers],
            f"{self.format} per {self.per}: SQNR {self._sqnr()}, predicted at the output",
        )

    def _sqnr(self) -> str:
        return f"{self.sqnr_before:.1f} -> {self.sqnr_after:.1f} dB"

    def _measured(self) -> str:
        first, *others = self.tried
        if bool(self.log2_scales.any()):
            return f"{first:.1f} -> {self.measured_after:.1f} dB on the example inputs"
        if not others:
            return f"{first:.1f} dB on the example inputs; nothing better was found"
        return (
            f"{first:.1f} dB on the example inputs; the weights were left as they were, since "
            f"rescaled they would have {max(others):.1f} dB"
        )

    def _rows(self) -> list[tuple[str, str]]:
        moved = int(torch.count_nonzero(self.log2_scales))
        changed = [f"{self.change:.1e} of the largest entry by folding and rescaling"]
        if self.absorbed:
            changed.append(f"{self.change_absorbed:.1e} by absorbing biases")
        if self.change_relu6:
            changed.append(f"{self.change_relu6:.1e} by making ReLU6 a ReLU")
        lost = [sum(w) / max(len(w), 1) for w in zip(*map(_lost, self.layers), strict=True)]
        rows = [
            ("format", f"{self.format} per {self.per}"),
            ("scales", f"{self.num_scales:,} ({moved:,} changed)"),
            ("SQNR", f"{self._sqnr()}, predicted at the output"),
            ("measured", self._measured()),
        ]
        if lost:
            rows.append(("ranges", f"median channel {lost[0]:.2f} -> {lost[1]:.2f} bits narrower"))
        rows += [
            ("folded", f"{self.folded} batch norms"),
            ("absorbed", f"biases of {self.absorbed:,} channels"),
            ("outputs", "changed by " + ", ".join(changed)),
            ("seconds", ", ".join(f"{k} {v:.3f}" for k, v in self.seconds.items())),
        ]
        if self.relu6_replaced:
            rows.insert(6, ("ReLU6", f"{self.relu6_replaced} replaced"))
        return rows

    def _repr_html_(self) -> str:
        return plots.html_table(("", ""), self._rows())

    def __str__(self) -> str:
        return "\n".join(f"{title:<12} {text}" for title, text in self._rows())


def _lost(row: LayerRow) -> tuple[float, float]:
    return row.before.bits_lost, row.after.bits_lost


def _bits(spread: Spread) -> tuple[float, float]:
    """Log2 of the narrowest and the median channel over the widest."""
    found: Sequence[float] = (spread.lowest, spread.median)
    low, middle = (math.log2(v / spread.highest) if v > 0 else -math.inf for v in found)
    return low, middle
