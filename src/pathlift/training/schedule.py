"""When to condition again during training, and what came of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pathlift.condition import condition_
from pathlift.conditioner import Conditioner
from pathlift.criteria import as_criterion
from pathlift.errors import ArgumentError
from pathlift.report import ConditioningReport
from pathlift.settings import Settings
from pathlift.tensors.state import Optimizers

_UNITS = ("epoch", "step")
# Keywords of condition_ that a schedule passes on; the optimiser comes with every call.
_KEYWORDS = tuple(
    name
    for name, parameter in inspect.signature(condition_).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "optimizer"
)


class Schedule:
    """Conditions a model at the first call of :meth:`step` and every ``every`` calls after it.

    Call :meth:`step` where no gradient is pending: at the start of an epoch, or between
    ``optimizer.step()`` and the next ``backward()``::

        schedule = Schedule(every=5, until=20)
        for epoch in range(90):
            schedule.step(model, example_inputs, optimizer)
            train_one_epoch(...)

    Args:
        every: condition at calls 0, every, 2 every, ...; None: at the first call only.
        until: number of the first call at which nothing is done any more; None: no end.
        unit: what a call stands for, ``"epoch"`` or ``"step"``; a name in the history.
        condition_kwargs: passed on to :func:`pathlift.condition_`. Unless ``exact`` is given,
            calls after the first round to powers of two: training has begun.

    Attributes:
        calls: how often :meth:`step` was called, conditioning or not.
        history: one dict per conditioning: ``unit``, ``step`` (number of the call, from 0),
            ``imbalance_before``, ``imbalance_after`` (natural logarithm, per parameter) and
            ``moved`` (scales that changed).

    Raises:
        ArgumentError: an argument has the wrong type or value.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> x = torch.zeros(2, 4)
    >>> from pathlift.training import Schedule
    >>> schedule = Schedule(every=2)
    >>> [schedule.step(model, x, None) is not None for _ in range(4)]
    [True, False, True, False]
    """

    def __init__(
        self,
        every: int | None = 1,
        until: int | None = None,
        unit: str = "epoch",
        **condition_kwargs: Any,
    ) -> None:
        _check_count("every", every, 1)
        _check_count("until", until, 0)
        if unit not in _UNITS:
            raise ArgumentError(f"unit must be 'epoch' or 'step'; found {unit!r}.")
        unknown = sorted(set(condition_kwargs) - set(_KEYWORDS))
        if unknown:
            raise ArgumentError(
                f"{unknown[0]!r} is not an argument of condition_ that a schedule can pass on; "
                f"those are {', '.join(_KEYWORDS)}."
            )
        self.every = every
        self.until = until
        self.unit = unit
        self.condition_kwargs = condition_kwargs
        self.calls = 0
        self.history: list[dict[str, Any]] = []
        self._conditioner: Conditioner | None = None
        self._captured: tuple[int, list[bool]] | None = None

    @property
    def due(self) -> bool:
        """Whether the next call of :meth:`step` conditions."""
        if self.until is not None and self.calls >= self.until:
            return False
        return self.calls == 0 or (self.every is not None and self.calls % self.every == 0)

    def step(
        self,
        model: nn.Module,
        example_inputs: object,
        optimizer: Optimizers,
    ) -> ConditioningReport | None:
        """Condition ``model`` in place if it is due, carrying the optimiser's state along.

        Args:
            model: as for :func:`pathlift.condition_`.
            example_inputs: the same; only shapes matter.
            optimizer: holds state that must follow the parameters; None if no step was taken.

        Returns:
            The report, or None when nothing was due.

        Raises:
            PathliftError: see :func:`pathlift.condition_`; the model is unchanged and the call
                does not count.
        """
        report = None
        if self.due:
            report = self._condition(model, example_inputs, optimizer)
            self.history.append(
                {
                    "unit": self.unit,
                    "step": self.calls,
                    "imbalance_before": report.imbalance_before,
                    "imbalance_after": report.imbalance_after,
                    "moved": int(torch.count_nonzero(report.log2_scales)),
                }
            )
        self.calls += 1
        return report

    def _condition(
        self, model: nn.Module, example_inputs: object, optimizer: Optimizers
    ) -> ConditioningReport:
        """Capture at the first due call (and for another model), then only solve and apply."""
        keywords: dict[str, Any] = {"optimizer": optimizer, **self.condition_kwargs}
        criterion = as_criterion(
            keywords.pop("criterion", "path-kernel"), keywords.pop("reference", None)
        )
        batch_norm = keywords.pop("batch_norm", "pinned")
        mode = [m.training for m in model.modules()]
        known = self._conditioner is not None and self._captured == (id(model), mode)
        if not known:
            self._conditioner = Conditioner(model, example_inputs, batch_norm=batch_norm)
            self._captured = (id(model), mode)
        assert self._conditioner is not None
        return self._conditioner.conditioned(Settings(criterion, **keywords, midway=self.calls > 0))

    def reach(self, call: int) -> bool:
        """Skip forward to call number ``call``, for loops that know where they are.

        Returns:
            Whether that call is still to come; False if it was made, before a restart say.
        """
        if call < self.calls:
            return False
        self.calls = call
        return True

    def state_dict(self) -> dict[str, Any]:
        """Calls and history as plain numbers and strings; the settings are the constructor's."""
        return {"calls": self.calls, "history": [dict(entry) for entry in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the schedule that gave ``state`` stopped.

        Raises:
            ArgumentError: ``state`` is not what :meth:`state_dict` returns.
        """
        calls = state.get("calls") if isinstance(state, Mapping) else None
        history = state.get("history") if isinstance(state, Mapping) else None
        if isinstance(calls, bool) or not isinstance(calls, int) or not isinstance(history, list):
            raise ArgumentError(
                f"state must be what Schedule.state_dict() returns, a dict with 'calls' and "
                f"'history'; found {state!r}."
            )
        self.calls = calls
        self.history = [dict(entry) for entry in history]

    def __repr__(self) -> str:
        return (
            f"Schedule(every={self.every}, until={self.until}, unit={self.unit!r}, "
            f"calls={self.calls})"
        )


def _check_count(name: str, value: object, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name} must be an integer >= {least} or None; found {value!r}.")
