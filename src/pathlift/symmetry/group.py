"""The rescaling group of a model: all its integer log2 scales, and what they do to parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathlift import plots
from pathlift.capture.model import capture
from pathlift.capture.names import check_model, named_tensors
from pathlift.capture.program import Program
from pathlift.collector import uncollected
from pathlift.errors import ArgumentError
from pathlift.surroundings import apart
from pathlift.symmetry.equations import Equations
from pathlift.symmetry.inference import Inference
from pathlift.symmetry.rows import ParameterScales, distinct_rows, restrict_to_effect
from pathlift.symmetry.scales import collapse, varying
from pathlift.tensors.rescale import rescale_


@dataclass(frozen=True)
class RescalingGroup:
    """Every rescaling of a model that the graph proves to leave its function unchanged.

    Attributes:
        num_scales: dimension ``H`` of the group.
        basis: sparse integer matrix (variables, H): log2 scale of each variable in terms of the
            free scales ``s``.
        parameters: per parameter, the variables its rows and columns carry.
        unsupported: operations that pinned something, with counts.
        equations: what the basis was solved from, for the reasons in the summary.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> x = torch.zeros(2, 4)
    >>> group = pathlift.rescaling_group(model, x)
    >>> before = model(x)
    >>> group.rescale_(model, torch.randint(-3, 4, (group.num_scales,)))
    >>> torch.equal(model(x), before)
    True
    """

    num_scales: int
    basis: sp.csr_array
    parameters: dict[str, ParameterScales]
    unsupported: dict[str, int] = field(default_factory=dict)
    equations: Equations | None = field(default=None, repr=False, compare=False)

    def variables(self, log2_scales: Tensor | NDArray[np.generic]) -> NDArray[np.float64]:
        """Log2 scale of every variable, float64, shape (variables,)."""
        scales = np.asarray(torch.as_tensor(log2_scales).detach().cpu(), dtype=np.float64)
        if scales.shape != (self.num_scales,):
            raise ArgumentError(
                f"log2_scales has shape {tuple(scales.shape)}; this group has {self.num_scales} "
                f"scales. Pass a tensor of shape ({self.num_scales},), one log2 scale each."
            )
        if not np.isfinite(scales).all():
            raise ArgumentError(
                f"log2_scales has {int((~np.isfinite(scales)).sum())} entries that are not "
                f"finite. Pass finite log2 scales (integers for bit-exact rescaling)."
            )
        return np.asarray(self.basis @ scales)

    def parameter_exponents(self, variables: NDArray[np.float64]) -> dict[str, list[Tensor]]:
        """Name -> log2 factors: small float64 tensors whose broadcast sum is ``E s``.

        One per group of axes (rows, columns); zero ones, and parameters without others, left out.
        """
        table = torch.from_numpy(variables)
        found: dict[str, list[Tensor]] = {}
        for name, spec in self.parameters.items():
            for _, terms in spec.components():
                total = _weighted(table, *terms[0])
                for term in terms[1:]:
                    total = total + _weighted(table, *term)
                if total.count_nonzero():
                    found.setdefault(name, []).append(total)
        return found

    def exponents(self, name: str) -> Tensor:
        """The exponent rows ``E`` of a parameter.

        Returns:
            Integer tensor of the parameter's shape with one more dimension of size
            ``num_scales``: the parameter is multiplied by ``2 ** (exponents @ s)``. Dense, so
            for small models.
        """
        spec = self._spec(name)
        basis = torch.from_numpy(self.basis.toarray())
        total = torch.zeros((*spec.shape, self.num_scales), dtype=torch.int64)
        for coefficient, ids in spec.terms:
            total = total + coefficient * basis[ids]
        return total

    def rescale_(self, model: nn.Module, log2_scales: Tensor) -> None:
        """Rescale ``model`` in place by any element of the group; all parameters or none.

        Args:
            model: the model the group was computed for (or one of the same structure).
            log2_scales: tensor (num_scales,). Integers keep every bit of the outputs.

        Raises:
            ArgumentError: wrong shape, not finite, or a model whose parameters differ.
            RangeError: a parameter would leave the normal range of its dtype.
        """
        parameters, buffers, _ = named_tensors(check_model(model))
        tensors = {**buffers, **parameters}
        self.check_tensors(tensors)
        rescale_(tensors, self.factors(log2_scales))

    def factors(self, log2_scales: Tensor | NDArray[np.generic]) -> dict[str, list[Tensor]]:
        """Name -> log2 factors of every tensor that an element of the group changes.

        Args:
            log2_scales: shape (num_scales,).

        Returns:
            Small float64 tensors that broadcast to the parameter's shape; their sum is ``E s``.

        Raises:
            ArgumentError: wrong shape, or not finite.
        """
        return self.parameter_exponents(self.variables(log2_scales))

    def check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ArgumentError unless all that the group rescales is there, in its shape."""
        for name, spec in self.parameters.items():
            if name not in tensors:
                raise ArgumentError(
                    f"the model has no parameter '{name}', which the group rescales. Pass the "
                    f"model the group was computed for."
                )
            if tensors[name].shape != spec.shape:
                raise ArgumentError(
                    f"parameter '{name}' has shape {tuple(tensors[name].shape)}; the group was "
                    f"computed for {tuple(spec.shape)}. Pass the model the group was computed for."
                )

    def summary(self) -> str:
        """Per parameter: which dimensions scale, with which others, and what pins the rest.

        ``dim 0: 64 scales (with bn1.bias dim 0 and 3 more)`` says that the 64 rows carry 64 free
        scales, which the named dimensions of other parameters carry too, with equal or opposite
        sign. ``dim 1: pinned by gelu at 'blocks.0.act'`` names the operation that takes the
        freedom away and the module that calls it.
        """
        lines = [f"{self.num_scales:,} free scales"]
        width = max((len(n) for n in self.parameters), default=0)
        shapes = {n: "x".join(map(str, s.shape)) or "scalar" for n, s in self.parameters.items()}
        wide = max((len(s) for s in shapes.values()), default=0)
        users = self._users()
        for name, spec in self.parameters.items():
            lines.append(
                f"  {name:<{width}}  {shapes[name]:<{wide}}  "
                + "; ".join([*self._free_parts(spec, users), *self._pinned_parts(spec)])
            )
        for operation, count in self.unsupported.items():
            lines.append(f"  not homogeneous or not known: {operation} ({count} calls)")
        return "\n".join(lines)

    def plot(self) -> Any:
        """A matplotlib figure: which channels share a scale, what is pinned and by whom.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        return plots.plot_group(self)

    def why_pinned(self, name: str) -> dict[int, str]:
        """Dimension -> what pins it, for the dimensions of a parameter that carry no scale."""
        spec = self._spec(name)
        axes = [a for a, _ in spec.components()]
        if () in axes:
            return {}  # all entries together carry a scale
        free = {d for a in axes for d in a}
        reasons: dict[int, str] = {}
        for d, n in enumerate(spec.shape or (1,)):
            reason = (
                None if d in free or (n == 1 and spec.shape.numel() > 1) else self._reason(spec, d)
            )
            # Kernel positions and the like never carry scales; the input's dimension is said once.
            if reason and reason not in reasons.values():
                reasons[d] = reason
        return reasons

    def _reason(self, spec: ParameterScales, dim: int) -> str | None:
        if not spec.uses and not spec.why_pinned:
            return "not used by the model"
        if self.equations is not None:
            for ids in spec.variables:
                if dim in varying(ids) or not varying(ids):
                    origin = self.equations.why_zero(int(ids.flatten()[0]))
                    if origin:
                        return f"pinned by {origin}"
        if spec.why_pinned:
            return f"pinned as {spec.why_pinned}"
        if spec.why_input:
            return f"its input is pinned by {spec.why_input}"
        return None if spec.terms else f"pinned around {spec.uses[0]}"

    def _users(self) -> dict[int, list[tuple[str, str]]]:
        """Variable -> the (parameter, dimensions) that carry it."""
        users: dict[int, list[tuple[str, str]]] = {}
        for name, spec in self.parameters.items():
            for axes, terms in spec.components():
                for variable in {int(v) for _, ids in terms for v in np.unique(ids.numpy())}:
                    users.setdefault(variable, []).append((name, _dims(axes)))
        return users

    def _free_parts(
        self, spec: ParameterScales, users: dict[int, list[tuple[str, str]]]
    ) -> list[str]:
        parts = []
        for axes, terms in spec.components():
            variables = np.unique(np.concatenate([ids.numpy().ravel() for _, ids in terms]))
            variables = variables[variables > 0]
            own = (spec.name, _dims(axes))
            others = [f"{n} {d}" for n, d in users[int(variables[0])] if (n, d) != own]
            more = f" and {len(others) - 2} more" if len(others) > 2 else ""
            shared = f" (with {', '.join(others[:2])}{more})" if others else ""
            plural = "scale" if len(variables) == 1 else "scales"
            parts.append(f"{_dims(axes)}: {len(variables):,} {plural}{shared}")
        return parts

    def _pinned_parts(self, spec: ParameterScales) -> list[str]:
        reasons = self.why_pinned(spec.name)
        whole = not spec.terms and len(set(reasons.values())) == 1
        if whole:
            return [next(iter(reasons.values()))]
        return [f"dim {d}: {reason}" for d, reason in reasons.items()]

    def __repr__(self) -> str:
        return f"RescalingGroup(num_scales={self.num_scales}, parameters={len(self.parameters)})"

    def _spec(self, name: str) -> ParameterScales:
        if name not in self.parameters:
            raise ArgumentError(
                f"'{name}' is not a parameter of this group; it has "
                f"{', '.join(map(repr, list(self.parameters)[:5]))}"
                f"{', …' if len(self.parameters) > 5 else ''}. Tied parameters stand under "
                f"their first name."
            )
        return self.parameters[name]


@apart
def rescaling_group(
    model: nn.Module, example_inputs: object, *, batch_norm: str = "pinned"
) -> RescalingGroup:
    """The rescaling group of ``model``; nothing is changed.

    Args:
        model: any module whose operations are the same for every input.
        example_inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
        batch_norm: ``"pinned"`` (the input of a batch norm has no scale; every element of the
            group is exact) or ``"invariant"`` (the input is free too, and ``running_mean`` and
            ``running_var`` are rescaled along; exact up to the norm's ``eps``).

    Raises:
        ArgumentError, CaptureError: see :func:`pathlift.capture.capture`.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> x = torch.zeros(2, 4)
    >>> group = pathlift.rescaling_group(model, x)
    >>> group.num_scales
    32
    >>> group.summary().splitlines()[0]
    '32 free scales'
    """
    return infer_group(capture(model, example_inputs), batch_norm)


@uncollected
def infer_group(program: Program, batch_norm: str = "pinned") -> RescalingGroup:
    """The group of a captured program: inference, then a basis of the solutions."""
    if batch_norm not in ("pinned", "invariant"):
        raise ArgumentError(
            f"batch_norm must be 'pinned' or 'invariant'; found {batch_norm!r}. 'pinned' keeps "
            f"every bit, 'invariant' also frees what stands in front of a batch norm, up to eps."
        )
    inference = Inference(program, free_batch_norms=batch_norm == "invariant")
    solution = inference.equations.solve()
    # Name variables by the distinct rows of the solution, 0 for those that are always zero.
    variable, basis = distinct_rows(solution)
    specs: dict[str, ParameterScales] = {}
    table = torch.from_numpy(variable)
    for name, leaf in inference.leaves.items():
        terms = []
        if leaf.form is not None:
            for coefficient, ids in leaf.form.terms:
                small = table[collapse(ids)]
                if not small.numel():
                    continue
                if bool((small == small.flatten()[:1]).all()):
                    small = small.flatten()[:1].reshape((1,) * small.dim())
                if bool(small.any()):
                    terms.append((coefficient, small))
        specs[name] = ParameterScales(
            name,
            leaf.shape,
            _cancel(terms),
            leaf.why_pinned,
            leaf.why_input,
            tuple(leaf.uses),
            tuple(ids for _, ids in leaf.form.terms) if leaf.form is not None else (),
        )
    basis = restrict_to_effect(basis, specs)
    pinned_by = dict(inference.pinned_by.most_common())
    return RescalingGroup(basis.shape[1], basis, specs, pinned_by, inference.equations)


def _cancel(terms: list[tuple[int, Tensor]]) -> tuple[tuple[int, Tensor], ...]:
    """Merge terms that have become equal (a weight from a channel group to itself)."""
    merged: list[tuple[int, Tensor]] = []
    for coefficient, ids in terms:
        for k, (c, other) in enumerate(merged):
            if other.shape == ids.shape and torch.equal(other, ids):
                merged[k] = (c + coefficient, other)
                break
        else:
            merged.append((coefficient, ids))
    return tuple((c, ids) for c, ids in merged if c)


def _dims(axes: tuple[int, ...]) -> str:
    return "dim " + " and ".join(map(str, axes)) if axes else "all entries"


def _weighted(table: Tensor, coefficient: int, ids: Tensor) -> Tensor:
    found = table.take(ids)
    return found if coefficient == 1 else coefficient * found
