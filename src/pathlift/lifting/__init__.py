"""Path norms and kernels: in one pass, listed densely for small networks, or by the NTK."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlift.lifting import metrics, ntk, pruning  # noqa: F401
    from pathlift.lifting import paths as dense  # noqa: F401

# By the name that users know -> the module.
_SUBMODULES = {"dense": "paths", **{n: n for n in ("metrics", "ntk", "paths", "pruning")}}


def __getattr__(name: str) -> Any:
    # Imported when first used, as everything in pathlift.
    if name in _SUBMODULES:
        return import_module(f"pathlift.lifting.{_SUBMODULES[name]}")
    raise AttributeError(f"module 'pathlift.lifting' has no attribute {name!r}")
