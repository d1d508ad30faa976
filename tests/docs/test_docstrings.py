"""Examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib

import pytest

# Modules whose public names have examples.
MODULES = ("pathlift.report", "pathlift.advice")


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed
