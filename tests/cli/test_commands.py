"""The command line, run in process."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pathlift.cli import main

FACTORY = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 3), nn.ReLU(), nn.Linear(3, 2))

def coder():
    return nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 1), nn.ReLU(), nn.Linear(1, 4))

def tied():
    model = build()
    model[0].register_parameter("again", model[0].weight)
    return model

def number():
    return 3
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    path = tmp_path / "nets.py"
    path.write_text(FACTORY)
    return f"{path}:build"


def network(spec: str, name: str = "build"):
    space: dict = {}
    exec(FACTORY, space)
    torch.manual_seed(0)
    return space[name]()


@pytest.mark.parametrize("name", ["build", "tied"])
def test_condition_writes_weights_of_the_same_function(
    spec: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    spec = spec.replace("build", name)
    assert main(["condition", spec, "--input", "2,4", "-o", str(out), "--exact", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["num_scales"] == 33 and data["max_output_change"] == 0.0
    plain, conditioned = network(spec, name), network(spec, name)
    missing, unknown = conditioned.load_state_dict(load_file(out), strict=False)
    assert not unknown and all(m == "0.again" for m in missing)
    x = torch.randn(5, 4)
    assert torch.equal(plain(x), conditioned(x))
    assert not torch.equal(plain[0].weight, conditioned[0].weight)
    # Read back its own output: nothing is left to do.
    arguments = ["condition", spec, "--weights", str(out), "--input", "2,4", "-o", str(again)]
    assert main([*arguments, "--exact", "--json"]) == 0
    assert not any(json.loads(capsys.readouterr().out)["log2_scales"])


def test_inspect_and_norms(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", spec, "--input", "2,4"]) == 0
    assert capsys.readouterr().out.startswith("33 free scales\n")
    assert main(["norms", spec, "--input", "1,4", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"path_norm_1", "path_norm_2", "imbalance"}


def test_advise(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    spec = spec.replace("build", "coder")
    assert main(["advise", spec, "--input", "2,4", "--optimizer", "sgd", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["verdict"] == "likely to help" and data["facts"]["num_scales"] == 31
    assert data["settings"]["exact"] is False and data["rate_ratio"] == [0.12, 2.0]
    assert main(["advise", spec, "--input", "2,4", "--optimizer", "adamw"]) == 0
    assert capsys.readouterr().out.startswith("conditioning  nothing to do\n")


class Evil:
    def __reduce__(self):
        return (os.system, ("false",))


def test_code_in_a_checkpoint_is_refused(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(Evil()))
    assert main(["norms", spec, "--weights", str(path), "--input", "1,4"]) == 2
    assert "running code from a checkpoint is refused" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(
    spec: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fail)
    assert main(["condition", spec, "--input", "2,4", "-o", str(out)]) == 1
    assert capsys.readouterr().err.endswith(
        "pathlift: error: No space left on device. Free some space, or write elsewhere.\n"
    )
    assert out.read_bytes() == b"old" and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "arguments, message, code",
    [
        (["norms", "nothing", "--input", "1,4"], "'nothing' is not a model.", 2),
        (["norms", "no_such_module_x:f", "--input", "1,4"], "can't be imported", 1),
        (["norms", "missing.py:f", "--input", "1,4"], "there is no file 'missing.py'", 2),
        (["norms", "SPEC", "--input", "1,x"], "--input '1,x' is not SHAPE[:DTYPE].", 2),
        (["norms", "SPEC", "--input", "1,4:int7"], "--input '1,4:int7' is not SHAPE[:DTYPE].", 2),
        (["norms", "SPEC", "--input", "1,5"], "can't be captured in train mode", 3),
        (["norms", "NUMBER", "--input", "1,4"], "must return a torch.nn.Module", 2),
        (["norms", "ABSENT", "--input", "1,4"], "has no callable 'absent'", 2),
        (["norms", "SPEC", "--input", "1,4", "--weights", "w.npz"], "there is no weights file", 2),
        (["condition", "SPEC", "--input", "1,4", "-o", "out.pt"], "must end in .safetensors", 2),
        (
            ["condition", "SPEC", "--input", "1,4", "-o", "no/o.safetensors"],
            "there is no folder",
            2,
        ),
    ],
)
def test_messages(
    spec: str, arguments: list[str], message: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for word, name in (("SPEC", "build"), ("NUMBER", "number"), ("ABSENT", "absent")):
        arguments = [spec.replace("build", name) if a == word else a for a in arguments]
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert "pathlift: error: " in error and message in error
