"""Criteria: each turns a program into non-negative coefficients per parameter entry."""

from collections.abc import Callable

from pathlift.capture import Program
from pathlift.criteria.path_kernel import Coefficients, path_kernel
from pathlift.errors import ArgumentError

CRITERIA: dict[str, Callable[[Program], Coefficients]] = {"path-kernel": path_kernel}


def criterion_named(name: str) -> Callable[[Program], Coefficients]:
    """The criterion of this name; :class:`ArgumentError` lists the known ones."""
    if name not in CRITERIA:
        known = ", ".join(map(repr, CRITERIA))
        raise ArgumentError(f"criterion {name!r} is unknown. Supported: {known}.")
    return CRITERIA[name]


__all__ = ["CRITERIA", "Coefficients", "criterion_named", "path_kernel"]
