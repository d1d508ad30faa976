"""What is printed: versions, help, widths, bars, JSON."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pathlift
from pathlift.cli import main
from pathlift.cli.progress import Lines, Meter
from pathlift.experiments import demo
from pathlift.experiments.architectures import resnet18
from pathlift.experiments.compare import text
from pathlift.experiments.summary import HEADINGS
from pathlift.progress import Step
from pathlift.text import columns, fitted

SMALL = "pathlift.experiments.architectures:autoencoder"
DEEP = "pathlift.experiments.architectures:resnet18"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"pathlift {pathlift.__version__}\n"


@pytest.mark.parametrize(
    "command", [[], ["inspect"], ["advise"], ["condition"], ["norms"], ["demo"]]
)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([*command, "--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert ("exit codes:" in out) == (not command)


def test_help_does_without_torch() -> None:
    code = (
        "import sys\nfrom pathlift.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)


def test_inspect_fits_eighty_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["inspect", DEEP, "--input", "1,3,32,32"]) == 0
    whole = capsys.readouterr().out
    assert max(map(len, whole.splitlines())) > 120  # for pipes: nothing is wrapped
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["inspect", DEEP, "--input", "1,3,32,32"]) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 80
    assert narrow.split() == whole.split()


def test_wrapped_lines_stand_under_their_words() -> None:
    assert fitted("title    one two three", 18) == "title    one two\n         three"
    assert fitted("one two three four", 13) == "one two three\n        four"
    assert fitted("x" * 30, 12) == "x" * 30  # a path is left whole
    assert fitted("a b", None) == "a b"


def test_wide_tables_go_on_below() -> None:
    rows = [("method", "first", "second"), ("a", "1", "2")]
    assert columns(rows, None) == "method  first  second\na           1       2"
    assert columns(rows, 14) == "method  first\na           1\n\nmethod  second\na            2"


def test_a_comparison_fits_eighty_columns(summary: list) -> None:
    lines = text(summary, 80).splitlines()
    assert max(map(len, lines)) <= 80
    words = " ".join(lines)
    assert all(h in words for h in HEADINGS)


@pytest.fixture
def summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list:
    pytest.importorskip("pyarrow")
    pytest.importorskip("matplotlib")
    command = ["compare", "--architectures", "mlp:8", "--data", "two-moons", "--rates", "0.1,0.3"]
    command += ["--methods", "baseline,path-schedule", "--samples", "64", "--target", "loss=9e-9"]
    command += ["--seeds", "2", "--epochs", "2", "-o", str(tmp_path), "--json"]
    assert main(command) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    page = (tmp_path / "index.html").read_text()
    first = page[page.index("own best rate</h3>") :]
    heads = [part.split("<")[0] for part in first.split("<th>")[1:4]]
    assert heads == ["method", "fewer epochs [95%]", "difference [95%]"]  # seen without scrolling
    assert "path kernel is the matrix" in page
    for setting in settings:  # JSON has no infinities
        for entry in setting["methods"].values():
            for key, value in entry.items():
                if value is None and not key.endswith("interval"):
                    entry[key] = float("nan")
    return settings


def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    for stream, shown in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        lines = Lines()
        lines("training")
        lines(Step("1 of 4 cells trained", 1, 4, "cells"))
        lines(Step("2 of 4 cells trained", 2, 4, "cells"))
        lines.close()
        found = stream.getvalue()
        assert found.startswith("pathlift: training …\n")
        assert ("2/4" in found and "<" in found) is shown  # 00:01<00:01: the time left


def test_without_tqdm_there_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    Lines()(Step("1 of 4 cells trained", 1, 4, "cells"))
    assert sys.stderr.getvalue() == "pathlift: 1 of 4 cells trained …\n"


def test_a_meter_says_each_phase_once(capsys: pytest.CaptureFixture[str]) -> None:
    meter = Meter(Lines())
    for done in range(5):
        meter("writing", done, 4)
    meter("solving", 0, 0)
    assert capsys.readouterr().err == "pathlift: writing …\npathlift: solving …\n"


def test_demo_prints_json_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    monkeypatch.setattr(demo, "resnet18", lambda: resnet18(width=4))
    monkeypatch.setattr(demo, "RATES", (0.3, 1.0))
    assert main(["demo", "--quick", "--json", "-o", str(tmp_path)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert Path(data["page"]).is_file()
    assert all(0 < n["change"] < 1e-5 for n in data["networks"].values())
    page = Path(data["page"]).read_text()
    heads = [part.split("<")[0] for part in page.split("<th>")[1:4]]
    assert heads == ["network", "imbalance", "outputs"]
    assert "as constructed" in page and "path kernel is the matrix" in page


def test_random_weights_are_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    command = ["condition", SMALL, "--input", "1,64", "-o"]
    assert main([*command, str(first)]) == 0
    assert "the weights are random" in capsys.readouterr().out
    assert main([*command, str(second), "--weights", str(first)]) == 0
    assert "the weights are random" not in capsys.readouterr().out
    assert main([*command, str(second), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["random_weights"] is True
