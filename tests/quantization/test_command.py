"""``pathlift equalize``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pathlift
from pathlift.absorption import fold_batch_norms_
from pathlift.cli import main
from pathlift.quantization import equalize_, equalize_checkpoint

FACTORY = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 3), nn.ReLU6(), nn.Linear(3, 2))
    model[0].weight.data *= torch.randn(30, 1).exp()
    return model

def streams():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 30, bias=False), nn.BatchNorm1d(30), nn.ReLU(),
        nn.Linear(30, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 12),
        nn.ReLU(), nn.Linear(12, 3))
    for k, n in ((1, 30), (4, 20)):
        with torch.no_grad():
            drawn = torch.randn(3, n)
            if not model[k].weight.is_meta:
                model[k].weight.copy_(drawn[0].exp())
            model[k].running_var.copy_(drawn[1].exp())
            model[k].running_mean.copy_(drawn[2])
    return model
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


@pytest.mark.parametrize("fold", [True, False])
def test_streamed_equals_in_memory(
    fold: bool, spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    model, spec = build("streams"), spec.replace("build", "streams")
    save_file(model.state_dict(), weights)
    words = ["equalize", spec, "--input", "2,4", "-o", str(out), "--weights", str(weights)]
    assert main([*words, "--stream", *([] if fold else ["--no-fold"])]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "ranges were equalised and not the error" in text
    assert f"folded {2 if fold else 0} batch norms" in text
    x = torch.randn(6, 4)
    exact = model(x)
    if fold:
        fold_batch_norms_(model, x)
    pathlift.condition_(model, x, criterion="range", exact=False)
    written = load_file(out)
    assert written.keys() == model.state_dict().keys()
    assert all(torch.equal(written[n], t) for n, t in model.state_dict().items())
    assert not torch.equal(written["6.weight"], build("streams").state_dict()["6.weight"])
    torch.testing.assert_close(model(x), exact)
    assert main([*words, "--stream", "--relu6", "relu"]) == 2
    assert "--relu6 needs the model in memory" in capsys.readouterr().err


def test_large_weights_are_folded_piece_by_piece(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a checkpoint in two files, in bfloat16."""
    monkeypatch.setattr("pathlift.homes.checkpoint.PIECE", 64)
    source, out = tmp_path / "in", tmp_path / "out"
    model = build("streams").bfloat16()
    state = model.state_dict()
    names = list(state)
    source.mkdir()
    where = {}
    for k, part in enumerate((names[:4], names[4:])):
        save_file({n: state[n] for n in part}, source / f"{k}.safetensors")
        where |= dict.fromkeys(part, f"{k}.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    x = torch.zeros(2, 4, dtype=torch.bfloat16)
    report = equalize_checkpoint(lambda: build("streams").bfloat16(), x, source, out)
    assert report.folded == report.to_dict()["folded"] == 2
    fold_batch_norms_(model, x)
    pathlift.condition_(model, x, criterion="range", exact=False)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == 2
    written = {n: t for file in files for n, t in load_file(file).items()}
    assert written.keys() == model.state_dict().keys()
    assert all(torch.equal(written[n], t) for n, t in model.state_dict().items())


def test_streaming_refuses_training_mode(tmp_path: Path) -> None:
    weights, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(build("streams").state_dict(), weights)
    with pytest.raises(pathlift.ArgumentError, match=r"model\.eval\(\) in build"):
        equalize_checkpoint(lambda: build("streams").train(), torch.zeros(2, 4), weights, out)
    assert not out.exists()


def test_examples_must_fit(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = tmp_path / "examples.safetensors"
    save_file({"x": torch.zeros(6, 5)}, examples)
    words = ["equalize", spec, "--input", "1,4", "-o", str(tmp_path / "out.safetensors")]
    assert main([*words, "--examples", str(examples)]) == 2
    assert "one tensor per input" in " ".join(capsys.readouterr().err.split())
