"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from pathlift.errors import MissingDependencyError


def need(module: str, purpose: str, package: str | None = None) -> Any:
    """Import ``module`` or say what to install.

    Args:
        module: dotted name, such as ``"pyarrow.parquet"``.
        purpose: what needs it, the subject of the error's sentence.
        package: name on the package index where it differs from the module's first part.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.split(".")[0]
        raise MissingDependencyError(
            f"{purpose} needs {package}. Run: pip install '{package}'."
        ) from error
