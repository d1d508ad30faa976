"""``condition_``: the whole pipeline on one screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathlift.capture.model import capture
from pathlift.capture.program import Program
from pathlift.capture.shown import Rehearsal
from pathlift.cautions import announce, behind_stand_ins, cautions, few_values, nothing
from pathlift.collector import uncollected
from pathlift.criteria import Criterion, as_criterion, path_kernel
from pathlift.errors import ArgumentError
from pathlift.gains import held_gains
from pathlift.homes.home import Home
from pathlift.homes.sharded import home_of
from pathlift.lifting.samples import variance_room
from pathlift.report import ConditioningReport, moves_of
from pathlift.rounding import Rounding, instead, rounding
from pathlift.settings import Settings
from pathlift.solve import Operator, Solution, round_scales, value
from pathlift.solve.assemble import Assembled, assemble_from
from pathlift.solve.bounds import extent_bounds
from pathlift.solve.levels import level_scales
from pathlift.solve.rooms import solve_in_range
from pathlift.surroundings import apart
from pathlift.symmetry.group import RescalingGroup, infer_group
from pathlift.tensors.extents import Extent
from pathlift.tensors.state import Optimizers, holding_state
from pathlift.timing import timed
from pathlift.verdict import facts_of, in_one_line, optimizer_kind
from pathlift.verify import Applied, Outputs, View, compared, looked, moved_buffers, taken_back

# Fall per parameter that rounding in float32 explains: a multiple of eps^2, by which what was
# minimised rises when the weights are rounded.
_UNRESOLVED = 1e-12


@apart
def condition_(
    model: nn.Module,
    example_inputs: object,
    *,
    criterion: str | Criterion | Mapping[str, Tensor] = "path-kernel",
    exact: bool | None = None,
    optimizer: Optimizers = None,
    solver: str = "newton",
    tol: float | None = None,
    verify: bool = True,
    on_nothing: str = "warn",
    batch_norm: str = "pinned",
    reference: Mapping[str, Tensor] | None = None,
) -> ConditioningReport:
    """Rescale ``model`` in place so that its path kernel is closest to a multiple of the identity.

    Minimises ``F(s) = p log(sum_i g'_i) - sum_i log g'_i`` with ``g'_i = g_i 2^(-2 (E s)_i)`` over
    the log2 scales ``s`` of the model's rescaling group (METHOD section 3; Lebeurrier, Vayer,
    Gribonval, ICML 2026). The network computes the same function before and after.

    Args:
        model: any module whose operations are the same for every input; DataParallel, DDP and
            ``torch.compile`` wrappers are looked through.
        example_inputs: one batch as forward takes it: a tensor, a tuple of positional arguments
            or a dict of keyword arguments. Only shapes matter, and one or two samples are enough,
            unless batch norms have seen no data: what they divide by is then measured on it, and a
            batch as in training says more.
        criterion: ``"path-kernel"``, ``"weight-norm"`` (ENorm), ``"range"`` (cross-layer
            equalization), a function from :mod:`pathlift.criteria` (``weight_norm(q=1)``,
            ``fisher(model, batches, loss)``), or a mapping of parameter name to coefficients
            ``g``, for which the same F is minimised.
        exact: True: round the scales to integers, so that every output keeps all its bits. False:
            apply the continuous optimum; outputs change by rounding errors (a change above 1e-5
            of the largest entry, in float32, fails and restores the model). None: continuous
            before training, which trains better or equally well; powers of two where ``optimizer``
            holds state, where a tensor to be scaled is narrower than float32, and where continuous
            scales would fail. ``report.rounding`` says which, and why.
        optimizer: optimiser, or a list of them, whose state is carried along (mid-training use;
            see :mod:`pathlift.tensors.state`). With an adaptive one (Adam and its kin) the scales
            of norms' gains stay as they are (:mod:`pathlift.gains`).
        solver: ``"newton"`` or ``"coordinate"`` (the published algorithm).
        tol: bound on the certificate ``max |dF/ds| / p`` (1e-8 if None; for ranges the largest
            ``|log2(range in / range out)|``, 0.05 if None).
        verify: run the model before and after, in both modes, and compare all that it shows.
        on_nothing: ``"warn"``, ``"error"`` or ``"ignore"`` where the call can change nothing.
        batch_norm: ``"pinned"`` or ``"invariant"`` (also rescale in front of batch norms, with
            their running statistics; exact up to ``eps``, so outputs change slightly); see
            :func:`pathlift.rescaling_group`.
        reference: diagonal ``r`` of the reference kernel, by parameter name; all ones if None.
            The coefficients become ``g / r``.

    Returns:
        The report.

    Raises:
        ArgumentError: an argument has the wrong type or value.
        CaptureError: the model can't be captured.
        VerificationError: the outputs differ by more than they may; the model is as before.

    In every case of failure the model is unchanged.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> x = torch.zeros(2, 4)
    >>> before = model(x)
    >>> report = pathlift.condition_(model, x)
    >>> report.num_scales, report.imbalance_after < report.imbalance_before
    (32, True)
    >>> torch.allclose(model(x), before, rtol=1e-5)
    True
    """
    chosen = as_criterion(criterion, reference)
    settings = Settings(chosen, exact, solver, tol, optimizer, verify, on_nothing)
    home, seconds, first = home_of(model), dict[str, float](), Rehearsal()
    known = understood(home, example_inputs, batch_norm, seconds, first)
    home.refresh()
    return condition_home(known, settings, seconds, first)


@dataclass(frozen=True)
class Understood:
    """Where parameters live, and what is known of the model: its program and its group."""

    home: Home
    program: Program
    group: RescalingGroup
    batch_norm: str


def understood(
    home: Home,
    example_inputs: object,
    batch_norm: str,
    seconds: dict[str, float],
    first: Rehearsal | None = None,
) -> Understood:
    """Capture a home's structure and find its group; what that takes is added to ``seconds``.

    ``first`` is filled with what the first real run shows.
    """
    with timed(seconds, "capture"):
        program = capture(home.structure, example_inputs, home.value, rehearsal=first)
    with timed(seconds, "symmetry"):
        group = infer_group(program, batch_norm)
    return Understood(home, program, group, batch_norm)


@uncollected
def condition_home(
    known: Understood,
    settings: Settings,
    seconds: dict[str, float],
    first: Rehearsal | None = None,
) -> ConditioningReport:
    """The pipeline, over whichever home: coefficients, scales, the change, the look at outputs.

    Args:
        known: see :func:`understood`.
        settings: see :func:`condition_`.
        seconds: what capture and symmetry took; goes into the report.
        first: what the first real run has shown, if nothing has changed since.
    """
    if first is not None:
        program = replace(known.program, statistics=first.statistics(known.program))
        known = replace(known, program=program)
    home, program, group = known.home, known.program, known.group
    seconds = {"capture": 0.0, "symmetry": 0.0} | seconds
    found = solved(known, settings, seconds)
    assembled, solution, extents = found.assembled, found.solution, found.extents
    view = View(home, program, moved_buffers(group, program), first)
    before = None
    if settings.verify:
        with timed(seconds, "verify"):
            before = view.look()
    how = rounding(
        settings.exact,
        optimizer=settings.optimizer,
        dtypes=[extents[n].dtype for n, s in group.parameters.items() if s.terms and n in extents],
        midway=settings.midway,
    )

    def apply(how: Rounding) -> Applied:
        with timed(seconds, "solve"):
            scales = solution.log2_scales
            if not settings.canonical:
                scales = scales_to_apply(assembled.operator, solution, how.exact)
            scales = home.agree(scales)
        with timed(seconds, "apply"):
            undo = home.multiply_(group.factors(scales), extents, settings.optimizer)
        pinned = known.batch_norm == "pinned"
        # Statistics that move along are exact up to the norm's eps only.
        slack = 1.0 if pinned else 100.0
        return Applied(view, group, scales, undo, how.exact and pinned, slack)

    how, made, change = kept(how, apply, view, before, seconds)
    behind = behind_stand_ins(program, found.approximated)
    few = few_values(program) if settings.criterion is path_kernel else ""
    warned = cautions(
        group,
        program,
        assembled,
        solution,
        made.scales,
        behind,
        found.held,
        settings.canonical,
        few,
    )
    report = summarised(group, found, made.scales, change, seconds)
    return replace(
        report,
        warnings=warned,
        behind_stand_ins=behind,
        rounding=str(how),
        advice=_advice(known, settings, how, report, assembled.imbalance(solution.log2_scales)),
    )


@dataclass(frozen=True)
class Solved:
    """The optimum of a criterion, and what it was found from.

    Attributes:
        extents: the magnitudes of what moves.
        approximated: operations a stand-in was used for, with counts.
        held: how many scales stay for the optimiser's sake; see :mod:`pathlift.gains`.
    """

    assembled: Assembled
    solution: Solution
    extents: dict[str, Extent]
    approximated: dict[str, int]
    held: int


def solved(known: Understood, settings: Settings, seconds: dict[str, float]) -> Solved:
    """Coefficients and the continuous optimum; nothing is changed. See :func:`condition_home`."""
    home, program, group = known.home, known.program, known.group
    with timed(seconds, "criterion"):
        extents = finite_extents(home, program, group)
        room = variance_room(program) if known.batch_norm == "invariant" else {}
        lower, upper = extent_bounds(group, extents, room)
        peaks = {n: e.exponents[1] + 1 for n, e in extents.items() if e.exponents is not None}
        program = replace(program, peaks=peaks)
        held = held_gains(group, None if settings.canonical else settings.optimizer)
        lower[held] = upper[held] = 0.0
        assembled, approximated = assemble_from(
            group,
            settings.criterion,
            program,
            lower=lower,
            upper=upper,
            store=home.store,
            frozen_count=settings.canonical,
        )
        announce(nothing(group, assembled), settings.on_nothing)
        if settings.canonical and len(assembled.dead):
            place = level_scales(
                group, lambda n: program.buffers[n] if n in program.buffers else program.value(n)
            )
            assembled = assembled.with_dead_at(np.clip(place, lower, upper))
    with timed(seconds, "solve"):
        assembled, solution = solve_in_range(
            group, extents, room, assembled, settings.solver, settings.tol
        )
    return Solved(assembled, solution, extents, approximated, int(held.sum()))


def kept(
    how: Rounding,
    apply: Callable[[Rounding], Applied],
    view: View,
    before: Outputs | None,
    seconds: dict[str, float],
) -> tuple[Rounding, Applied, float | None]:
    """Apply scales and look at the outputs, a second time where the default rounding fails.

    Returns:
        The rounding that stays, what was applied, and the largest change of an output.

    Raises:
        VerificationError: the outputs differ by more than they may; the model is as before.
    """
    made, asked = apply(how), how
    if before is None:
        return how, made, None
    with timed(seconds, "verify"):
        now = looked(made, before)
    if not (how.exact or how.asked):
        with timed(seconds, "verify"):
            change, times = taken_back(made, before, now)
        if times <= 1:
            return how, made, change
        how = instead(times)
        made = apply(how)
        with timed(seconds, "verify"):
            now = looked(made, before)
    if view.shown and made.fails(before, now):
        made.undo()  # watched during its capture, the model may have run by other kernels
        view.forget()
        with timed(seconds, "verify"):
            before = view.look()
        return kept(asked, apply, view, before, seconds)
    with timed(seconds, "verify"):
        return how, made, compared(made, before, now)


def _advice(
    known: Understood,
    settings: Settings,
    how: Rounding,
    report: ConditioningReport,
    imbalance_after: float,
) -> str:
    """One line from what is known by now; empty where the rule was not made for the case."""
    if settings.criterion is not path_kernel or holding_state(settings.optimizer):
        return ""  # it is about the path kernel, and about the first step
    kind = optimizer_kind(settings.optimizer)
    facts = facts_of(known.home.structure, known.group, report, imbalance_after, kind)
    return in_one_line(facts, how.exact)


def finite_extents(home: Home, program: Program, group: RescalingGroup) -> dict[str, Extent]:
    """The magnitudes of all parameters, which must be finite, and of the buffers that scale."""
    names = [n for n, spec in group.parameters.items() if spec.terms or n in program.parameters]
    found = home.extents(names)
    for name, extent in found.items():
        if name in program.parameters and not extent.finite:
            raise ArgumentError(
                f"{home.label(name)} has entries that are NaN or infinite; its path kernel is not "
                f"defined. Restore the weights or initialise them again."
            )
    return found


def scales_to_apply(operator: Operator, solution: Solution, exact: bool) -> NDArray[Any]:
    """What of a continuous solution is applied: int64 if exact, else float64."""
    scales: NDArray[Any] = solution.log2_scales
    if exact:
        scales = round_scales(operator, scales)
    fall = value(operator, np.zeros(len(scales))) - value(operator, scales.astype(np.float64))
    if fall <= _UNRESOLVED * operator.problem.count:
        # Integers near the optimum may be no better than staying; continuous scales of what has
        # just been conditioned only undo how its weights were rounded.
        scales = np.zeros_like(scales)
    return scales


def summarised(
    group: RescalingGroup,
    found: Solved,
    scales: NDArray[Any],
    change: float | None,
    seconds: dict[str, float],
) -> ConditioningReport:
    """The report of scales that were applied."""
    assembled, solution = found.assembled, found.solution
    return ConditioningReport(
        num_scales=group.num_scales,
        num_parameters=assembled.problem.count,
        imbalance_before=assembled.imbalance(np.zeros(group.num_scales)),
        imbalance_after=assembled.imbalance(scales.astype(np.float64)),
        gradient_norm=solution.gradient_norm,
        converged=solution.converged,
        iterations=solution.iterations,
        dead_channels=len(assembled.dead),
        log2_scales=torch.from_numpy(scales),
        max_output_change=change,
        unsupported=group.unsupported,
        approximated=found.approximated,
        seconds=seconds,
        passes=solution.passes,
        reduced_bytes=sum(b.matrix.nbytes for b in assembled.problem.blocks),
        moves=moves_of(group, scales),
    )
