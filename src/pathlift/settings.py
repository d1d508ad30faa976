"""What conditioning is asked for, checked."""

from __future__ import annotations

from dataclasses import dataclass

from pathlift.criteria import Criterion
from pathlift.errors import ArgumentError
from pathlift.tensors.state import Optimizers, optimizers_of


@dataclass(frozen=True)
class Settings:
    """What :func:`pathlift.condition_` is asked for, checked.

    ``midway``: training is known to have begun. ``canonical``: what is wanted is one point per
    orbit, so frozen parameters count and dead scales take a place of their own.

    Raises:
        ArgumentError: a wrong type or value.
    """

    criterion: Criterion
    exact: bool | None = None
    solver: str = "newton"
    tol: float | None = None
    optimizer: Optimizers = None
    verify: bool = True
    on_nothing: str = "warn"
    midway: bool = False
    canonical: bool = False

    def __post_init__(self) -> None:
        flags: dict[str, object] = {"verify": self.verify}
        if self.exact is not None:
            flags["exact"] = self.exact
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise ArgumentError(f"{name} must be True or False; found {flag!r}.")
        if self.on_nothing not in ("warn", "error", "ignore"):
            raise ArgumentError(
                f"on_nothing must be 'warn', 'error' or 'ignore'; found {self.on_nothing!r}."
            )
        tol: object = 0.5 if self.tol is None else self.tol
        if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0 < tol < 1:
            raise ArgumentError(f"tol must be a number between 0 and 1; found {tol!r}.")
        optimizers_of(self.optimizer)
