"""The table of docs/criteria.md (its examples run in tests/docs)."""

from __future__ import annotations

from pathlib import Path

from pathlift.criteria import CRITERIA

TEXT = (Path(__file__).parents[2] / "docs" / "criteria.md").read_text(encoding="utf-8")


def test_every_named_criterion_is_in_the_table() -> None:
    assert all(f'"{name}"' in TEXT for name in CRITERIA)
