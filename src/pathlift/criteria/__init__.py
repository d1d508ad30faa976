"""Criteria: each turns a program into non-negative coefficients per parameter entry."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pathlift.criteria.fisher import fisher, squared_gradients
from pathlift.criteria.path_kernel import path_kernel
from pathlift.criteria.protocol import Coefficients, Criterion, Sink, given, relative
from pathlift.criteria.weight_norm import weight_norm
from pathlift.criteria.weight_range import weight_range
from pathlift.errors import ArgumentError, unknown

CRITERIA: dict[str, Criterion] = {
    "path-kernel": path_kernel,
    "weight-norm": weight_norm(),
    "range": weight_range,
}


def as_criterion(
    criterion: str | Criterion | Mapping[str, Tensor], reference: Mapping[str, Tensor] | None = None
) -> Criterion:
    """The criterion of a name, of a mapping of coefficients, or itself.

    Raises:
        ArgumentError: an unknown name; the message lists the known ones.
    """
    if isinstance(criterion, Mapping):
        found = given(criterion)
    elif isinstance(criterion, Criterion):
        found = criterion
    elif criterion == "fisher":
        raise ArgumentError(
            "criterion 'fisher' needs data. Pass criterion=pathlift.criteria.fisher(model, "
            "batches, loss), with batches of (inputs, targets)."
        )
    elif criterion in CRITERIA:
        found = CRITERIA[criterion]
    else:
        more = ", pathlift.criteria.fisher(...), or a mapping of parameter name to coefficients"
        raise unknown("criterion", criterion, CRITERIA, more)
    return found if reference is None else relative(found, reference)


__all__ = [
    "CRITERIA",
    "Coefficients",
    "Criterion",
    "Sink",
    "as_criterion",
    "fisher",
    "path_kernel",
    "squared_gradients",
    "weight_norm",
    "weight_range",
]
