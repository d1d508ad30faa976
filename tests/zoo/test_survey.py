"""A sample of ``make zoo``, and proof that its table would show a wrong rescaling."""

from __future__ import annotations

import json

import pytest
import torch

from pathlift.symmetry.group import RescalingGroup
from zoo import survey

SAMPLE = [
    "torchvision:squeezenet1_1",
    "timm:lcnet_035",
    "timm:test_efficientnet",
    "transformers:bert",
    "transformers:gpt2",
    "transformers:llama",
    "transformers:t5",
]


@pytest.fixture(autouse=True)
def _needs_libraries():
    pytest.importorskip("transformers")


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_zoo_keeps_its_bits(name: str) -> None:
    row = survey.survey(name)
    assert row["eval"] == row["train"] == "identical"
    assert row["scales"] > 0
    assert row["inference"] > 0 < row["capture"]
    assert row["converged"] and abs(row["reported - measured"]) < 1e-6


def test_a_wrong_rescaling_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: RescalingGroup, model: torch.nn.Module, scales: torch.Tensor) -> None:
        with torch.no_grad():
            next(iter(model.parameters())).mul_(2)

    monkeypatch.setattr(RescalingGroup, "rescale_", wrong)
    row = survey.survey("transformers:bert")
    assert row["eval"] == row["train"] == "DIFFERENT"
    assert "- outputs different: 1;" in survey.table([row])


def test_a_model_that_cannot_be_built_says_so() -> None:
    row = survey.survey("timm:no_such_model")
    assert "no_such_model" in row["not built"]
    assert "not built" in survey.table([row, _kept("timm:lcnetv2_small")])


def test_the_table_in_the_docs_is_the_one_of_its_data() -> None:
    rows = json.loads(survey.DATA.read_text())
    assert survey.table(rows) == survey.TABLE.read_text()
    assert not [r["name"] for r in rows if "DIFFERENT" in (r.get("eval"), r.get("train"))]
    assert not [r["name"] for r in rows if "crashed" in r]


def _kept(name: str) -> dict[str, object]:
    return next(r for r in json.loads(survey.DATA.read_text()) if r["name"] == name)
