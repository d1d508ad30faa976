"""Every example runs and prints what its page promises."""

from __future__ import annotations

import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from training.frameworks import importorskip

FOLDER = Path(__file__).parents[2] / "examples"
FRAMEWORKS = {
    "lightning_callback": "lightning",
    "huggingface_trainer": "transformers",
    "timm_model": "timm",
    "accelerate_loop": "accelerate",
}


def test_every_file_is_in_the_table() -> None:
    listed = set(re.findall(r"\]\(([\w.]+)\)", (FOLDER / "README.md").read_text(encoding="utf-8")))
    files = {p.name for p in FOLDER.iterdir() if p.suffix in (".py", ".ipynb")}
    assert listed == files


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    ["plain_loop", "lightning_callback", "huggingface_trainer", "timm_model", "accelerate_loop"],
)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name in FRAMEWORKS:
        importorskip(FRAMEWORKS[name])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    found = re.findall(r"imbalance\s+([0-9.]+) -> ([0-9.]+)", out)
    assert found and all(float(after) <= float(before) for before, after in found), out
    assert float(found[0][1]) < float(found[0][0])


@pytest.mark.filterwarnings("ignore")
def test_quantize(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(FOLDER / "quantize.py"), run_name="__main__")
    out = capsys.readouterr().out
    before, after = (
        float(re.findall(rf"{k} +([0-9.]+) dB", out)[0]) for k in ("only", "equalised")
    )
    assert after > before + 3
    done = re.findall(r"^(aimet|torch_ao|torchao|brevitas|onnx) +(?:skipped|[0-9.]+ dB)", out, re.M)
    assert len(done) == 5


@pytest.mark.zoo  # two processes; tests/training/test_sharded.py has the page's like it
def test_fsdp2(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port), str(FOLDER / "fsdp2.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("continuous scales") == 1  # the first process prints


def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    import nbformat

    notebook = nbformat.read(FOLDER / "look_at_a_report.ipynb", as_version=4)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": tmp_path}}
    ).execute()
    kinds = [set(o["data"]) for c in notebook.cells for o in c.get("outputs", []) if "data" in o]
    assert sum("image/png" in kind for kind in kinds) == 2
    assert sum("text/html" in kind for kind in kinds) == 2
