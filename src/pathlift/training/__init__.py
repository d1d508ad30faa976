"""Conditioning while training: optimiser state, weight averages, schedules, callbacks.

The callbacks need their framework and live in modules of their own:
``pathlift.training.lightning`` and ``pathlift.training.huggingface``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pathlift.training.optimizers import declare_state, rescale_average_, state_changes

if TYPE_CHECKING:
    from pathlift.training.path_sgd import PathSGD
    from pathlift.training.schedule import Schedule

__all__ = ["PathSGD", "Schedule", "declare_state", "rescale_average_", "state_changes"]


def __getattr__(name: str) -> Any:
    # Late, because apply imports the optimisers' rules and the schedule imports condition_.
    if name == "Schedule":
        from pathlift.training.schedule import Schedule

        return Schedule
    if name == "PathSGD":
        from pathlift.training.path_sgd import PathSGD

        return PathSGD
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
