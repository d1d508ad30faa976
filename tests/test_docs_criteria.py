"""The examples of docs/criteria.md run, in its order."""

from __future__ import annotations

import re
from pathlib import Path

import pathlift
from pathlift.criteria import CRITERIA

TEXT = (Path(__file__).parents[1] / "docs" / "criteria.md").read_text(encoding="utf-8")


def test_examples(capsys) -> None:
    names: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "docs/criteria.md", "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert isinstance(names["report"], pathlift.ConditioningReport)
    assert len(names["statistics"]) == 2


def test_every_named_criterion_is_in_the_table() -> None:
    assert all(f'"{name}"' in TEXT for name in CRITERIA)
