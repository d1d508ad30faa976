"""What :func:`pathlift.condition_` did, in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathlift import plots
from pathlift.errors import ArgumentError
from pathlift.text import columns

if TYPE_CHECKING:
    from pathlift.symmetry.group import RescalingGroup

_BINS = 60


class Move(NamedTuple):
    """What happened to one parameter.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        factors: float64 tensors of log2 factors whose broadcast sum is ``E s``; one for each group
            of dimensions that scale together, none if nothing moved.
    """

    name: str
    shape: tuple[int, ...]
    factors: tuple[Tensor, ...]

    def exponents(self) -> Tensor:
        """``E s`` of every entry, float64, of the parameter's shape."""
        total = torch.zeros(self.shape, dtype=torch.float64)
        for factor in self.factors:
            total = total + factor
        return total


def moves_of(group: RescalingGroup, scales: NDArray[Any] | Tensor) -> tuple[Move, ...]:
    """How every parameter of a group moves under log2 scales (num_scales,)."""
    factors = group.parameter_exponents(group.variables(scales))
    return tuple(
        Move(name, tuple(spec.shape), tuple(factors.get(name, ())))
        for name, spec in group.parameters.items()
    )


class ParameterRow(NamedTuple):
    """One line of :meth:`ConditioningReport.table`.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        moved: (moved, all) slices along each dimension that scales: rows, columns, ...
        lowest, highest: log2 factor of an entry.
        share_before, share_after: this parameter's part of the imbalance ``log(AM/GM)``: the mean
            over all counted entries of ``log AM - log g_i``, with zero for entries elsewhere. The
            parts add up to the imbalance; a part is negative where the diagonal is above its mean.
            None without a diagonal.
    """

    name: str
    shape: tuple[int, ...]
    moved: dict[int, tuple[int, int]]
    lowest: float
    highest: float
    share_before: float | None = None
    share_after: float | None = None


def parameter_rows(
    moves: Iterable[Move], diagonal: Mapping[str, Tensor] | None = None
) -> list[ParameterRow]:
    """One row per parameter.

    Args:
        moves: see :func:`moves_of`.
        diagonal: coefficients ``g`` before rescaling by parameter name (those without are not
            counted); afterwards they are ``g * 2 ** (-2 E s)``.
    """
    moves = list(moves)
    shares = [_shares(d) for d in _before_and_after(moves, diagonal)] if diagonal else [{}, {}]
    rows = []
    for move in moves:
        low = math.fsum(float(f.min()) for f in move.factors)
        high = math.fsum(float(f.max()) for f in move.factors)
        found = (s.get(move.name) for s in shares)
        rows.append(ParameterRow(move.name, move.shape, _moved(move), low, high, *found))
    return rows


def _moved(move: Move) -> dict[int, tuple[int, int]]:
    found = {}
    for factor in move.factors:
        for d in range(factor.dim()):
            if factor.shape[d] == move.shape[d] > 1:
                others = [k for k in range(factor.dim()) if k != d]
                some = (factor != 0).any(dim=others) if others else factor != 0
                found[d] = (int(some.sum()), move.shape[d])
        if factor.numel() == 1 and math.prod(move.shape) == 1:
            found[0] = (1, 1)
    return dict(sorted(found.items()))


def _before_and_after(
    moves: Iterable[Move], diagonal: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The positive entries of the diagonal per parameter, as natural logarithms, float64."""
    before, after = {}, {}
    for move in moves:
        g = diagonal.get(move.name)
        if g is None:
            continue
        if tuple(g.shape) != move.shape:
            raise ArgumentError(
                f"the diagonal of '{move.name}' has shape {tuple(g.shape)}; the parameter has "
                f"{move.shape}. Give path_kernel_diagonal(model, example_inputs)."
            )
        logs = g.detach().to("cpu", torch.float64).log()
        counted = torch.isfinite(logs)
        before[move.name] = logs[counted]
        after[move.name] = (logs - 2 * math.log(2) * move.exponents())[counted]
    return before, after


def _shares(logs: Mapping[str, Tensor]) -> dict[str, float]:
    everything = torch.cat(list(logs.values()))
    mean = float(everything.logsumexp(0)) - math.log(len(everything))
    return {n: float((mean - v).sum()) / len(everything) for n, v in logs.items()}


class Histogram(NamedTuple):
    """How the entries of the diagonal spread: counts (bins,) between edges (bins + 1,) in log2."""

    edges: list[float]
    before: list[int]
    after: list[int]


def histogram(moves: Iterable[Move], diagonal: Mapping[str, Tensor]) -> Histogram:
    """Of the positive entries of a diagonal, before rescaling and after."""
    logs = [
        torch.cat([v.flatten() for v in d.values()]).numpy() / math.log(2)
        for d in _before_and_after(moves, diagonal)
    ]
    edges = np.histogram_bin_edges(np.concatenate(logs), bins=_BINS)
    before, after = (np.histogram(v, bins=edges)[0].tolist() for v in logs)
    return Histogram(edges.tolist(), before, after)


class ParameterTable(list[ParameterRow]):
    """Rows of a report; prints as a table, in a notebook as one of HTML."""

    def cells(self) -> list[tuple[str, ...]]:
        """Headings and cells as text."""
        shared = any(row.share_before is not None for row in self)
        head = ("parameter", "shape", "moved", "log2 factors")
        lines: list[tuple[str, ...]] = [(*head, "imbalance before", "after") if shared else head]
        for row in self:
            moved = ", ".join(f"dim {d}: {n:,} of {m:,}" for d, (n, m) in row.moved.items())
            shape = "x".join(map(str, row.shape)) or "scalar"
            cells = (row.name, shape, moved or "-", plots.span(row))
            shares = tuple(
                "" if v is None else f"{v:+.4f}" for v in (row.share_before, row.share_after)
            )
            lines.append((*cells, *shares) if shared else cells)
        return lines

    def __str__(self) -> str:
        return columns(self.cells(), None)

    def _repr_html_(self) -> str:
        head, *lines = self.cells()
        return plots.html_table(head, lines)


@dataclass(frozen=True)
class ConditioningReport:
    """The result of :func:`pathlift.condition_`; ``print(report)`` shows a short table.

    Attributes:
        num_scales: dimension of the rescaling group.
        num_parameters: counted parameter entries p (trainable, on some path).
        imbalance_before: ``log(AM/GM)`` of the coefficients, per parameter (natural logarithm).
        imbalance_after: the same after rescaling.
        gradient_norm: certificate of the continuous optimum, ``max |dF/ds| / p``.
        iterations: of the solver.
        dead_channels: scales held at 0 because nothing enters or leaves them.
        log2_scales: tensor (num_scales,), what was applied; int64 if rounded, else float64.
        max_output_change: largest absolute difference of the outputs (0.0 for powers of two; None
            when not verified).
        unsupported: operations that pinned something, with counts.
        approximated: operations without paths for which a stand-in was used, with counts.
        seconds: capture, symmetry, criterion, solve, apply, verify.
        passes: how often the solver read the reduced matrices (a product with each and one with
            its transpose count as one pass).
        reduced_bytes: their size (of a product of thin factors, that of the factors).
        converged: whether the certificate is at most the tolerance asked for. If not, the scales
            are those of the best point found: no worse than none, and not the optimum.
        warnings: what to know before training with this, in words.
        behind_stand_ins: trainable parameter entries in front of operations without paths.
        rounding: whether scales were rounded to powers of two, and why.
        advice: whether this is likely to help training, in one line (see :func:`pathlift.advise`);
            empty for criteria other than the path kernel, and in the middle of training.
        moves: how every parameter moved, for tables and pictures.
        diagonal: of the coefficients, by parameter name, where :meth:`with_diagonal` added it.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> x = torch.zeros(2, 4)
    >>> report = pathlift.condition_(model, x)
    >>> str(report).splitlines()[1]
    'parameters   226 counted'
    >>> sorted(report.to_dict())[:3]
    ['advice', 'approximated', 'behind_stand_ins']
    """

    num_scales: int
    num_parameters: int
    imbalance_before: float
    imbalance_after: float
    gradient_norm: float
    iterations: int
    dead_channels: int
    log2_scales: Tensor
    max_output_change: float | None
    unsupported: dict[str, int]
    approximated: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    passes: int = 0
    reduced_bytes: int = 0
    converged: bool = True
    warnings: list[str] = field(default_factory=list)
    behind_stand_ins: int = 0
    rounding: str = ""
    advice: str = ""
    moves: tuple[Move, ...] = field(default=(), repr=False, compare=False)
    diagonal: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, ready for JSON."""
        left_out = ("moves", "diagonal")
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        plain["log2_scales"] = self.log2_scales.tolist()
        return plain

    def with_diagonal(self, diagonal: Mapping[str, Tensor]) -> ConditioningReport:
        """The same report with the criterion's diagonal, which tables and pictures then show.

        Args:
            diagonal: ``path_kernel_diagonal(model, example_inputs)``, taken *before* the model was
                conditioned; positive entries count.

        >>> import pathlift, torch
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.zeros(1, 4)
        >>> diagonal = pathlift.path_kernel_diagonal(model, x)
        >>> report = pathlift.condition_(model, x).with_diagonal(diagonal)
        >>> sum(row.share_before for row in report.table()) > 0
        True
        """
        return replace(self, diagonal=diagonal)

    def table(self) -> ParameterTable:
        """Per parameter: rows and columns moved, range of log2 factors, share of the imbalance.

        A list of :class:`ParameterRow` that prints as a table. The shares need
        :meth:`with_diagonal`.
        """
        return ParameterTable(parameter_rows(self.moves, self.diagonal))

    def plot(self) -> Any:
        """A matplotlib figure: log2 factors per parameter and, if known, the diagonal's spread.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        spread = None if self.diagonal is None else histogram(self.moves, self.diagonal)
        return plots.plot_report(self.table(), spread, dict(self._rows())["imbalance"])

    def _repr_html_(self) -> str:
        return plots.report_html(self._rows(), self.table())

    def __str__(self) -> str:
        return "\n".join(f"{title:<12} {text}" for title, text in self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        moved = int(torch.count_nonzero(self.log2_scales))
        span = f", from {self.log2_scales.min():g} to {self.log2_scales.max():g}" if moved else ""
        if self.max_output_change is None:
            outputs = "not verified"
        elif self.max_output_change == 0:
            outputs = "identical, bit for bit"
        else:
            outputs = f"changed by at most {self.max_output_change:.3g}"
        rows = [
            ("scales", f"{self.num_scales:,} ({moved:,} changed{span})"),
            ("parameters", f"{self.num_parameters:,} counted"),
            ("imbalance", f"{self.imbalance_before:.4f} -> {self.imbalance_after:.4f}"),
            (
                "certificate",
                f"{self.gradient_norm:.1e} after {self.iterations} iterations, "
                f"{self.passes} passes{'' if self.converged else ', above the tolerance'}",
            ),
            ("outputs", outputs),
            ("rounding", self.rounding),
            ("seconds", ", ".join(f"{k} {v:.3f}" for k, v in self.seconds.items())),
        ]
        if self.dead_channels:
            rows.insert(3, ("dead", f"{self.dead_channels:,} channels kept at scale 0"))
        for title, counts in (
            ("pinned by", self.unsupported),
            ("stand-in", self.approximated),
        ):
            if counts:
                rows.append((title, ", ".join(f"{k} x{v}" for k, v in counts.items())))
        rows += [("warning", text) for text in self.warnings]
        return [*rows, ("advice", self.advice)] if self.advice else rows
