"""What every criterion is: non-negative coefficients per parameter entry, and their objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pathlift.capture.program import Program
from pathlift.errors import ArgumentError
from pathlift.solve.objective import TOTAL
from pathlift.solve.operator import Objective
from pathlift.tensors.product import Product, dense


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
        objective: what is asked of the scales: its value, its solver, its rounding.
    """

    values: dict[str, Tensor]
    approximated: dict[str, int] = field(default_factory=dict)
    rate: float = -2.0
    balanced: bool = True
    objective: Objective = TOTAL


# Takes one parameter's coefficients. A later call for the same name replaces the earlier.
Sink = Callable[[str, Tensor | Product], None]


@dataclass(frozen=True)
class Criterion:
    """Coefficients of every parameter, handed on one parameter at a time, in any order.

    What is handed on need not be kept, so that memory holds the sums that the solver needs and a
    few tensors, whatever the size of the model. Calling a criterion keeps everything.

    Attributes:
        hand_on: calls the sink for every parameter; returns the operations a stand-in was used
            for, with counts.
        rate, balanced, objective: see :class:`Coefficients`.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> x = torch.zeros(2, 4)
    >>> def sizes(program, sink):
    ...     for name, parameter in program.parameters.items():
    ...         sink(name, parameter.detach().double() ** 4)
    ...     return {}  # no stand-in was used
    >>> fourth = pathlift.criteria.Criterion(sizes, rate=4.0, balanced=False)
    >>> pathlift.condition_(model, x, criterion=fourth).num_scales
    32
    """

    hand_on: Callable[[Program, Sink], dict[str, int]]
    rate: float = -2.0
    balanced: bool = True
    objective: Objective = TOTAL

    def coefficients(self, values: dict[str, Tensor], approximated: dict[str, int]) -> Coefficients:
        """What is known of the objective, with these values."""
        return Coefficients(values, approximated, self.rate, self.balanced, self.objective)

    def __call__(self, program: Program) -> Coefficients:
        """All coefficients at once, in the order of the model's parameters."""
        values: dict[str, Tensor] = {}
        approximated = self.hand_on(program, lambda n, g: values.update({n: dense(g)}))
        ordered = {n: values[n] for n in program.parameters if n in values}
        return self.coefficients(ordered, approximated)


def given(values: Mapping[str, Tensor]) -> Criterion:
    """A user's own coefficients, as a criterion of the path kernel's form (rate -2, balanced)."""

    def hand_on(program: Program, sink: Sink) -> dict[str, int]:
        for name, value in _checked(program, values, "criterion", positive=False).items():
            sink(name, value)
        return {}

    return Criterion(hand_on)


def relative(criterion: Criterion, reference: Mapping[str, Tensor]) -> Criterion:
    """The criterion against a reference kernel ``diag(r)``: coefficients ``c_i / r_i``."""

    def hand_on(program: Program, sink: Sink) -> dict[str, int]:
        weights = _checked(program, reference, "reference", positive=True)
        missing: set[str] = set()

        def divided(name: str, c: Tensor | Product) -> None:
            if name in weights:
                sink(name, dense(c) / weights[name].to(c.device))
            else:
                missing.add(name)

        approximated = criterion.hand_on(program, divided)
        if missing:
            first = next(n for n in program.parameters if n in missing)
            raise ArgumentError(
                f"reference has no entry for parameter '{first}' ({len(missing)} missing). "
                f"Give one positive tensor per parameter, of its shape."
            )
        return approximated

    return replace(criterion, hand_on=hand_on)


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
