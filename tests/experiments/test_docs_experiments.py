"""The commands of docs/experiments.md are commands, and their values are known ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import torch

from pathlift.cli.run import parser
from pathlift.experiments.architectures import build
from pathlift.experiments.data import DATA_SETS, Data
from pathlift.experiments.methods import METHODS
from pathlift.experiments.optimizers import OPTIMIZERS

TEXT = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text(encoding="utf-8")


def test_commands() -> None:
    lines = [line for line in TEXT.splitlines() if line.startswith("pathlift ")]
    assert len(lines) == 5
    for line in lines:
        parser().parse_args(shlex.split(line)[1:])


def test_values_of_options() -> None:
    rows = dict(re.findall(r"^\| `--([a-z]+)` \| (.*) \|$", TEXT, flags=re.MULTILINE))
    named = {key: re.findall("`([a-z0-9:-]+)`", value) for key, value in rows.items()}
    methods = [m for m in named["methods"] if m not in ("all", "--every")]
    assert sorted(methods) == sorted(METHODS)
    assert sorted(named["data"]) == sorted(DATA_SETS)
    assert set(named["optimizers"]) == set(OPTIMIZERS) - {"path-sgd"}  # a method
    labelled = Data("images", torch.zeros(4, 64), torch.zeros(4, dtype=torch.int64), 2)
    fitting = {
        "autoencoder": Data("images", labelled.inputs, None),
        "completion": labelled.completion(),
        "transformer": Data("text", labelled.inputs.long(), labelled.inputs.long(), 2),
    }
    for name in named["architectures"]:
        build(name, fitting.get(name.split(":")[0], labelled))
