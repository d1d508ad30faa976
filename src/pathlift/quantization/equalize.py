"""``equalize_``: batch norms folded, ranges equalised, high biases absorbed, in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from pathlift.absorption import (
    Statistics,
    absorb_captured_,
    fold_captured_,
    rescaled_statistics,
)
from pathlift.capture.inputs import as_inputs
from pathlift.capture.model import capture
from pathlift.capture.names import check_model, named_tensors
from pathlift.capture.program import Inputs, Program
from pathlift.capture.shown import Rehearsal
from pathlift.errors import ArgumentError, VerificationError
from pathlift.quantization.bounded import free_relu6_
from pathlift.quantization.formats import format_of
from pathlift.quantization.layers import Weight, channel_axis, checked_target, weights
from pathlift.quantization.measure import floats, measure, run, squared_error
from pathlift.quantization.report import EqualizationReport, LayerRow, Spread, spread_of
from pathlift.quantization.search import Asked, bounds, names_of, search
from pathlift.quantization.terms import Term
from pathlift.quantization.trial import Trials, apply_best_
from pathlift.solve.matrix import Array
from pathlift.surroundings import apart
from pathlift.symmetry.group import infer_group
from pathlift.tensors.shards import is_sharded
from pathlift.timing import timed
from pathlift.verify import excess, largest_change

# By how much folding and rescaling may exceed what rounding explains in a single operation.
_SLACK = 100.0
# Absorbing biases may cost this part of the quantisation's own error, else it is taken back.
_ABSORBED = 0.1
# What a module holds; nothing else of it is changed.
_REGISTRIES = ("_parameters", "_buffers", "_modules")


@apart
def equalize_(
    model: nn.Module,
    example_inputs: object,
    *,
    fold: bool = True,
    biases: str = "shrink",
    relu6: str = "keep",
    activations: Sequence[object] | None = None,
    strength: float = 0.5,
    absorb: bool = True,
    format: str = "int8",
    per: str = "tensor",
    thorough: bool = False,
) -> EqualizationReport:
    """Prepare a model for quantisation, in place: fold, equalise and absorb.

    Batch norms are folded into the layers in front of them. Then the rescaling is applied that
    makes the error least that quantised weights cause at the model's output, over all scales of
    the model's rescaling group at once (continuous, not powers of two). For a weight with one
    largest magnitude per tensor that error is

        max_i |w'_i|^2 / (12 steps^2) * sum_i G'_i,    w' = w 2^(E s),   G' = G 2^(-2 E s),

    with G the mean squared derivative of the output by each entry on the example inputs; the sum
    over all tensors is convex in s. Last, what pre-activations exceed zero by almost always is
    moved from a layer's bias into the next ones' (:mod:`pathlift.absorption`).

    What rounding then really makes of the outputs on the example inputs is measured, without the
    scales and with them; they are applied only if it is less, and the report has both figures.

    Args:
        model: in evaluation mode, the only one that is looked at: what runs in training mode alone
            (auxiliary heads) is not rescaled with the rest.
        example_inputs: one batch as forward takes it. Its values matter: sensitivities are measured
            on its first samples (1 to 8, of small models more), and a few
            typical ones are enough.
        fold: fold batch norms.
        biases: ``"shrink"`` or ``"ignore"``. Biases are not quantised, but a layer's output ranges
            over its bias at least. ``"shrink"`` counts, for each quantised layer, the error of
            its output if it were rounded with one step for all channels and the range of every
            channel were its bias ``|b|``; that keeps scales from growing large biases. With
            ``activations`` real ranges, which contain the biases, take their place.
        relu6: ``"keep"``, ``"relu"`` (make it ReLU, as the publication does: changes the function
            where activations exceed 6) or ``"per-channel"``
            (:class:`~pathlift.quantization.BoundedReLU`: the same function, channels free).
        activations: batches like ``example_inputs`` to calibrate on. The errors of quantising the
            inputs of linear layers and convolutions, per tensor over their ranges on these batches,
            are then counted too.
        strength: 0 to 1, as in SmoothQuant: weights' errors count ``2 (1 - strength)``-fold and
            activations' ``2 strength``-fold, so that 0 looks at weights alone, 1 at activations
            alone, and 0.5 is the error of both. Without ``activations`` it has no meaning.
        absorb: absorb high biases of folded layers, at 3 deviations. Taken back if it changes
            the outputs on the example by more than a tenth of the predicted error.
        format: ``"int8"``, ``"int4"`` or ``"float8_e4m3"``.
        per: one step per ``"tensor"``, or per output ``"channel"`` of weights.
        thorough: search longer in models of more than a million weights (smaller ones always get
            it), for a few times the seconds: further rounds and draws where steps are few or
            ``activations`` are given. Worth some decibels at int4, and little at int8.

    Returns:
        The report: ranges and predicted SQNR before and after, per layer and in all.

    Raises:
        ArgumentError: a wrong argument, a model in training mode or spread over processes.
        CaptureError: the model can't be captured.
        VerificationError: outputs differ by more than rounding explains.

    In every case of failure the model is as it was.
    """
    kind, target = format_of(format), checked_target(per)
    asked = Asked(fold, biases, relu6, strength, absorb, kind, target, thorough)
    model = check_model(model)
    if model.training:
        raise ArgumentError("the model is in training mode. Call model.eval() first.")
    sharded = [n for n, p in named_tensors(model)[0].items() if is_sharded(p)]
    if sharded:
        raise ArgumentError(
            f"parameter '{sharded[0]}' is spread over several processes. Equalise the whole model "
            f"on one process, before it is sharded."
        )
    batches = [as_inputs(batch) for batch in activations or ()]
    if activations is not None and not batches:
        raise ArgumentError("activations is empty; pass at least one batch, or None.")
    seconds: dict[str, float] = {}
    rehearsal = Rehearsal()
    with timed(seconds, "capture"):
        program = capture(model, example_inputs, both=False, rehearsal=rehearsal)
    with _restored_on_failure(model):
        return _equalized(model, program, batches, asked, seconds, rehearsal)


def _equalized(
    model: nn.Module,
    program: Program,
    batches: Sequence[Inputs],
    asked: Asked,
    seconds: dict[str, float],
    rehearsal: Rehearsal,
) -> EqualizationReport:
    with timed(seconds, "verify"):
        seen = rehearsal.stands_for(program).get(False)
        before = floats(seen.returned) if seen else run(model, program.inputs)
    replaced, change_relu6 = 0, 0.0
    if asked.relu6 != "keep":
        replaced, program = free_relu6_(model, program, asked.relu6)
        if asked.relu6 == "relu":
            now = run(model, program.inputs)
            before, change_relu6 = now, _relative(before, now)
    folded: Statistics = {}
    if asked.fold:
        with timed(seconds, "fold"):
            folded, program = fold_captured_(model, program)
    with timed(seconds, "symmetry"):
        group = infer_group(program)
    found = list(weights(model))
    with timed(seconds, "measure"):
        longer = asked.thorough or (asked.coarse and asked.further(found))
        names = names_of(found, group)
        measured = measure(model, program, found, names, batches, 2 if longer else 1)
    with timed(seconds, "solve"):
        limits = bounds(program, group)
        result = search(found, group, measured, asked, limits)
    spreads = {one.name: spread_of(one.parameter, channel_axis(one.module)) for one in found}
    with timed(seconds, "try"):
        both = bool(measured.inputs)
        trials = Trials(model, program, group, found, before, asked, both)
        none, errors = trials.scales, result.errors(trials.scales)
        first = errors.each(none)
        apply_best_(trials, result.scales, limits, result.draws)
        scales = trials.scales
        each = first, result.errors(scales).each(scales)
    with timed(seconds, "verify"):
        after = run(model, program.inputs)
        change = _checked_change(before, after)
    with timed(seconds, "absorb"):
        noise = float(each[1].sum()) / max(measured.power, 1e-300)
        moved = rescaled_statistics(folded, group, torch.from_numpy(scales))
        absorbed, change_absorbed = 0, 0.0
        if asked.absorb and moved:
            absorbed, change_absorbed = _absorbed(model, program, moved, after, noise)
    return _report(
        found=found,
        asked=asked,
        terms=errors.terms,
        each=each,
        scales=scales,
        power=measured.power,
        spreads=spreads,
        counts=(len(folded), replaced, absorbed),
        changes=(change, change_absorbed, change_relu6),
        tried=[decibels(_power(before), error) for error in trials.errors],
        evaluations=result.evaluations,
        seconds=seconds,
    )


def _checked_change(before: list[Tensor], after: list[Tensor]) -> float:
    if excess([before], [after]) > _SLACK:
        raise VerificationError(
            f"folding and rescaling changed the outputs by {_relative(before, after):.3g} of their "
            f"largest entry; rounding explains far less. The model has been restored. Try a wider "
            f"dtype (model.double()), and look for layers that leave its range."
        )
    return _relative(before, after)


def _relative(before: list[Tensor], after: list[Tensor]) -> float:
    size = max((float(t.abs().max()) for t in before if t.numel()), default=0.0)
    return largest_change([before], [after]) / size if size else 0.0


def _power(outputs: Sequence[Tensor]) -> float:
    return sum(float(t.double().square().sum()) for t in outputs)


def _absorbed(
    model: nn.Module, program: Program, statistics: Statistics, before: list[Tensor], noise: float
) -> tuple[int, float]:
    """Channels whose bias was absorbed, and the change; (0, 0) where it was taken back."""
    kept = {n: p.detach().clone() for n, p in program.parameters.items() if p.dim() == 1}
    count = sum(absorb_captured_(program, statistics).values())
    if not count:
        return 0, 0.0
    after = run(model, program.inputs)
    if squared_error(before, after) <= _ABSORBED * noise * _power(before):
        return count, _relative(before, after)
    with torch.no_grad():
        for name, values in kept.items():
            program.parameters[name].copy_(values)
    return 0, 0.0


def _report(
    *,
    found: Sequence[Weight],
    asked: Asked,
    terms: Sequence[Term],
    each: tuple[Array, Array],
    scales: Array,
    power: float,
    spreads: dict[str, Spread],
    counts: tuple[int, int, int],
    changes: tuple[float, float, float],
    tried: list[float],
    evaluations: int,
    seconds: dict[str, float],
) -> EqualizationReport:
    first, last = each
    counted = np.asarray([t.kind != "bias" for t in terms], dtype=bool)
    rows = []
    by_name = {t.name: k for k, t in enumerate(terms) if t.kind == "weight"}
    for one in found:
        if one.name in by_name:
            k = by_name[one.name]
            now = spread_of(one.parameter, channel_axis(one.module))
            pair = decibels(power, first[k]), decibels(power, last[k])
            rows.append(LayerRow(one.name, spreads[one.name], now, *pair))
    return EqualizationReport(
        format=asked.format.name,
        per=asked.per,
        num_scales=len(scales),
        folded=counts[0],
        relu6_replaced=counts[1],
        absorbed=counts[2],
        sqnr_before=decibels(power, float(first[counted].sum())),
        sqnr_after=decibels(power, float(last[counted].sum())),
        measured_before=tried[0],
        measured_after=max(tried),
        tried=tuple(tried),
        change=changes[0],
        change_absorbed=changes[1],
        change_relu6=changes[2],
        log2_scales=torch.from_numpy(scales),
        layers=tuple(rows),
        evaluations=evaluations,
        seconds=seconds,
    )


def decibels(power: float, error: float) -> float:
    """``10 log10(power / error)``; infinite without an error."""
    return float(10.0 * np.log10(power / error)) if error > 0 and power > 0 else float("inf")


@contextmanager
def _restored_on_failure(model: nn.Module) -> Iterator[None]:
    """The model with its modules, parameters and buffers as they were, if anything fails."""
    held = [(m, [dict(getattr(m, n)) for n in _REGISTRIES]) for m in model.modules()]
    tensors = [t for _, (own, buffers, _) in held for t in (*own.values(), *buffers.values())]
    known = {id(t): t for t in tensors if t is not None}
    values = [(t, t.detach().clone()) for t in known.values()]
    try:
        yield
    except BaseException:
        for module, kept in held:
            for name, entries in zip(_REGISTRIES, kept, strict=True):
                registry = getattr(module, name)
                registry.clear()
                registry.update(entries)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        raise
