"""What holds for every test."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are one line each, however wide the terminal is that the tests are started from."""
    if "COLUMNS" in os.environ:
        monkeypatch.delenv("COLUMNS")
