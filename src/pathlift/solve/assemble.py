"""Group and coefficients -> :class:`Problem`: every tensor summed over entries of equal scale."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from torch import Tensor

from pathlift.capture.program import Program
from pathlift.criteria.protocol import Coefficients, Criterion
from pathlift.solve.matrix import Array, Store, to_numpy
from pathlift.solve.objective import TOTAL
from pathlift.solve.operator import Objective, Operator
from pathlift.solve.problem import IntArray, MatrixBlock, Problem, as_is
from pathlift.solve.sums import Sums, sum_up
from pathlift.symmetry.group import RescalingGroup
from pathlift.symmetry.scales import distinct
from pathlift.tensors.product import Product, dense

# Terms of one parameter that are told apart when scales are numbered by layer.
_TERMS = 4


@dataclass(frozen=True)
class Assembled:
    """The problem, and what its report needs.

    Attributes:
        log_mean: mean of the natural logarithm of the counted coefficients.
        slope: ``(H,)``, sum of the exponent rows of the counted entries (the linear term of a
            balanced objective, also where the problem has none).
        dead: indices of scales held at 0 because nothing with a positive coefficient enters or
            leaves.
        objective: what is asked of the scales.
        names: per scale, the parameter in whose rows or columns it stands first.
    """

    problem: Problem
    log_mean: float
    slope: Array
    dead: IntArray
    objective: Objective = TOTAL
    names: tuple[str, ...] = ()

    @cached_property
    def operator(self) -> Operator:
        """The problem's products, made once."""
        return Operator(self.problem, self.objective)

    def with_dead_at(self, place: Array) -> Assembled:
        """The same with dead scales held at ``place`` ``(H,)``, not at 0."""
        lower, upper = self.problem.lower.copy(), self.problem.upper.copy()
        lower[self.dead] = upper[self.dead] = place[self.dead]
        return replace(self, problem=replace(self.problem, lower=lower, upper=upper))

    def imbalance(self, scales: Array) -> float:
        """``log(AM/GM)`` of the coefficients, per counted entry, after rescaling by ``scales``.

        For ranges: the mean over channels of ``|log(range in / range out)|``.
        """
        count = self.problem.count
        if not count:
            return 0.0
        slant = 2 * math.log(2) * float((self.slope - self.problem.linear) @ scales)
        reached = self.objective.value(self.operator, scales)
        return self.objective.imbalance(reached, slant, count, self.log_mean)

    def where(self, scales: IntArray) -> dict[str, int]:
        """Parameter name -> how many of these scales stand there first, most of them first."""
        return dict(Counter(self.names[k] for k in scales.tolist()).most_common())


def assemble(
    group: RescalingGroup,
    criterion: Coefficients,
    trainable: Mapping[str, bool],
    *,
    lower: Array,
    upper: Array,
) -> Assembled:
    """Sum the coefficients over kernel positions and over entries with equal scales.

    Args:
        group: ``H`` free scales.
        criterion: coefficients per parameter entry and their objective; only entries with a
            positive coefficient count.
        trainable: parameter name -> whether it counts.
        lower, upper: bounds ``(H,)`` on the scales, log2.

    Raises:
        ArgumentError: a coefficient is NaN or infinite.
    """
    sums = {
        name: sum_up(
            group.parameters[name],
            g,
            largest=criterion.objective.largest,
            counted=trainable.get(name, True),
        )
        for name, g in criterion.values.items()
    }
    return assemble_sums(group, sums, criterion, trainable, lower=lower, upper=upper)


def assemble_from(
    group: RescalingGroup,
    criterion: Criterion,
    program: Program,
    *,
    lower: Array,
    upper: Array,
    store: Store = as_is,
    frozen_count: bool = False,
) -> tuple[Assembled, dict[str, int]]:
    """Like :func:`assemble`, a parameter at a time: no coefficients are kept.

    ``store``: where the reduced matrices are put; see :class:`Problem`. ``frozen_count``: so do
    parameters that are not trained.

    Also returns the operations a stand-in was used for, with counts.
    """
    trainable = {n: p.requires_grad or frozen_count for n, p in program.parameters.items()}
    largest = criterion.objective.largest
    sums: dict[str, Sums] = {}

    def take(name: str, g: Tensor | Product) -> None:
        found = sum_up(group.parameters[name], g, largest=largest, counted=trainable[name])
        if isinstance(found.matrix, Tensor):
            found = replace(found, matrix=store(found.matrix))
        sums[name] = found

    approximated = criterion.hand_on(program, take)
    ordered = {n: sums[n] for n in program.parameters if n in sums}
    asked = criterion.coefficients({}, approximated)
    assembled = assemble_sums(
        group, ordered, asked, trainable, lower=lower, upper=upper, store=store
    )
    return assembled, approximated


@dataclass(frozen=True)
class _Segments:
    """Where the exponent rows of each kind lie among the stacked ones.

    Pairs (a matrix: its rows, then its columns) come first, then singles (one part), then what is
    rescaled and not counted. ``starts``: of every part, and the end.
    """

    forms: sp.csr_array
    starts: IntArray
    pairs: int
    singles: int

    def rows(self, pair: int) -> sp.csr_array:
        """The rows of a matrix."""
        return _rows(self.forms, self.starts[2 * pair], self.starts[2 * pair + 1])

    def columns(self, pair: int) -> sp.csr_array:
        """Its columns."""
        return _rows(self.forms, self.starts[2 * pair + 1], self.starts[2 * pair + 2])

    def single(self) -> sp.csr_array:
        """All single entries."""
        return _rows(self.forms, self.starts[2 * self.pairs], self._counted_end)

    def counting(self) -> Array:
        """1 per exponent row that counts, 0 for the others."""
        counting = np.zeros(int(self.starts[-1]))
        counting[: self._counted_end] = 1.0
        return counting

    @property
    def _counted_end(self) -> int:
        return int(self.starts[2 * self.pairs + self.singles])


def assemble_sums(
    group: RescalingGroup,
    sums: Mapping[str, Sums],
    criterion: Coefficients,
    trainable: Mapping[str, bool],
    *,
    lower: Array,
    upper: Array,
    store: Store = as_is,
) -> Assembled:
    """The problem of parameters whose coefficients are summed already; see :func:`assemble`.

    ``criterion``: its values are not read. ``store``: see :class:`Problem`.
    """
    live = {n: e for n, e in sums.items() if e.positive}
    counted = {n: e for n, e in live.items() if trainable.get(n, True)}
    pairs = [e for e in counted.values() if len(e.parts) == 2]
    singles = [e for e in counted.values() if len(e.parts) == 1]
    others = [e for n, e in live.items() if n not in counted]
    count = sum(e.positive for e in counted.values())

    ordered = [*pairs, *singles, *others]
    forms, starts = _stacked_forms(ordered, group.basis)
    # The problem is written for the rate -2; other rates multiply the exponents.
    factor = -criterion.rate / 2
    segments = _Segments(forms * factor, starts, len(pairs), len(singles))
    tally = np.concatenate([t for e in ordered for t in e.tallies] or [np.zeros(0)])
    linear = segments.forms.T @ (tally * segments.counting())
    carried = _carried(group)
    dead = _dead(group, carried, sums, forms, tally, criterion.balanced)
    lower, upper = lower.copy(), upper.copy()
    lower[dead] = upper[dead] = 0.0
    layers = _layers(group, carried)
    problem = Problem(
        num_scales=group.num_scales,
        blocks=tuple(
            MatrixBlock(e.matrix, segments.rows(k), segments.columns(k))
            for k, e in enumerate(pairs)
        ),
        vector=np.concatenate([np.zeros(0), *(to_numpy(dense(e.matrix)) for e in singles)]),
        vector_forms=segments.single(),
        constant=math.fsum(float(dense(e.matrix)) for e in counted.values() if not e.parts),
        linear=linear if criterion.balanced else np.zeros(group.num_scales),
        count=count,
        lower=lower,
        upper=upper,
        layers=layers,
        store=store,
    )
    log_sum = math.fsum(e.log_sum for e in counted.values())
    first = list(group.parameters)
    return Assembled(
        problem=problem,
        log_mean=log_sum / count if count else 0.0,
        slope=linear,
        dead=dead,
        objective=criterion.objective,
        names=tuple(first[k // _TERMS] if k >= 0 else "" for k in layers.tolist()),
    )


def _dead(
    group: RescalingGroup,
    carried: _Carried,
    names: Iterable[str],
    forms: sp.csr_array,
    tally: Array,
    balanced: bool,
) -> IntArray:
    """Scales without a minimiser: nothing positive enters, or nothing leaves."""
    h = group.num_scales
    weighed = forms.data * np.repeat(tally, np.diff(forms.indptr))
    entering = np.bincount(forms.indices, np.maximum(weighed, 0), minlength=h)
    leaving = np.bincount(forms.indices, np.maximum(-weighed, 0), minlength=h)
    gains, loses = _sides(group, carried, names)
    one_sided = (gains & (entering == 0)) | (loses & (leaving == 0))
    if not balanced:  # a sum without the linear term needs both sides
        one_sided = (entering == 0) | (leaving == 0)
    return np.flatnonzero(one_sided | (entering + leaving == 0)).astype(np.int64)


def _stacked_forms(
    entries: Sequence[Sums], basis: sp.csr_array
) -> tuple[sp.csr_array, NDArray[np.int64]]:
    """The exponent rows of all labels, one under the other, and where each part's begin."""
    tables = [table for e in entries for table in e.labels]
    terms = [[c for c, _ in t] for e in entries for _, t in e.parts]
    ends = np.cumsum([0, *(len(t) for t in tables)])
    widths = np.repeat(np.asarray([t.shape[1] for t in tables], np.int64), np.diff(ends))
    chosen = sp.csr_array(
        (
            np.concatenate(
                [np.zeros(0), *(np.tile(c, len(t)) for c, t in zip(terms, tables, strict=True))]
            ),
            np.concatenate([np.zeros(0, np.int64), *(t.reshape(-1) for t in tables)]),
            np.concatenate([[0], np.cumsum(widths)]).astype(np.int64),
        ),
        shape=(int(ends[-1]), basis.shape[0]),
    )
    return sp.csr_array(chosen @ basis), ends


def _rows(forms: sp.csr_array, start: int, end: int) -> sp.csr_array:
    """Some rows, one after the other."""
    a, b = forms.indptr[start], forms.indptr[end]
    part = (forms.data[a:b], forms.indices[a:b], forms.indptr[start : end + 1] - a)
    return sp.csr_array(part, shape=(end - start, forms.shape[1]))


@dataclass(frozen=True)
class _Carried:
    """Which free scales the terms of parameters carry, in the order of parameters and terms.

    Attributes:
        scale: indices of free scales.
        parameter: the number of the parameter.
        term: the number of the term within it.
        sign: of the exponent.
    """

    scale: NDArray[np.int64]
    parameter: NDArray[np.int64]
    term: NDArray[np.int64]
    sign: NDArray[np.float64]


def _carried(group: RescalingGroup) -> _Carried:
    found = [
        (distinct(ids.numpy().reshape(-1)), k, j, coefficient)
        for k, spec in enumerate(group.parameters.values())
        for j, (coefficient, ids) in enumerate(spec.terms)
    ]
    variables = np.concatenate([np.zeros(0, np.int64), *(ids for ids, *_ in found)])
    rows = group.basis[variables]
    repeats = np.diff(rows.indptr)
    lengths = [len(ids) for ids, *_ in found]
    tags = np.asarray([tag for _, *tag in found], dtype=np.int64).reshape(-1, 3)
    tags = np.repeat(np.repeat(tags, lengths, axis=0), repeats, axis=0)
    return _Carried(rows.indices, tags[:, 0], tags[:, 1], np.sign(tags[:, 2] * rows.data))


def _sides(
    group: RescalingGroup, carried: _Carried, names: Iterable[str]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Per free scale, whether any entry (also with g = 0) grows with it, and whether any shrinks.

    A scale with one side only (in front of a batch norm whose statistics move along) still has a
    minimiser; one of whose sides all entries have g = 0 is dead.
    """
    names = set(names)
    known = np.asarray([n in names for n in group.parameters], dtype=bool)[carried.parameter]
    gains = np.zeros(group.num_scales, dtype=bool)
    loses = np.zeros(group.num_scales, dtype=bool)
    gains[carried.scale[known & (carried.sign > 0)]] = True
    loses[carried.scale[known & (carried.sign < 0)]] = True
    return gains, loses


def _layers(group: RescalingGroup, carried: _Carried) -> NDArray[np.int64]:
    """A number per free scale: the parameter in whose rows or columns it stands first."""
    found = np.full(group.num_scales, -1, dtype=np.int64)
    number = _TERMS * carried.parameter + np.minimum(carried.term, _TERMS - 1)
    found[carried.scale[::-1]] = number[::-1]  # the first one is written last
    return found
