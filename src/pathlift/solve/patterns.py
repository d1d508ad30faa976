"""Where the model's covariance has entries: found once per problem, filled for every weights.

``E^T diag(w) E`` and the matrices' sums have the same entries whatever the weights ``w`` of the
forms are, and each entry is a linear function of ``w``. So a preconditioner costs a few products
of a sparse matrix with ``w``; products of two sparse matrices, and orders of elimination, are for
here.
"""

from __future__ import annotations

from functools import cached_property

from pathlift.solve.inner import Inner, inner_of
from pathlift.solve.low import Low
from pathlift.solve.meetings import Meetings
from pathlift.solve.operator import Operator


def patterns(operator: Operator) -> Patterns:
    """The patterns of an operator, made at the first call."""
    if operator.patterns is None:
        operator.patterns = Patterns(operator)
    found: Patterns = operator.patterns
    return found


class Patterns:
    """The patterns of one operator.

    Attributes:
        squares: ``(H, forms)``; times weights, the diagonal of ``E^T diag(w) E``.
    """

    def __init__(self, operator: Operator) -> None:
        self._operator = operator
        self.squares = operator.forms_t.copy()
        self.squares.data = self.squares.data**2

    @cached_property
    def inner(self) -> Inner | None:
        """The local part of scales that meet others; None where there are none, or too many."""
        return inner_of(self._operator)

    @cached_property
    def low(self) -> Low:
        """The sums of every matrix's rows and columns, and one full row below them."""
        return Low(self._operator)

    @cached_property
    def meetings(self) -> Meetings | None:
        """What of those sums meets through the inner local part, where there is one."""
        return None if self.inner is None else Meetings(self.inner, self.low)
