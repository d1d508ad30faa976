"""Names as the documentation writes them, after ``import pathlift`` alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import pathlift
from pathlift import errors


def fresh(code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_modules_are_there_after_import() -> None:
    names = ["lifting.dense", "lifting.ntk", "lifting.metrics", "streaming", "errors", "plots"]
    names += ["absorption", "criteria", "theory", "training", "solve", "checkpoint"]
    fresh("import pathlift\n" + "\n".join(f"pathlift.{name}" for name in names))


def test_import_is_lazy() -> None:
    fresh(
        "import sys, pathlift; assert 'torch' not in sys.modules and len([m for m in sys.modules "
        "if m.startswith('pathlift')]) == 1"
    )


def test_every_error_is_at_the_top() -> None:
    found = {n for n, e in vars(errors).items() if isinstance(e, type) and "Error" in n}
    assert found <= set(pathlift.__all__) and set(pathlift.__all__) <= set(dir(pathlift))
    assert all(getattr(pathlift, n) is getattr(errors, n) for n in found)


def test_unknown_names() -> None:
    for module in (pathlift, pathlift.lifting):
        with pytest.raises(AttributeError, match=f"'{module.__name__}' has no attribute 'nothing'"):
            module.nothing  # noqa: B018
