"""Peak memory of ``pathlift condition --stream`` on a sharded checkpoint of random weights.

Run: ``python benchmarks/streaming.py [--gigabytes 4.2] [--model lm|mlp] [--in-memory] [--json F]``.
The checkpoint is made in a temporary folder, a file at a time, and conditioned by the command line
in a process of its own. Two peaks of that process are given: the kernel's count of resident memory
(``VmHWM``, with program code and file pages) and the largest anonymous memory seen in samples 10 ms
apart (``RssAnon``). The row "nothing" is a process that imports the library and captures a network
of three layers: what any run costs. ``--in-memory`` adds the same command without ``--stream``.

``lm`` is a decoder of blocks with attention and a gated ReLU MLP: five of the seven weights of a
block have scales on rows and columns. For the path kernel their coefficients stay products of thin
factors; for other criteria they are reduced matrices as large as the weights, in float64, in a
mapped temporary file: resident while they are used, and not anonymous, so that the system may drop
their pages. In ``mlp`` this holds for every weight.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathlift.checkpoint import Shard, as_bytes, write_folder
from pathlift.streaming import parameters_on_meta

_LAYERS = int(os.environ.get("PATHLIFT_BENCHMARK_LAYERS", "18"))
_WIDTH = int(os.environ.get("PATHLIFT_BENCHMARK_WIDTH", "2048"))


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_norm(x)
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        y = self.mlp_norm(x)
        return x + self.down(self.gate(y).relu() * self.up(y))


class Decoder(nn.Module):
    def __init__(self, words: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        hidden = width * 43 // 16
        self.blocks = nn.Sequential(
            *(Block(width, hidden, max(width // 128, 1)) for _ in range(layers))
        )
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


def lm() -> nn.Module:
    """About 50 MB per layer at width 1024 and 200 MB at width 2048, float32."""
    return Decoder(32_000, _WIDTH, _LAYERS)


def mlp() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(_LAYERS):
        layers += [nn.Linear(_WIDTH, _WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(_WIDTH, 10))


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


MODELS = {"lm": (lm, "1,16:int64"), "mlp": (mlp, f"1,{_WIDTH}"), "tiny": (tiny, "1,8")}


def structure(name: str) -> nn.Module:
    with parameters_on_meta():
        return MODELS[name][0]()


def make_checkpoint(name: str, folder: Path, limit: int) -> dict[str, int]:
    """Random weights in files of about ``limit`` bytes, one tensor in memory at a time."""
    state = structure(name).state_dict()
    groups: list[list[str]] = [[]]
    room = limit
    for key, tensor in state.items():
        if groups[-1] and tensor.nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(key)
        room -= tensor.nbytes
    generator = torch.Generator().manual_seed(0)

    def drawn(key: str) -> Tensor:
        shape = state[key].shape
        if len(shape) < 2:  # gains of norms, biases
            return torch.ones(shape) if "norm" in key else torch.zeros(shape)
        return torch.randn(shape, generator=generator).mul_((2 / shape[-1]) ** 0.5)

    def shard(keys: list[str]) -> Shard:
        def pieces() -> Iterator[Tensor]:
            return (as_bytes(drawn(key)) for key in keys)

        return Shard([(k, state[k].dtype, tuple(state[k].shape)) for k in keys], pieces)

    write_folder(folder, [shard(g) for g in groups], {})
    return {
        "checkpoint_bytes": sum(t.nbytes for t in state.values()),
        "largest_tensor_bytes": max(t.nbytes for t in state.values()),
        "tensors": len(state),
        "files": len(groups),
    }


def measured(command: list[str]) -> dict[str, Any]:
    """Run a command; seconds, output and peaks of its memory in bytes."""
    start, anonymous, resident = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile("w+") as output:  # a pipe would fill up
        process = subprocess.Popen(command, stdout=output)
        while process.poll() is None:
            try:
                text = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            fields = dict(line.split(":", 1) for line in text.splitlines())
            if "RssAnon" in fields:
                anonymous = max(anonymous, int(fields["RssAnon"].split()[0]) * 1024)
                resident = max(resident, int(fields["VmHWM"].split()[0]) * 1024)
            time.sleep(0.01)
        code = process.wait()
        seconds = time.perf_counter() - start
        output.seek(0)
        out = output.read()
    peaks = {"resident": resident, "anonymous": anonymous}
    return {"seconds": seconds, **peaks, "exit_status": code, "out": out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.2)
    parser.add_argument("--model", choices=("lm", "mlp"), default="lm")
    parser.add_argument("--criteria", default="path-kernel,weight-norm")
    parser.add_argument("--shard", type=float, default=0.5, help="gigabytes per file")
    parser.add_argument("--in-memory", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    global _LAYERS
    per_layer = {"lm": 4 * _WIDTH**2 + 3 * _WIDTH * (_WIDTH * 43 // 16), "mlp": _WIDTH**2}
    fixed = 2 * 32_000 * _WIDTH if args.model == "lm" else 0
    _LAYERS = max(1, -(-int(args.gigabytes * 1e9 / 4 - fixed) // per_layer[args.model]))
    os.environ["PATHLIFT_BENCHMARK_LAYERS"] = str(_LAYERS)
    here = Path(__file__).resolve()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        sizes: dict[str, Any] = make_checkpoint(
            args.model, folder / "weights", int(args.shard * 1e9)
        )
        make_checkpoint("tiny", folder / "tiny", 1000)

        def condition(model: str, weights: str, *options: str) -> dict[str, Any]:
            command = [sys.executable, "-m", "pathlift.cli", "condition", f"{here}:{model}"]
            command += ["--weights", str(folder / weights), "--input", MODELS[model][1]]
            return measured([*command, "-o", str(folder / "out"), "--json", *options])

        rows = {"nothing (tiny model)": condition("tiny", "tiny", "--stream")}
        for criterion in args.criteria.split(","):
            options = ("--criterion", criterion)
            rows[f"streamed, {criterion}"] = condition(args.model, "weights", *options, "--stream")
            if args.in_memory:
                rows[f"in memory, {criterion}"] = condition(args.model, "weights", *options)
    print(f"{args.model}: {_LAYERS} layers of width {_WIDTH}, {sizes['tensors']} tensors")
    for key in ("checkpoint_bytes", "largest_tensor_bytes"):
        print(f"{key.removesuffix('_bytes').replace('_', ' '):<16} {sizes[key] / 1e6:10,.1f} MB")
    columns = f"{'resident MB':>12}{'anonymous MB':>14}{'reduced MB':>12}{'seconds':>9}"
    print(f"\n{'':<28}{columns}{'imbalance':>22}")
    for name, row in rows.items():
        figures = f"{row['resident'] / 1e6:>12,.0f}{row['anonymous'] / 1e6:>14,.0f}"
        out = row.pop("out")
        if row["exit_status"]:  # such as -9, where the system ran out of memory
            print(f"{name:<28}{figures}  ended with {row['exit_status']}")
            continue
        report = json.loads(out)
        figures += f"{report['reduced_bytes'] / 1e6:>12,.0f}{row['seconds']:>9.1f}"
        row["report"] = {k: v for k, v in report.items() if k != "log2_scales"}
        before, after = report["imbalance_before"], report["imbalance_after"]
        print(f"{name:<28}{figures}{before:>13.4f} -> {after:.4f}")
    if args.json:
        args.json.write_text(json.dumps({"sizes": sizes, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
