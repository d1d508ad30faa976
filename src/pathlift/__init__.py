"""Rescale a network without changing it, so that it trains from a better-conditioned point."""

from pathlift.condition import condition_
from pathlift.errors import (
    ArgumentError,
    CaptureError,
    MissingDependencyError,
    PathliftError,
    RangeError,
    UnsupportedOperationError,
    VerificationError,
)
from pathlift.lifting.metrics import imbalance, path_kernel_diagonal, path_norm
from pathlift.report import ConditioningReport
from pathlift.symmetry.group import RescalingGroup, rescaling_group

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CaptureError",
    "ConditioningReport",
    "MissingDependencyError",
    "PathliftError",
    "RangeError",
    "RescalingGroup",
    "UnsupportedOperationError",
    "VerificationError",
    "condition_",
    "imbalance",
    "path_kernel_diagonal",
    "path_norm",
    "rescaling_group",
]
