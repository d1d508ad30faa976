"""What a user can cause is one line and an exit code, never a traceback."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pathlift
from pathlift.cli import main, models
from pathlift.cli.exits import EXPLAINED, code, sentence
from pathlift.experiments import compare as experiment
from pathlift.experiments import sweep

FILE = """
import sys, warnings, logging
from torch import nn

def build():
    print("made")
    warnings.warn("old")
    logging.getLogger("torch.export").error("loud")
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

def raises():
    raise ValueError("no such thing\\nand more")

def leaves():
    sys.exit(3)

def needs(width, depth=3):
    return nn.Linear(width, depth)

def gelu():
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(FILE)
    return path


def failed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and the one line that is said."""
    found = main(arguments)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.endswith(" …")]
    assert captured.out == "" and len(lines) == 1 and "Traceback" not in lines[0]
    assert lines[0].startswith("pathlift: ")
    return found, lines[0].removeprefix("pathlift: ")


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [
        ("raises", 2, r"'.*' can't be built: ValueError: no such thing \(nets.py, line 12\)."),
        ("leaves", 2, r"can't be built: SystemExit: 3 \(nets.py, line 15\)."),
        ("needs", 2, r"the factory 'needs' needs arguments \(width\)."),
        ("biuld", 2, r"has no callable 'biuld'; it has .* Did you mean 'build'\?$"),
        ("gelu", 3, "the path lifting is not defined for 'gelu'"),
    ],
)
def test_factories(
    file: Path, name: str, number: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, line = failed(["norms", f"{file}:{name}", "--input", "1,4"], capsys)
    assert found == number and re.search(words, line), line


def test_a_file_with_a_syntax_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.py").write_text("def f(:\n")
    found, line = failed(["norms", f"{tmp_path / 'bad.py'}:f", "--input", "1,4"], capsys)
    assert found == 2 and line.endswith("can't be run: invalid syntax (line 1).")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: COMMAND. See: pathlift --help"),
        (["inspct"], "command 'inspct' is unknown. .* Did you mean 'inspect'?"),
        (["norms", "x", "--inptu", "1"], "'--inptu' is unknown. Did you mean '--input'?"),
        (["norms", "x", "--input", "1", "--quick"], "option '--quick' is unknown. See: "),
        (["norms", "x", "--input", "1", "--mode", "trian"], "'trian' is unknown. .* 'train'?"),
        (["norms", "x", "--input", "1", "--seed", "9" * 30], "is not a seed between 0 and"),
        (["norms", "x", "y", "--input", "1"], "unrecognized arguments: y. See: pathlift norms"),
        (["condition", "x", "--input", "1"], "required: -o/--output. See: pathlift condition"),
        (["norms", "FILE:build", "--input", "1," + "9" * 18], "more than this machine has free"),
    ],
)
def test_options(
    file: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, line = failed([a.replace("FILE", str(file)) for a in arguments], capsys)
    pattern = ".*".join(map(re.escape, words.split(".*")))
    assert found == 2 and re.search(pattern, line), line


@pytest.mark.parametrize("option", ["--criterion", "--solver"])
def test_names_are_looked_at_before_the_model(
    file: Path, option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name = {"--criterion": "path-kernal", "--solver": "newtn"}[option]
    command = [
        "condition",
        f"{file}:raises",
        "--input",
        "1,4",
        "-o",
        str(tmp_path / "o.safetensors"),
    ]
    found, line = failed([*command, option, name], capsys)
    assert found == 2 and f"{name!r} is unknown" in line and "Did you mean" in line


def test_names_of_zoos(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    zoo = SimpleNamespace(list_models=lambda: ["resnet18", "vgg16"], __name__="zoo")
    monkeypatch.setitem(sys.modules, "timm", zoo)
    found, line = failed(["norms", "timm:resnet81", "--input", "1,4"], capsys)
    assert found == 2 and "among the 2 of this version. Did you mean 'resnet18'?" in line


def test_a_broken_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "torchvision"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    found, line = failed(["norms", "torchvision:resnet18", "--input", "1,4"], capsys)
    assert found == 1
    assert line.startswith(
        "error: torchvision is installed but broken: RuntimeError: operator nms does not exist. It "
        f"was probably built for another version than torch {torch.__version__}"
    )


def test_every_error_has_its_code() -> None:
    errors = {
        KeyboardInterrupt(): 130,
        pathlift.ArgumentError("x"): 2,
        pathlift.CaptureError("x"): 3,
        pathlift.UnsupportedOperationError("x"): 3,
        pathlift.RangeError("x"): 3,
        pathlift.VerificationError("x"): 4,
        pathlift.MissingDependencyError("x"): 1,
        pathlift.CheckpointError("x"): 1,
        OSError(28, "No space left on device", "a"): 1,
        MemoryError(): 1,
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"): 1,
        KeyError("x"): 70,
    }
    for error, number in errors.items():
        assert code(error) == number, error
        assert re.search(rf"^  {number} ", EXPLAINED, re.MULTILINE)
        assert sentence(error)


def test_an_internal_error_says_where(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise TypeError("not a number")

    monkeypatch.setattr(pathlift, "path_norm", wrong, raising=False)
    arguments = ["norms", f"{file}:build", "--input", "1,4"]
    found, line = failed(arguments, capsys)
    assert found == 70 and re.match(r"internal error: TypeError: .* \(test_errors.py, line", line)
    assert main([*arguments, "--verbose"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_warnings_logs_and_prints_are_silent(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["norms", f"{file}:build", "--input", "1,4", "--json"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == "pathlift: path norms …\n" and captured.out.startswith("{")
    assert main([*arguments, "--verbose"]) == 0
    captured = capsys.readouterr()
    assert "made" in captured.err and captured.out.startswith("{")


def test_outputs_that_cannot_be_written(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["condition", f"{file}:build", "--input", "1,4", "-o", str(tmp_path / "o")]
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)  # root may write everywhere
        assert failed(command, capsys) == (
            1,
            f"error: Permission denied: {str(tmp_path)!r}. Choose a place you may write to.",
        )
    found, line = failed([*command[:-1], str(file / "o.safetensors")], capsys)
    assert found == 2 and "there is no folder" in line
    found, line = failed(["demo", "-o", str(file / "page")], capsys)
    assert found == 1 and "Not a directory" in line


def test_devices_are_no_outputs(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link.safetensors"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for name in (pipe, link, Path(os.devnull)):
        command = ["condition", f"{file}:build", "--input", "1,4", "-o", str(name)]
        found, line = failed(command, capsys)
        assert found == 1 and f"the output '{name}' is a device or a pipe" in line
    assert pipe.is_fifo() and link.is_symlink() and not Path(os.devnull).is_file()


def test_an_error_of_the_disk_names_the_output(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    output = tmp_path / "o.safetensors"
    monkeypatch.setattr(Path, "open", refused)
    command = ["condition", f"{file}:build", "--input", "1,4", "-o", str(output)]
    found, line = failed(command, capsys)
    assert found == 1 and line.startswith(f"error: Read-only file system: {str(output)!r}.")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_stdout_and_a_closed_pipe(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["inspect", f"{file}:build", "--input", "1,4"]
    with monkeypatch.context() as patch, open("/dev/full", "w") as full:
        patch.setattr(sys, "stdout", full)
        found, line = failed(command, capsys)
        with suppress(OSError):
            full.close()
    assert found == 1 and line.startswith("error: No space left on device. Free some space")
    reading, writing = os.pipe()
    os.close(reading)
    with monkeypatch.context() as patch, os.fdopen(writing, "w") as pipe:
        patch.setattr(sys, "stdout", pipe)
        assert main(command) == 141
    assert capsys.readouterr().err == "pathlift: finding the rescaling group …\n"


def test_devices_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cuda:99", "cudda"):
        found, line = failed(["compare", "--device", name, "-o", str(tmp_path)], capsys)
        assert found == 2 and f"--device {name!r} can't be used here" in line


def test_a_dead_scheduler_is_noticed_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    found, line = failed(["compare", "--dask", address, "-o", str(tmp_path)], capsys)
    assert found == 1 and f"the Dask scheduler at {address} does not answer" in line
    found, line = failed(["compare", "--dask", "nowhere", "-o", str(tmp_path)], capsys)
    assert found == 2 and "--dask 'nowhere' is no cluster" in line


def test_ctrl_c_is_one_line(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "model_named", stop)
    assert failed(["norms", f"{file}:build", "--input", "1,4"], capsys) == (130, "interrupted")


COMPARE = ["compare", "--methods", "baseline", "--data", "two-moons", "--rates", "0.1"]


def test_ctrl_c_keeps_finished_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    jobs: list[object] = []

    def interrupted(cells: Any, place: Any) -> Any:
        jobs.append(cells)
        if len(jobs) == 2:
            signal.raise_signal(signal.SIGINT)
        return sweep.run_job(cells, place)

    command = [*COMPARE, "--architectures", "mlp:4,mlp:5", "--seeds", "2", "--epochs", "2"]
    command += ["--samples", "64", "-o", str(tmp_path)]
    original = sweep.sweep
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "sweep", lambda *a, **k: original(*a, run=interrupted, **k))
        # Tests that are started in the background inherit a SIGINT that is ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            found, line = failed(command, capsys)
        finally:
            signal.signal(signal.SIGINT, before)
    assert found == 130 and line.startswith("interrupted; the 2 finished cells in ")
    assert main(command) == 0
    assert "2 cells are there, 2 to train" in capsys.readouterr().err


@pytest.mark.zoo
@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_at_any_process(tmp_path: Path, processes: str) -> None:
    """A real signal to the whole group, in the middle of a job that takes minutes."""
    cells = tmp_path / "cells"
    command = [sys.executable, "-m", "pathlift", *COMPARE, "--architectures", "mlp:4,mlp:512-512"]
    command += ["--seeds", "2", "--epochs", "2000", "--batch", "500", "--processes", processes]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        [*command, "-o", str(tmp_path)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 300
        while len(list(cells.glob("*.parquet"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate()
    lines = [line for line in errors.splitlines() if not line.endswith(" …")]
    assert process.returncode == 130 and len(lines) == 1, errors
    assert lines[0].startswith("pathlift: interrupted; the 2 finished cells in ")
