"""The command: a page, a table, JSON; a rerun trains nothing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pathlift.cli import main

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")
SMALL = [
    "compare",
    "--architectures",
    "mlp:8",
    "--data",
    "two-moons",
    "--rates",
    "0.1,0.3",
    "--seeds",
    "2",
    "--epochs",
    "3",
    "--samples",
    "128",
    "--batch",
    "32",
]


class _Page(HTMLParser):
    """Collects sources and links, and checks that tags outside tables close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.headings: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag in ("h1", "h2", "h3"):
            self.headings.append(tag)


def test_all_methods_give_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = [*SMALL, "--methods", "all", "--every", "1", "-o", str(out)]
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    methods = data["settings"][0]["methods"]
    assert list(methods) == [
        "baseline",
        "path",
        "path-continuous",
        "path-schedule",
        "path-root",
        "path-first",
        "enorm",
        "enorm-continuous",
        "enorm-step",
        "spectral",
        "range",
        "fisher",
        "batch-norm",
        "path-sgd",
    ]
    assert "0 cells are there, 56 to train" in captured.err
    assert len(list((out / "cells").glob("*.parquet"))) == 56
    assert methods["path"]["imbalance"] < methods["baseline"]["imbalance"]
    assert methods["path-schedule"]["conditioning_seconds"] > 0
    assert methods["path"]["conditioning_seconds"] > 0
    assert methods["baseline"]["conditioning_seconds"] == 0
    text = (out / "index.html").read_text()
    page = _Page(text)
    assert len(page.sources) == 3 and all(
        s.startswith("data:image/svg+xml;base64,") for s in page.sources
    )
    assert page.headings == ["h1", "h2", "h3", "h3"]
    assert "width=device-width" in text and not re.search(r"https?://", text)
    assert "pathlift compare --methods all --architectures mlp:8" in text
    assert json.loads((out / "summary.json").read_text()) == data["settings"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "56 cells are there, 0 to train" in captured.err
    assert captured.out.startswith("mlp:8 on two-moons, sgd: 2 seeds, 3 epochs; target loss")
    assert "path-conditioned, schedule" in captured.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rates", "0.1,fast"], "--rates takes positive numbers; found 'fast'"),
        (["--target", "speed=3"], "--target 'speed=3' is neither loss=NUMBER nor accuracy=NUMBER"),
        (["--methods", "magic"], "method 'magic' is unknown"),
        (["--architectures", "vgg:8"], "architecture 'vgg:8' is unknown"),
        (["--data", "mnist"], "mnist is read from files"),
        (["--optimizers", "lion"], "optimizer 'lion' is unknown"),
        (["--seeds", "0"], "--seeds must be at least 1; found 0"),
    ],
)
def test_wrong_options_are_named(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *options, "-o", str(tmp_path)]) in (1, 2)
    assert words in capsys.readouterr().err


def test_accuracy_targets_and_optimisers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--methods",
        "baseline,path",
        "--optimizers",
        "momentum,adam,muon",
        "--target",
        "accuracy=0.8",
        "--norm",
    ]
    assert main([*SMALL, *options, "--rates", "0.02", "-o", str(tmp_path), "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert [s["optimizer"] for s in settings] == ["momentum", "adam", "muon"]
    assert all(s["target"]["text"] == "training accuracy 0.8" for s in settings)
    assert all(
        s["methods"]["path"]["epochs_to_target"] is None
        or 1 <= s["methods"]["path"]["epochs_to_target"] <= 3
        for s in settings
    )
