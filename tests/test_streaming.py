"""Conditioning from file to file: equal to the in-memory form, whole files, worded refusals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pathlift
from pathlift.capture.model import capture
from pathlift.checkpoint import Shard, as_bytes, open_checkpoint, write_file, write_folder
from pathlift.cli import main
from pathlift.criteria import CRITERIA
from pathlift.errors import CaptureError, CheckpointError, RangeError
from pathlift.streaming import condition_checkpoint, parameters_on_meta
from pathlift.tensors.product import Product, dense

NETWORKS = """
import torch
from torch import nn


def mlp():
    return nn.Sequential(
        nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3)
    )


def half():
    return mlp().half()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(12)
        self.conv = nn.Conv2d(8, 12, 3, stride=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        y = torch.relu(self.norm1(self.stem(x)))
        y = torch.relu(self.norm2(self.conv(y)))
        y = y + torch.relu(self.depthwise(y))
        return self.head(y.mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width, gate):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.mix = nn.MultiheadAttention(width, 2, batch_first=True)
        self.gate, self.up = nn.Linear(width, 40), nn.Linear(width, 40)
        self.down = nn.Linear(40, width)
        self.act = gate

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.mix(y, y, y, need_weights=False)[0]
        y = self.norm2(x)
        return x + self.down(self.act(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self, gate, tied):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.register_buffer("positions", torch.linspace(-1, 1, 128).reshape(8, 16), False)
        self.register_buffer("table", torch.arange(8).flip(0))
        self.shift = nn.Parameter(torch.zeros(16))
        self.blocks = nn.Sequential(Block(16, gate))
        self.head = nn.Linear(16, 50, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions[self.table[: tokens.shape[1]]] + self.shift
        return self.head(self.blocks(x))


def gated():
    return Decoder(nn.ReLU(), False)


def tied():
    return Decoder(nn.SiLU(), True)


class Shared(nn.Module):
    # One layer applied twice, and a parameter that nothing reads.
    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 2)
        self.unused = nn.Parameter(torch.ones(3))
        self.first.weight.requires_grad_(False)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.again(torch.relu(self.again(x)))))


def shared():
    return Shared()


class FromWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("norm", self.linear.weight.detach().norm(), persistent=False)

    def forward(self, x):
        return torch.relu(self.linear(x)) / self.norm


def from_weights():
    return FromWeights()


def large():
    # 26 MB: long enough to be killed while writing.
    return nn.Sequential(
        nn.Linear(256, 2560), nn.ReLU(), nn.Linear(2560, 2048), nn.ReLU(), nn.Linear(2048, 300)
    )
"""

INPUTS = {
    "mlp": "1,6",
    "half": "1,6:float16",
    "Residual": "2,3,8,8",
    "gated": "1,7:int64",
    "tied": "2,8:int64",
    "shared": "1,5",
    "from_weights": "1,4",
    "large": "1,256",
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("networks") / "networks.py"
    path.write_text(NETWORKS)
    return path


def build(name: str) -> nn.Module:
    space: dict = {"__name__": "networks"}
    exec(NETWORKS, space)
    return space[name]()


def weights(name: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A state dict with spread-out scales, tied tensors stored once."""
    torch.manual_seed(7)
    model = build(name)
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter.mul_(3.0 ** (k % 5 - 2))
        for buffer_name, buffer in model.named_buffers():
            if "running" in buffer_name:
                buffer.uniform_(0.5, 2.0)
    state, seen = {}, set()
    for key, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            state[key] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
    return state


def save_sharded(state: dict[str, Tensor], folder: Path, files: int = 3) -> None:
    folder.mkdir(exist_ok=True)
    names = sorted(state)
    where = {}
    for k in range(files):
        shard = f"part{k}.safetensors"
        where |= dict.fromkeys(names[k::files], shard)
        save_file({n: state[n] for n in names[k::files]}, folder / shard, {"format": "pt"})
    index = {"metadata": {"total_size": 0, "note": "kept"}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def load_sharded(folder: Path) -> dict[str, Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for shard in set(index.values()):
        found |= load_file(folder / shard)
    assert found.keys() == index.keys()
    return found


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


def run(networks: Path, name: str, source: Path, out: Path, *options: str) -> int:
    command = ["condition", f"{networks}:{name}", "--weights", str(source), "--input", INPUTS[name]]
    return main([*command, "-o", str(out), "--json", *options])


# ------------------------------------------------------------------------------------- equality


OTHERS = (["--criterion", "weight-norm"], ["--criterion", "range"], ["--no-exact"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, []) for name in ("mlp", "Residual", "gated", "tied", "shared")),
        *((name, options) for name in ("mlp", "tied") for options in OTHERS),
    ],
    ids=lambda value: value if isinstance(value, str) else "".join(value[-1:]),
)
def test_equals_the_in_memory_result(
    networks: Path,
    name: str,
    options: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = weights(name)
    save_file(state, tmp_path / "in.safetensors")
    save_sharded(state, tmp_path / "in")
    single, plain = tmp_path / "streamed.safetensors", tmp_path / "plain.safetensors"
    reports = []
    runs = [("in.safetensors", plain, []), ("in", single, ["--stream"])]
    if not options:
        runs += [("in.safetensors", tmp_path / "one", ["--stream"])]
        runs += [("in", tmp_path / "many", ["--stream"]), ("in", tmp_path / "plain", [])]
    for source, out, more in runs:
        assert run(networks, name, tmp_path / source, out, *options, *more) == 0
        reports.append(json.loads(capsys.readouterr().out))
    for report in reports[1:]:
        for key in ("log2_scales", "imbalance_before", "imbalance_after", "num_parameters"):
            assert report[key] == reports[0][key], key
    assert any(reports[0]["log2_scales"])
    found = load_file(single)
    assert equal(load_file(plain), found) and not equal(found, state)
    for folder in () if options else ("one", "many", "plain"):
        assert equal(load_sharded(tmp_path / folder), found)


def test_batch_norm_statistics_are_rescaled_too(networks: Path, tmp_path: Path) -> None:
    state = weights("Residual")
    save_file(state, tmp_path / "in.safetensors")
    outs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for out, more in zip(outs, ([], ["--stream"]), strict=True):
        options = ["--batch-norm", "invariant", *more]
        assert run(networks, "Residual", tmp_path / "in.safetensors", out, *options) == 0
    found = load_file(outs[1])
    assert equal(load_file(outs[0]), found)
    assert not torch.equal(found["norm2.running_var"], state["norm2.running_var"])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mlp", torch.bfloat16), ("mlp", torch.float64), ("half", torch.float16)],
)
def test_the_dtype_of_the_file_stays(
    networks: Path, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    state = weights(name, dtype)
    if dtype == torch.float16:  # no entry so small that it can't be halved
        state = {n: t.abs().clamp_min(2**-5) * t.sign() for n, t in state.items()}
    save_file(state, tmp_path / "in.safetensors")
    out, plain = tmp_path / "out.safetensors", tmp_path / "plain.safetensors"
    assert run(networks, name, tmp_path / "in.safetensors", out, "--stream", "--exact") == 0
    assert run(networks, name, tmp_path / "in.safetensors", plain, "--exact") == 0
    found, expected = load_file(out), load_file(plain)
    assert not equal(found, state)
    for key, tensor in found.items():
        assert tensor.dtype == dtype
        # The in-memory form converts to the model's dtype when it loads.
        assert torch.equal(tensor.to(expected[key].dtype), expected[key]), key
        ratio = tensor.double() / state[key].double()
        assert torch.equal(ratio.log2(), ratio.log2().round()), key


def test_layout_and_metadata_stay(networks: Path, tmp_path: Path) -> None:
    save_sharded(weights("mlp"), tmp_path / "in")
    assert run(networks, "mlp", tmp_path / "in", tmp_path / "out", "--stream") == 0
    before, after = (open_checkpoint(tmp_path / d) for d in ("in", "out"))
    assert [[t.name for t in f.tensors] for f in before.files] == [
        [t.name for t in f.tensors] for f in after.files
    ]
    assert all(f.about == {"format": "pt"} for f in after.files)
    assert after.about == {"note": "kept", "total_size": after.nbytes}


def test_a_folder_is_conditioned_in_place(networks: Path, tmp_path: Path) -> None:
    state = weights("mlp")
    save_sharded(state, tmp_path / "in")
    (tmp_path / "in" / "config.json").write_text("{}")
    save_file(state, tmp_path / "in.safetensors")
    assert run(networks, "mlp", tmp_path / "in.safetensors", tmp_path / "o.safetensors") == 0
    assert run(networks, "mlp", tmp_path / "in", tmp_path / "in", "--stream") == 0
    assert equal(load_sharded(tmp_path / "in"), load_file(tmp_path / "o.safetensors"))
    files = sorted(p.name for p in (tmp_path / "in").iterdir())
    assert len(files) == 5 and "config.json" in files and not any("part" in f for f in files)
    # Nothing is left to do, and the same content keeps its names.
    assert run(networks, "mlp", tmp_path / "in", tmp_path / "in", "--stream") == 0
    assert sorted(p.name for p in (tmp_path / "in").iterdir()) == files


def test_both_names_of_a_tied_tensor(
    networks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = weights("tied")
    state["head.weight"] = state["embedding.weight"].clone()
    save_file(state, tmp_path / "in.safetensors")
    outs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for out, more in zip(outs, ([], ["--stream"]), strict=True):
        assert run(networks, "tied", tmp_path / "in.safetensors", out, *more) == 0
    plain, found = load_file(outs[0]), load_file(outs[1])
    assert torch.equal(found["head.weight"], found["embedding.weight"])
    assert equal(plain, {n: t for n, t in found.items() if n in plain})
    # Only under its second name.
    del state["embedding.weight"]
    save_file(state, tmp_path / "in.safetensors")
    assert run(networks, "tied", tmp_path / "in.safetensors", outs[1], "--stream") == 0
    assert torch.equal(load_file(outs[1])["head.weight"], found["head.weight"])
    state["embedding.weight"] = state["head.weight"] + 1
    save_file(state, tmp_path / "in.safetensors")
    assert run(networks, "tied", tmp_path / "in.safetensors", outs[1], "--stream") in (1, 2)
    assert "are one tensor in the model and differ" in capsys.readouterr().err


# ----------------------------------------------------------------------- a model without values


@pytest.mark.parametrize("name", ["mlp", "Residual", "gated", "tied", "shared"])
@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_streams_hand_on_what_criteria_return(name: str, criterion: str) -> None:
    torch.manual_seed(0)
    model = build(name)
    with parameters_on_meta():
        empty = build(name)
    assert all(p.is_meta for p in empty.parameters())
    sizes, _, dtype = INPUTS[name].partition(":")
    shape = [int(n) for n in sizes.split(",")]
    x = torch.zeros(shape, dtype=torch.int64 if dtype else torch.float32)
    state = dict(model.named_parameters())
    live: list[Tensor] = []

    def source(key: str) -> Tensor:
        live.append(state[key].detach().clone())
        return live[-1]

    program = capture(empty, x, source=source)
    assert all(p.is_meta for p in program.parameters.values()) and not live
    assert all(p.is_meta for p in empty.parameters())
    found: dict[str, Tensor | Product] = {}
    CRITERIA[criterion].hand_on(program, found.__setitem__)
    expected = CRITERIA[criterion](capture(model, x)).values
    assert found.keys() == expected.keys()
    assert all(torch.equal(dense(found[n]), expected[n]) for n in found)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_no_more_than_a_few_parameters_are_in_memory() -> None:
    """Peak of resident memory over both passes: a model of 30 matrices of 4 MB."""
    # A process of its own: an allocator that others have used keeps what it gets.
    done = subprocess.run(
        [sys.executable, "-c", _PEAK],
        capture_output=True,
        text=True,
        check=True,
        env=_environment(),
    )
    assert int(done.stdout) < 5 * 2**22


_PEAK = """
from pathlib import Path
import torch
from torch import nn
import pathlift
from pathlift.capture.model import capture
from pathlift.criteria import path_kernel
from pathlift.streaming import parameters_on_meta

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

def source(name):
    return torch.rand(1024, 1024, generator=torch.Generator().manual_seed(len(name)))

layers = [m for _ in range(30) for m in (lambda: nn.Linear(1024, 1024, bias=False), nn.ReLU)]
with parameters_on_meta():
    program = capture(nn.Sequential(*(m() for m in layers)), torch.zeros(1, 1024), source=source)
path_kernel.hand_on(program, lambda name, g: None)  # whatever is made once
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = memory("VmRSS")
taken = []
path_kernel.hand_on(program, lambda name, g: taken.append(name))
assert len(taken) == 30
print(memory("VmHWM") - before)
"""


def _environment() -> dict[str, str]:
    source = str(Path(pathlift.__file__).parents[1])
    # As the command line does: blocks that are freed go back to the system at once.
    return {**os.environ, "PYTHONPATH": source, "MALLOC_MMAP_THRESHOLD_": "1000000"}


def test_a_buffer_made_from_weights_is_refused(
    networks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = weights("from_weights")
    save_file(state, tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    assert run(networks, "from_weights", tmp_path / "in.safetensors", out, "--stream") in (2, 3)
    assert "buffer 'norm' is computed from parameters" in capsys.readouterr().err
    assert run(networks, "from_weights", tmp_path / "in.safetensors", out) == 0


# ------------------------------------------------------------------------------------- refusals


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def edit_index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return edit


def edit_state(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = weights("mlp")
        change(state)
        save_sharded(state, folder)

    return edit


def header(text: str, size: int = 0) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = len(text).to_bytes(8, "little") + text.encode() + bytes(size)
        (folder / "part0.safetensors").write_bytes(data)

    return edit


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda d: (d / "part1.safetensors").unlink(), "'part1.safetensors', which is missing"),
    "truncated": (lambda d: cut(d / "part1.safetensors"), "part1.safetensors' is not a whole .safetensors file"),
    "empty": (lambda d: (d / "part1.safetensors").write_bytes(b""), "too few for a header"),
    "not the format": (lambda d: (d / "part1.safetensors").write_bytes(b"x" * 99), "does not start with a header"),
    "no index": (lambda d: (d / "model.safetensors.index.json").write_text("[]"), "is not an index"),
    "outside": (edit_index(lambda i: i["weight_map"].update({"0.bias": "../a.safetensors"})), "give plain file names"),
    "other shard": (edit_index(lambda i: i["weight_map"].update({"0.bias": "part1.safetensors"})), "but it is in 'part0.safetensors'"),
    "not in a shard": (edit_index(lambda i: i["weight_map"].update({"x": "part1.safetensors"})), "but no file has it"),
    "not in the index": (edit_index(lambda i: i["weight_map"].pop("0.bias")), "does not list everything its files hold, such as '0.bias'"),
    "missing tensor": (edit_state(lambda s: s.pop("2.bias")), "lacks 1 of the model's tensors, first '2.bias'"),
    "unknown tensor": (edit_state(lambda s: s.update(x=torch.ones(1))), "holds 'x', which the model does not have"),
    "wrong shape": (edit_state(lambda s: s.update({"0.bias": torch.ones(31)})), "'0.bias' has shape (31,)"),
    "eight bits": (edit_state(lambda s: s.update({"0.bias": s["0.bias"].to(torch.float8_e4m3fn)})), "'0.bias' is stored as float8_e4m3fn"),
    "integers": (edit_state(lambda s: s.update({"0.bias": s["0.bias"].long()})), "'0.bias' is stored as int64"),
    "nan": (edit_state(lambda s: s["0.bias"].fill_(float("nan"))), "'0.bias' in"),
    "unknown dtype": (header('{"0.bias":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}', 1), "has dtype F4, which is not supported"),
    "hole": (header('{"0.bias":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', 2), "does not start where the tensor before it ends"),
    "lengths": (header('{"0.bias":{"dtype":"F32","shape":[1],"data_offsets":[0,3]}}', 3), "has 3 bytes, its shape 4"),
    "repeated": (header('{"a":1,"a":2}'), "stands there twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(
    networks: Path, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = REFUSALS[case]
    save_sharded(weights("mlp"), tmp_path / "in")
    damage(tmp_path / "in")
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    assert run(networks, "mlp", tmp_path / "in", out, "--stream") in (1, 2, 3)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("pathlift: error: ") and message in error, error
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out.safetensors"]


def test_more_refusals(networks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(weights("mlp"), tmp_path / "a.safetensors")
    save_file(weights("mlp"), tmp_path / "b.safetensors")
    (tmp_path / "c.gguf").touch()
    source, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    for arguments, message in (
        ((tmp_path, out, "--stream"), "holds 2 possible checkpoints"),
        ((tmp_path / "no", out, "--stream"), "there is no checkpoint"),
        ((tmp_path / "c.gguf", out, "--stream"), "has suffix '.gguf'"),
        ((source, out, "--stream", "--criterion", "fisher"), "criterion 'fisher' needs data"),
        ((source, tmp_path / "c.gguf", "--stream"), "must end in .safetensors"),
        ((source, tmp_path / "no" / "out", "--stream"), "there is no folder"),
    ):
        assert run(networks, "mlp", *arguments) in (1, 2)
        assert message in capsys.readouterr().err
    command = ["condition", f"{networks}:mlp", "--input", "1,6", "-o", str(out), "--stream"]
    assert main(command) == 2
    assert "Add --weights" in capsys.readouterr().err


def test_a_file_cut_off_after_it_was_opened(tmp_path: Path) -> None:
    save_file({"x": torch.ones(100)}, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        os.truncate(tmp_path / "a.safetensors", 200)
        with pytest.raises(CheckpointError, match="ends inside 'x'"):
            checkpoint.read("x")


def test_bits_are_never_lost(networks: Path, tmp_path: Path, monkeypatch) -> None:
    """A weight next to the smallest normal number is not halved."""
    state = weights("mlp")
    state["0.weight"][0, 0] = 2.0**-125 * 1.3
    save_file(state, tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    assert run(networks, "mlp", tmp_path / "in.safetensors", out, "--stream", "--exact") == 0
    found = load_file(out)
    for key in found:  # an exact power of two everywhere
        mantissas = [t[key].frexp().mantissa for t in (found, state)]
        assert torch.equal(*mantissas)
    # Scales that do lose bits are refused before anything is written.
    from pathlift import condition

    monkeypatch.setattr(
        condition,
        "scales_to_apply",
        lambda _, solution, exact: solution.log2_scales.round() * 0 - 10,
    )
    before = out.read_bytes()
    x = torch.zeros(1, 6)
    with pytest.raises(RangeError, match="bits would be lost"):
        condition_checkpoint(lambda: build("mlp"), x, tmp_path / "in.safetensors", out)
    assert out.read_bytes() == before


def test_buffers_from_weights_raise_in_python_too(tmp_path: Path) -> None:
    save_file(weights("from_weights"), tmp_path / "in.safetensors")
    with pytest.raises(CaptureError, match="is not in the checkpoint"):
        condition_checkpoint(
            lambda: build("from_weights"),
            torch.zeros(1, 4),
            tmp_path / "in.safetensors",
            tmp_path / "out.safetensors",
        )


# ---------------------------------------------------------------------------------- whole files


def shard_of(value: float, n: int = 4) -> Shard:
    tensor = torch.full((n,), value)
    return Shard([(f"x{value}", tensor.dtype, (n,))], lambda: iter([as_bytes(tensor)]))


def failing() -> Shard:
    def pieces():
        yield as_bytes(torch.ones(2))
        raise OSError("disk full")

    return Shard([("x", torch.float32, (4,))], pieces)


def test_a_failed_write_changes_nothing(tmp_path: Path) -> None:
    write_file(tmp_path / "a.safetensors", shard_of(1))
    write_folder(tmp_path / "a", [shard_of(1), shard_of(2)], {})
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert len(before) == 4
    with pytest.raises(OSError, match="disk full"):
        write_file(tmp_path / "a.safetensors", failing())
    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "b", [shard_of(3), failing()], {})
    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "a", [failing()], {})
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "b").exists()


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_folder(folder, [shard_of(1), shard_of(2)], {})
    left = [
        tmp_path / ".x.safetensors.0123456789abcdef.tmp",
        folder / ".model.0123456789abcdef.tmp",
        folder / ".model.safetensors.index.json.0123456789abcdef.tmp",
        folder / "model-0123456789abcdef-00001-of-00002.safetensors",
    ]
    kept = [
        tmp_path / ".y.safetensors.0123456789abcdef.tmp",
        tmp_path / ".x.safetensors.mine.tmp",
        folder / ".mine.tmp",
        folder / "model-00001-of-00002.safetensors",
        folder / "model-mine.safetensors",
    ]
    for path in left + kept:
        path.write_bytes(b"part")
    unborn = tmp_path / ".a.0123456789abcdef.tmp"
    unborn.mkdir()
    (unborn / "part").touch()
    write_file(tmp_path / "x.safetensors", shard_of(1))
    write_folder(folder, [shard_of(3)], {})
    assert not any(p.exists() for p in [*left, unborn])
    assert all(p.read_bytes() == b"part" for p in kept)
    assert load_sharded(folder).keys() == {"x3"}
    assert len(list(folder.glob("model-*-of-*"))) == 2


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    folder, path = tmp_path / "a", tmp_path / "a.safetensors"
    write_folder(folder, [shard_of(1)], {})

    # Another run with the same target while this one is half done.
    def file_meanwhile():
        write_file(path, shard_of(2))
        assert load_file(path).keys() == {"x2"}
        yield from shard_of(3).pieces()

    def folder_meanwhile():
        with pytest.raises(CheckpointError, match="another process is writing"):
            write_folder(folder, [shard_of(2)], {})
        yield from shard_of(3).pieces()

    write_file(path, Shard(shard_of(3).tensors, file_meanwhile))
    assert load_file(path).keys() == {"x3"}
    write_folder(folder, [Shard(shard_of(3).tensors, folder_meanwhile)], {})
    assert load_sharded(folder).keys() == {"x3"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.safetensors"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "real" / "a.safetensors")
    write_file(link, shard_of(1))
    assert link.is_symlink() and load_file(tmp_path / "real" / "a.safetensors").keys() == {"x1"}


# ----------------------------------------------------------------------------------------- kill


# Imports once, then runs the command in a fork for every line it reads.
SERVER = """
import os, sys
import torch._dynamo, torch.export
import pathlift.cli, pathlift.streaming
for _ in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(pathlift.cli.main(sys.argv[1:]))
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
    print("end", file=sys.stderr, flush=True)
"""


class Runner:
    """Runs of one command, each a process of its own that can be killed."""

    def __init__(self, command: list[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER, *command],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def start(self) -> int:
        self.server.stdin.write("go\n")
        return int(self.server.stdout.readline())

    def until(self, word: str) -> None:
        for line in self.server.stderr:
            if word in line or line == "end\n":
                return

    def end(self) -> int:
        """The status of the run that was started last."""
        status = int(self.server.stdout.readline())
        for line in self.server.stderr:
            if line == "end\n":
                break
        return status

    def close(self) -> None:
        self.server.stdin.close()
        assert self.server.wait() == 0
        self.server.stdout.close()
        self.server.stderr.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no kill -9 here")
@pytest.mark.parametrize("moments", [6, pytest.param(20, marks=pytest.mark.zoo)])
@pytest.mark.parametrize("target", ["out.safetensors", "out"])
def test_killed_at_random_moments(
    networks: Path, target: str, moments: int, tmp_path: Path
) -> None:
    """After each kill the output is the old one or the new one; the next run cleans up."""
    state = weights("large")
    save_sharded(state, tmp_path / "in", files=4)
    out = tmp_path / target
    load = load_file if out.suffix else load_sharded
    command = ["condition", f"{networks}:large", "--weights", str(tmp_path / "in"), "--stream"]
    runner = Runner([*command, "--input", INPUTS["large"], "-o", str(out)])
    runner.start()
    began = time.perf_counter()
    runner.until("writing")
    at = time.perf_counter()
    assert runner.end() == 0
    writing, whole = time.perf_counter() - at, time.perf_counter() - began
    new = load(out)
    assert not equal(new, state)
    # What is replaced: a checkpoint of the same structure, told apart by its values.
    old = {n: t.neg() for n, t in state.items()}
    shard = Shard(
        [(n, t.dtype, tuple(t.shape)) for n, t in old.items()],
        lambda: (as_bytes(t) for t in old.values()),
    )

    def put_old() -> None:
        if out.suffix:
            write_file(out, shard)
        else:
            write_folder(out, [shard], {})

    chosen = random.Random(moments)
    seen = []
    for k in range(moments):
        put_old()
        child = runner.start()
        if k % 3 == 2:  # anywhere, else while writing
            time.sleep(chosen.uniform(0, whole))
        else:
            runner.until("writing")
            time.sleep(chosen.uniform(0, writing))
        with suppress(ProcessLookupError):  # it may have ended by itself
            os.kill(child, signal.SIGKILL)
        status = runner.end()
        found = load(out)
        assert equal(found, old) or equal(found, new)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0 and equal(found, new)
        seen.append("new" if equal(found, new) else "old")
    put_old()
    runner.start()
    assert runner.end() == 0 and equal(load(out), new)
    runner.close()
    assert {p.name for p in tmp_path.iterdir()} == {"in", target}
    if target == "out":
        assert len(list(out.iterdir())) == 5
    print(f"{target}: {moments} kills leave {', '.join(seen)}")
