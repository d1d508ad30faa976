"""Conditioning while training: optimiser state, weight averages, schedules, callbacks.

The callbacks need their framework and live in modules of their own:
``pathlift.training.lightning`` and ``pathlift.training.huggingface``.
"""

from __future__ import annotations

from pathlift.tensors.state import declare_state, state_changes
from pathlift.training.averages import rescale_average_
from pathlift.training.path_sgd import PathSGD
from pathlift.training.schedule import Schedule

__all__ = ["PathSGD", "Schedule", "declare_state", "rescale_average_", "state_changes"]
