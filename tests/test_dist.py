"""The built wheel, alone: names, versions and the command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pathlift

ROOT = Path(__file__).parents[1]
NETWORK = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 2))
"""


def test_one_version() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f'\nversion = "{pathlift.__version__}"\n' in project
    assert f"\nversion: {pathlift.__version__}\n" in cited


def test_errors_name_extras_that_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = project[project.index("[project.optional-dependencies]") :].split("\n[", 1)[0]
    texts = [p.read_text(encoding="utf-8") for p in (ROOT / "src").rglob("*.py")]
    texts += [p.read_text(encoding="utf-8") for p in [ROOT / "README.md", *ROOT.glob("docs/*.md")]]
    named = {
        e
        for t in texts
        for found in re.findall(r"pathlift\[([a-z,]+)\]", t)
        for e in found.split(",")
    }
    assert named and all(re.search(rf"^{name} = ", extras, re.MULTILINE) for name in named), named


@pytest.mark.zoo
def test_the_wheel_alone(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("pathlift-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "pathlift/py.typed" in names and not [n for n in names if n.startswith("tests")]
    target = tmp_path / "site"
    subprocess.run([*pip, "install", "-q", "--no-deps", "-t", target, wheel], check=True)
    (tmp_path / "network.py").write_text(NETWORK)

    def run(*words: str) -> str:
        command = [sys.executable, "-P", "-m", "pathlift", *words]
        environment = {**os.environ, "PYTHONPATH": str(target)}
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version") == f"pathlift {pathlift.__version__}\n"
    assert run("inspect", "network.py:build", "--input", "1,4").startswith("30 free scales")
    model = ("network.py:build", "--input", "1,4")
    said = run("condition", *model, "--exact", "-o", "out.safetensors")
    assert "identical, bit for bit" in said
    assert (tmp_path / "out.safetensors").stat().st_size > 0
    assert "imbalance" in run("norms", *model, "--weights", "out.safetensors")
