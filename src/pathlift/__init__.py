"""Rescale a network without changing it, so that it trains from a better-conditioned point."""

from pathlift.condition import Conditioner, condition_
from pathlift.errors import (
    ArgumentError,
    CaptureError,
    MissingDependencyError,
    PathliftError,
    RangeError,
    UnsupportedOperationError,
    VerificationError,
)
from pathlift.lifting.metrics import (
    PathNorm,
    imbalance,
    path_kernel_diagonal,
    path_magnitude,
    path_norm,
)
from pathlift.lifting.pruning import path_magnitude_masks, prune_by_path_magnitude_
from pathlift.report import ConditioningReport
from pathlift.symmetry.group import RescalingGroup, rescaling_group

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CaptureError",
    "Conditioner",
    "ConditioningReport",
    "MissingDependencyError",
    "PathNorm",
    "PathliftError",
    "RangeError",
    "RescalingGroup",
    "UnsupportedOperationError",
    "VerificationError",
    "condition_",
    "imbalance",
    "path_kernel_diagonal",
    "path_magnitude",
    "path_magnitude_masks",
    "path_norm",
    "prune_by_path_magnitude_",
    "rescaling_group",
]
