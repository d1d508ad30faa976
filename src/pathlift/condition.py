"""``condition_``: the whole pipeline on one screen."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathlift import sharded
from pathlift.apply import rescale_tensors_
from pathlift.capture import (
    Program,
    capture,
    check_model,
    named_tensors,
    preserved,
    tensors_in,
)
from pathlift.criteria import Criterion, as_criterion
from pathlift.errors import ArgumentError, VerificationError
from pathlift.extents import Extent, extent_bounds, extents
from pathlift.report import ConditioningReport
from pathlift.solve import Operator, Solution, round_scales, solve, value
from pathlift.solve.assemble import Assembled, assemble_from
from pathlift.symmetry.group import RescalingGroup, infer_group
from pathlift.training.optimizers import Optimizers


def condition_(
    model: nn.Module,
    example_inputs: object,
    *,
    criterion: str | Criterion | Mapping[str, Tensor] = "path-kernel",
    exact: bool = True,
    optimizer: Optimizers = None,
    solver: str = "newton",
    tol: float | None = None,
    verify: bool = True,
    batch_norm: str = "pinned",
    reference: Mapping[str, Tensor] | None = None,
) -> ConditioningReport:
    """Rescale ``model`` in place so that its path kernel is closest to a multiple of the identity.

    Minimises ``F(s) = p log(sum_i g'_i) - sum_i log g'_i`` with ``g'_i = g_i 2^(-2 (E s)_i)`` over
    the log2 scales ``s`` of the model's rescaling group (METHOD section 3; Lebeurrier, Vayer,
    Gribonval, ICML 2026). The network computes the same function before and after.

    Args:
        model: any module that torch.export (or plain tracing) captures; DataParallel, DDP and
            ``torch.compile`` wrappers are looked through.
        example_inputs: one batch as forward takes it: a tensor, a tuple of positional arguments
            or a dict of keyword arguments. Only shapes matter; one or two samples are enough.
        criterion: ``"path-kernel"``, ``"weight-norm"`` (ENorm), ``"range"`` (cross-layer
            equalization), a function from :mod:`pathlift.criteria` (``weight_norm(q=1)``,
            ``fisher(model, batches, loss)``), or a mapping of parameter name to coefficients
            ``g``, for which the same F is minimised.
        exact: round the scales to integers, so that every output keeps all its bits. Otherwise
            the continuous optimum is applied and outputs change by rounding errors.
        optimizer: optimiser, or a list of them, whose state is carried along (mid-training use;
            see :mod:`pathlift.training.optimizers`).
        solver: ``"newton"`` or ``"coordinate"`` (the published algorithm).
        tol: bound on the certificate ``max |dF/ds| / p`` (1e-8 if None; for ranges the largest
            ``|log2(range in / range out)|``, 0.05 if None).
        verify: run the model before and after and compare the outputs.
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
        VerificationError: exact, and the outputs differ; the model is as before.

    In every case of failure the model is unchanged.
    """
    check_arguments(exact, optimizer, tol, verify)
    chosen = as_criterion(criterion, reference)
    conditioner = Conditioner(model, example_inputs, batch_norm=batch_norm)
    return conditioner.condition_(
        criterion=chosen,
        exact=exact,
        optimizer=optimizer,
        solver=solver,
        tol=tol,
        verify=verify,
    )


class Conditioner:
    """A captured model and its group, to condition it many times at the cost of the solve.

    Args:
        model, example_inputs, batch_norm: see :func:`condition_`.

    Raises:
        ArgumentError, CaptureError: see :func:`condition_`.
    """

    def __init__(
        self, model: nn.Module, example_inputs: object, *, batch_norm: str = "pinned"
    ) -> None:
        self.model = check_model(model)
        self.batch_norm = batch_norm
        self._seconds: dict[str, float] = {}
        self._groups = sharded.process_groups(model)
        sharded.reshard(self.model)
        self._parameters, self._buffers, _ = named_tensors(self.model)
        with timed(self._seconds, "capture"):
            if sharded.has_shards(self.model):
                whole = sharded.gather(self._parameters)
                self._program = capture(sharded.structure(self.model), example_inputs, whole)
            else:
                self._program = capture(self.model, example_inputs)
        with timed(self._seconds, "symmetry"):
            self.group = infer_group(self._program, batch_norm)

    def condition_(
        self,
        *,
        criterion: str | Criterion | Mapping[str, Tensor] = "path-kernel",
        exact: bool = True,
        optimizer: Optimizers = None,
        solver: str = "newton",
        tol: float | None = None,
        verify: bool = True,
        reference: Mapping[str, Tensor] | None = None,
    ) -> ConditioningReport:
        """Condition the model as it is now; arguments, report and errors as :func:`condition_`.

        The report's seconds of capture and symmetry stand in the first report only.
        """
        check_arguments(exact, optimizer, tol, verify)
        chosen = as_criterion(criterion, reference)
        model, program, group = self.model, self._program, self.group
        self._check_same_parameters()
        tensors = {**self._buffers, **self._parameters}
        known = _finite_extents(group, self._parameters, self._buffers)
        seconds = {"capture": 0.0, "symmetry": 0.0} | self._seconds
        self._seconds = {}
        with timed(seconds, "criterion"):
            lower, upper = extent_bounds(group, known)
            assembled, approximated = assemble_from(
                group, chosen, program, lower=lower, upper=upper
            )
        with timed(seconds, "solve"):
            solution, scales = choose_scales(assembled.operator, solver, tol, exact)
            scales = sharded.from_first(scales, self._groups, self._device())
        outputs = None
        with timed(seconds, "verify"):
            if verify:
                outputs = _outputs(model, program)
        with timed(seconds, "apply"):
            rescale_tensors_(tensors, group, scales, optimizer, known)
        with timed(seconds, "verify"):
            change = None
            if outputs is not None:
                try:
                    keeps_bits = exact and self.batch_norm == "pinned"
                    change = self._difference(outputs, _outputs(model, program), keeps_bits)
                except BaseException:
                    rescale_tensors_(tensors, group, -scales, optimizer)
                    raise
        return summarised(group, assembled, solution, scales, approximated, change, seconds)

    def _check_same_parameters(self) -> None:
        sharded.reshard(self.model)
        parameters, self._buffers, _ = named_tensors(self.model)
        for name, parameter in self._parameters.items():
            if parameters.get(name) is not parameter:
                raise ArgumentError(
                    f"parameter '{name}' is not the one that was captured; the model was changed "
                    f"(moved with a conversion, pruned, parametrised). Make a new Conditioner."
                )

    def _difference(self, before: Any, after: Any, exact: bool) -> float:
        """The largest change of an output, on any process."""
        worst = _largest_change(before, after)
        # The bits of a non-negative float64 order as its values do.
        bits = int(np.float64(worst).view(np.int64))
        (bits,) = sharded.largest((bits,), self._groups, self._device())
        worst = float(np.int64(bits).view(np.float64))
        if exact and worst > 0:
            raise VerificationError(
                f"the rescaled network's outputs differ by up to {worst:.3g} although all scales "
                f"are powers of two. An activation may leave the range of its dtype, or forward "
                f"may not be deterministic. The model has been restored; try a wider dtype, or "
                f"exact=False."
            )
        return worst

    def _device(self) -> torch.device | None:
        return next((p.device for p in self._parameters.values()), None)


def choose_scales(
    operator: Operator, solver: str, tol: float | None, exact: bool
) -> tuple[Solution, NDArray[Any]]:
    """The continuous solution, and the scales to apply: int64 if exact, else float64."""
    solution = solve(operator, solver, tol)
    scales: NDArray[Any] = solution.log2_scales
    if exact:
        scales = round_scales(operator, scales)
    if value(operator, scales.astype(np.float64)) >= value(operator, np.zeros(len(scales))):
        # Integers near the optimum may be no better than staying.
        scales = np.zeros_like(scales)
    return solution, scales


def summarised(
    group: RescalingGroup,
    assembled: Assembled,
    solution: Solution,
    scales: NDArray[Any],
    approximated: dict[str, int],
    change: float | None,
    seconds: dict[str, float],
) -> ConditioningReport:
    """The report of scales that were applied."""
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
        approximated=approximated,
        seconds=seconds,
        passes=solution.passes,
        reduced_bytes=sum(b.matrix.nbytes for b in assembled.problem.blocks),
    )


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def check_arguments(exact: object, optimizer: object, tol: object, verify: object) -> None:
    for name, flag in (("exact", exact), ("verify", verify)):
        if not isinstance(flag, bool):
            raise ArgumentError(f"{name} must be True or False; found {flag!r}.")
    given = tol is not None
    if given and (isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0 < tol < 1):
        raise ArgumentError(f"tol must be a number between 0 and 1; found {tol!r}.")
    several = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    for one in several:
        if one is not None and not isinstance(one, torch.optim.Optimizer):
            raise ArgumentError(
                f"optimizer must be a torch.optim.Optimizer, a list of them or None; "
                f"found {type(one).__name__}."
            )


def _finite_extents(
    group: RescalingGroup, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> dict[str, Extent]:
    """The magnitudes of all parameters, which must be finite, and of the buffers that scale."""
    found = extents({n: p for n, p in parameters.items() if p.is_floating_point()})
    for name, known in found.items():
        if not known.finite:
            raise ArgumentError(
                f"parameter '{name}' has entries that are NaN or infinite; its path kernel is not "
                f"defined. Restore the weights or initialise them again."
            )
    moving = [n for n, spec in group.parameters.items() if spec.terms and n not in found]
    return found | extents({n: buffers[n] for n in moving})


def _outputs(model: nn.Module, program: Program) -> list[list[Tensor]]:
    """Outputs of the real model in every captured mode, with buffers and random state restored."""
    found = []
    with preserved(model), torch.no_grad():
        buffers = [(b, b.clone()) for b in program.buffers.values()]
        own = model.training
        for graph in program.graphs:
            if graph.training != own:
                model.train(graph.training)
            torch.manual_seed(0)
            try:
                out = model(*program.inputs.args, **program.inputs.kwargs)
                found.append([t.detach().clone() for t in tensors_in(out)])
            finally:
                for buffer, value in buffers:
                    buffer.copy_(value)
    sharded.reshard(model)
    return found


def _largest_change(before: Any, after: Any) -> float:
    worst = 0.0
    for a, b in zip(sum(before, []), sum(after, []), strict=True):
        if torch.equal(a, b) or (
            a.is_floating_point()
            and torch.equal(a.nan_to_num(), b.nan_to_num())
            and torch.equal(a.isnan(), b.isnan())
        ):
            continue
        gap = (a.to(torch.float64) - b.to(torch.float64)).abs()
        worst = max(worst, float(gap.nan_to_num(nan=float("inf")).max()))
    return worst
