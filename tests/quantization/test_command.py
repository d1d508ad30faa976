"""``pathlift equalize``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pathlift
from pathlift.cli import main
from pathlift.quantization import equalize_

FACTORY = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 3), nn.ReLU6(), nn.Linear(3, 2))
    model[0].weight.data *= torch.randn(30, 1).exp()
    return model

def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 3))
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    path = tmp_path / "nets.py"
    path.write_text(FACTORY)
    return f"{path}:build"


def build(name: str = "build") -> nn.Module:
    space: dict = {}
    exec(FACTORY, space)
    return space[name]().eval()


def test_written_weights_are_those_of_the_call(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, examples = tmp_path / "out.safetensors", tmp_path / "examples.safetensors"
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    save_file({"x": x}, examples)
    words = ["equalize", spec, "--input", "1,4", "-o", str(out), "--examples", str(examples)]
    assert main([*words, "--format", "int4", "--relu6", "per-channel", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["format"] == "int4" and data["folded"] == 1 and data["relu6_replaced"] == 1
    model = build()
    report = equalize_(model, x, format="int4", relu6="per-channel")
    written = load_file(out)
    assert written.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(written[name], tensor), name
    assert data["sqnr_after"] == report.sqnr_after
    assert main(words[:-2]) == 0
    text = capsys.readouterr().out
    assert "predicted at the output" in text and "standard normal inputs" in text


def test_streamed_equals_in_memory(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    model, spec = build("plain"), spec.replace("build", "plain")
    save_file(model.state_dict(), weights)
    words = ["equalize", spec, "--input", "2,4", "-o", str(out), "--weights", str(weights)]
    assert main([*words, "--stream"]) == 0
    assert "nothing was folded" in capsys.readouterr().out
    pathlift.condition_(model, torch.zeros(2, 4), criterion="range")
    written = load_file(out)
    assert all(torch.equal(written[n], t) for n, t in model.state_dict().items())
    assert not torch.equal(written["0.weight"], build("plain").state_dict()["0.weight"])
    assert main([*words, "--stream", "--relu6", "relu"]) == 2
    assert "--relu6 needs the model in memory" in capsys.readouterr().err


def test_examples_must_fit(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = tmp_path / "examples.safetensors"
    save_file({"x": torch.zeros(6, 5)}, examples)
    words = ["equalize", spec, "--input", "1,4", "-o", str(tmp_path / "out.safetensors")]
    assert main([*words, "--examples", str(examples)]) == 2
    assert "one tensor per input" in " ".join(capsys.readouterr().err.split())
