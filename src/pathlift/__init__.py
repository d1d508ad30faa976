"""Rescale a network without changing it, so that it trains from a better-conditioned point."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlift import (  # noqa: F401
        absorption,
        checkpoint,
        criteria,
        errors,
        experiments,
        lifting,
        plots,
        quantization,
        solve,
        streaming,
        symmetry,
        theory,
        training,
    )
    from pathlift.advice import Advice, advise
    from pathlift.condition import condition_
    from pathlift.conditioner import Conditioner
    from pathlift.errors import (
        ArgumentError,
        CaptureError,
        CheckpointError,
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
    from pathlift.orbits import OrbitDistance, canonical_, orbit_distance
    from pathlift.report import ConditioningReport
    from pathlift.symmetry.group import RescalingGroup, rescaling_group

__version__ = "0.1.0"

__all__ = [
    "Advice",
    "ArgumentError",
    "CaptureError",
    "CheckpointError",
    "Conditioner",
    "ConditioningReport",
    "MissingDependencyError",
    "OrbitDistance",
    "PathNorm",
    "PathliftError",
    "RangeError",
    "RescalingGroup",
    "UnsupportedOperationError",
    "VerificationError",
    "advise",
    "canonical_",
    "condition_",
    "imbalance",
    "orbit_distance",
    "path_kernel_diagonal",
    "path_magnitude",
    "path_magnitude_masks",
    "path_norm",
    "prune_by_path_magnitude_",
    "rescaling_group",
]

# Where the public names live. They are imported when first used, so that `import pathlift` (and the
# command line's start) costs next to nothing beyond torch.
_HOMES = {
    # Not in a module "advise", which would take the function's place when imported.
    "advice": ("Advice", "advise"),
    "condition": ("condition_",),
    "conditioner": ("Conditioner",),
    "errors": tuple(name for name in __all__ if name.endswith("Error")),
    "lifting.metrics": (
        "PathNorm",
        "imbalance",
        "path_kernel_diagonal",
        "path_magnitude",
        "path_norm",
    ),
    "lifting.pruning": ("path_magnitude_masks", "prune_by_path_magnitude_"),
    "orbits": ("OrbitDistance", "canonical_", "orbit_distance"),
    "report": ("ConditioningReport",),
    "symmetry.group": ("RescalingGroup", "rescaling_group"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_SUBMODULES = (
    *("absorption", "checkpoint", "criteria", "errors", "experiments", "lifting"),
    *("plots", "quantization", "solve", "streaming", "symmetry", "theory", "training"),
)


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"pathlift.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pathlift' has no attribute {name!r}")
    found = getattr(import_module(f"pathlift.{_HOME_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
