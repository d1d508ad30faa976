"""The examples of docs/checkpoints.md run, in its order."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pathlift.checkpoint import open_checkpoint
from pathlift.cli import main

TEXT = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text(encoding="utf-8")


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "bash", "python"]
    Path("network.py").write_text(blocks[0][1])
    space: dict = {}
    exec(blocks[0][1], space)
    torch.manual_seed(0)
    Path("weights").mkdir()
    state = space["build"]().state_dict()
    save_file(state, "weights/model.safetensors")
    for line in blocks[1][1].splitlines():
        command, *arguments = shlex.split(line)
        assert command == "pathlift" and main(arguments) == 0
    first = load_file("conditioned.safetensors")
    assert not torch.equal(first["0.weight"], state["0.weight"])
    assert load_file("small.safetensors").keys() == first.keys()
    try:
        exec(blocks[2][1], {})
    finally:
        sys.modules.pop("network", None)
    with open_checkpoint(Path("conditioned")) as checkpoint:
        assert checkpoint.tensors.keys() == first.keys()
        assert all(torch.equal(checkpoint.read(n), t) for n, t in first.items())
