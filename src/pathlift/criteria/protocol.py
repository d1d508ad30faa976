"""What every criterion is: non-negative coefficients per parameter entry, and their objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pathlift.capture import Program
from pathlift.errors import ArgumentError


@dataclass(frozen=True)
class Coefficients:
    """What a criterion hands to the solver.

    Attributes:
        values: parameter name -> non-negative tensor ``c`` of its shape, up to one common factor
            (parameters left out are rescaled, not counted).
        approximated: operations a stand-in was used for, with counts.
        rate: under rescaling ``c'_i = c_i * 2 ** (rate * (E s)_i)``: -2 for squared gradients and
            diagonals of kernels, q for ``|theta|^q``.
        balanced: the objective is ``p log sum c' - sum log c'`` (else the sum of ``c'`` alone).
        reduction: ``"sum"``, or ``"max"`` where a channel counts by its largest entry.
    """

    values: dict[str, Tensor]
    approximated: dict[str, int] = field(default_factory=dict)
    rate: float = -2.0
    balanced: bool = True
    reduction: str = "sum"


Criterion = Callable[[Program], Coefficients]
# Takes one parameter's coefficients. A later call for the same name replaces the earlier.
Sink = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Stream:
    """A criterion that hands its coefficients on one parameter at a time, in any order.

    What is handed on need not be kept, so that the model may be larger than memory.

    Attributes:
        hand_on: calls the sink for every parameter; returns the operations a stand-in was used
            for, with counts.
        rate, balanced, reduction: see :class:`Coefficients`.
    """

    hand_on: Callable[[Program, Sink], dict[str, int]]
    rate: float = -2.0
    balanced: bool = True
    reduction: str = "sum"

    def coefficients(self, values: dict[str, Tensor], approximated: dict[str, int]) -> Coefficients:
        """What a criterion returns that found these values."""
        return Coefficients(values, approximated, self.rate, self.balanced, self.reduction)

    def collected(self) -> Criterion:
        """The criterion that keeps everything, in the order of the model's parameters."""

        def criterion(program: Program) -> Coefficients:
            values: dict[str, Tensor] = {}
            approximated = self.hand_on(program, values.__setitem__)
            ordered = {n: values[n] for n in program.parameters if n in values}
            return self.coefficients(ordered, approximated)

        return criterion


def given(values: Mapping[str, Tensor]) -> Criterion:
    """A user's own coefficients, as a criterion of the path kernel's form (rate -2, balanced)."""

    def criterion(program: Program) -> Coefficients:
        return Coefficients(_checked(program, values, "criterion", positive=False))

    return criterion


def relative(criterion: Criterion, reference: Mapping[str, Tensor]) -> Criterion:
    """The criterion against a reference kernel ``diag(r)``: coefficients ``c_i / r_i``."""

    def divided(program: Program) -> Coefficients:
        found = criterion(program)
        weights = _checked(program, reference, "reference", positive=True)
        missing = [n for n in found.values if n not in weights]
        if missing:
            raise ArgumentError(
                f"reference has no entry for parameter '{missing[0]}' ({len(missing)} missing). "
                f"Give one positive tensor per parameter, of its shape."
            )
        return replace(found, values={n: c / weights[n] for n, c in found.values.items()})

    return divided


def _checked(
    program: Program, values: Mapping[str, Tensor], argument: str, positive: bool
) -> dict[str, Tensor]:
    checked = {}
    for name, value in values.items():
        name = program.aliases.get(name, name)
        if name not in program.parameters:
            raise ArgumentError(
                f"{argument} has an entry '{name}', which is no parameter of the model. Use the "
                f"names of model.named_parameters()."
            )
        tensor = torch.as_tensor(value).detach().to("cpu", torch.float64)
        shape = program.parameters[name].shape
        if tensor.shape != shape:
            raise ArgumentError(
                f"{argument}['{name}'] has shape {tuple(tensor.shape)}; the parameter has "
                f"{tuple(shape)}. Give one number per parameter entry."
            )
        wrong = tensor <= 0 if positive else tensor < 0
        if not bool(torch.isfinite(tensor).all()) or bool(wrong.any()):
            raise ArgumentError(
                f"{argument}['{name}'] has entries that are not finite or "
                f"{'not positive' if positive else 'negative'}. Coefficients weigh squares."
            )
        checked[name] = tensor
    return checked
