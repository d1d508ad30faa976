"""``condition_``, capture included, beside one training step of the same model, and beside peers.

    python benchmarks/conditioning.py                       # all models (half an hour on 2 cores)
    python benchmarks/conditioning.py --models resnet18,vgg16 --repeats 5 --json now.json
    python benchmarks/compare.py before.json now.json

One process per model, so that no row sees another's memory. Everything is timed ``--repeats`` times
on the initial weights, after a call that warms up; a row prints medians, the JSON file holds every
sample. All figures of a row come from one process, one after the other:

- first: the first call in the process, imports included, after the model has run once by itself.
- call: later calls, capture included, and its parts; again: ``Conditioner.condition_``, without.
- step: forward and backward at batch 32; pass1: the same at batch 1.
- group, norm, diagonal: ``rescaling_group``, ``path_norm(p=1)``, ``path_kernel_diagonal`` on one
  sample, capture included; enorm: ``condition_(criterion="weight-norm", exact=False)``.
- torch-pruning, toolkit, paper, ENorm: see ``peers.py``; "-" where there is none, with the reason
  in the JSON file.
- With ``--device cuda`` models and batches lie there, and every clock waits for it; extra MB is
  then its own allocator's. syncs: how often ``Conditioner.condition_(verify=False)`` waits for the
  device.
- With ``--cpu`` seconds are those of the process itself, for a machine that does other work; the
  call's parts are always by the clock.
- passes: evaluations of the solver over the reduced matrices.
- call MB: peak resident memory during ``condition_`` above what was resident before; extra MB: the
  same without capture and verification; norm MB, toolkit MB: during these; reduced MB: the reduced
  matrices; largest MB: the largest tensor.
- With ``--lean`` no copy of the initial weights is kept (calls after the first find little left to
  do), no gradient outlives its step, a step is four of batch 8, and nothing but ``condition_`` is
  timed: for models that fill the memory.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pathlift
import peers

PHASES = ("capture", "symmetry", "criterion", "solve", "apply", "verify")
COLUMNS = (
    "parameters",
    "first",
    "call",
    "again",
    *PHASES,
    "step",
    "pass1",
    "call/step",
    "group",
    "torch-pruning",
    "norm",
    "toolkit",
    "diagonal",
    "paper",
    "enorm",
    "ENorm",
    "passes",
    "certificate",
    "syncs",
    "call MB",
    "extra MB",
    "norm MB",
    "toolkit MB",
    "reduced MB",
    "largest MB",
)


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def torchvision_model(name: str) -> nn.Module:
    peers.prepare_torchvision()
    from torchvision.models import get_model

    return get_model(name, weights=None)


def timm_model(name: str) -> nn.Module:
    peers.prepare_torchvision()
    import timm

    return timm.create_model(name)


class LlamaBlock(nn.Module):
    """A decoder block of Llama's shape: grouped-query attention and a gated MLP."""

    def __init__(self, width: int, heads: int, groups: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q = nn.Linear(width, heads * self.size, bias=False)
        self.k = nn.Linear(width, groups * self.size, bias=False)
        self.v = nn.Linear(width, groups * self.size, bias=False)
        self.o = nn.Linear(heads * self.size, width, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        y = self.norm1(x)
        q = self.q(y).view(n, t, self.heads, self.size).transpose(1, 2)
        k = self.k(y).view(n, t, self.groups, self.size).transpose(1, 2)
        v = self.v(y).view(n, t, self.groups, self.size).transpose(1, 2)
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).reshape(n, t, -1))
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """The shape of a Llama language model with random weights."""

    def __init__(
        self, width: int, depth: int, heads: int, groups: int, hidden: int, vocabulary: int
    ):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(
            *(LlamaBlock(width, heads, groups, hidden) for _ in range(depth))
        )
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(ids))))


def tokens(batch: int) -> Tensor:
    return torch.arange(batch * 16).reshape(batch, 16) % 1000


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 224, 224)


def vectors(width: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, width)


Make = Callable[[], nn.Module]
MODELS: dict[str, tuple[Make, Callable[[int], Tensor]]] = {
    "mlp-784-500x3-10": (lambda: mlp(784, 500, 500, 500, 10), vectors(784)),
    "mlp-3072-500x8-10": (lambda: mlp(3072, *[500] * 8, 10), vectors(3072)),
    # Square networks of 1e5 to 1e9 parameters: the cost must grow as they do.
    **{
        f"mlp-{width}x8": (lambda w=width: mlp(*[w] * 9), vectors(width))
        for width in (112, 354, 1118, 3536, 11180)
    },
    **{
        name: (lambda name=name: torchvision_model(name), images)
        for name in ("resnet18", "resnet50", "resnet152", "vgg16", "densenet121", "densenet201")
    },
    "nasnetalarge": (lambda: timm_model("nasnetalarge"), images),
    "llama-0.3b": (lambda: Llama(1024, 16, 16, 4, 4096, 32000), tokens),
    "llama-1b": (lambda: Llama(2048, 16, 32, 8, 8192, 32000), tokens),
}
if "PATHCOND" in os.environ:
    MODELS["pathcond-resnet18"] = peers.paper_resnet18, lambda batch: torch.randn(batch, 3, 32, 32)


def clock() -> float:
    """Seconds: of the clock, or of this process's own work where the machine does other work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.process_time() if "--cpu" in sys.argv else time.perf_counter()


def timed(function: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` calls after one that is not counted."""
    samples = []
    for _ in range(repeats + 1):
        start = clock()
        function()
        samples.append(clock() - start)
    return samples[1:]


def _status(key: str) -> float:
    """A figure of /proc/self/status in MB (nan where there is none)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(float(x.split()[1]) / 1024 for x in lines if x.startswith(key + ":"))


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak(work: Callable[[], Any], device: str = "cpu") -> float:
    """Memory in MB that a piece of work takes at most, above what was there before.

    Of a device what its allocator hands out, of the host what is resident.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with contextlib.suppress(OSError, AttributeError):  # what glibc keeps for later is not in use
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    _forget_peak()
    resident = _status("VmRSS")
    work()
    return _status("VmHWM") - resident


def waits(work: Callable[[], Any], device: str) -> float:
    """How often the host waits for the device; nan without one."""
    if device == "cpu":
        return float("nan")
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return float(sum("synchroniz" in str(w.message) for w in noted))


def measure(name: str, repeats: int, lean: bool, device: str = "cpu") -> dict[str, Any]:
    """Samples of one model: column -> list (or one number, or why there is none)."""
    make, batch = MODELS[name]
    torch.manual_seed(0)
    model = make().to(device)
    initial = {} if lean else copy.deepcopy(model.state_dict())
    one, two, many = (batch(n).to(device) for n in (1, 2, 32))
    with torch.no_grad():
        model(two)

    def fresh() -> None:
        model.load_state_dict(initial, strict=not lean)
        gc.collect()

    fresh()
    start = clock()
    pathlift.condition_(model, two)
    found: dict[str, Any] = {"first": clock() - start, "call": [], "again": []}
    found |= {phase: [] for phase in PHASES}
    for _ in range(repeats):
        fresh()
        start = clock()
        report = pathlift.condition_(model, two)
        found["call"].append(clock() - start)
        for phase in PHASES:
            found[phase].append(report.seconds[phase])
    conditioner = pathlift.Conditioner(model, two)
    for _ in range(repeats):
        fresh()
        start = clock()
        conditioner.condition_()
        found["again"].append(clock() - start)
    # Memory: calls of their own, with nothing to compare beside them.
    unverified = partial(conditioner.condition_, verify=False)
    fresh()
    found["extra MB"] = peak(unverified, device)
    fresh()
    found["syncs"] = waits(unverified, device)
    fresh()
    found["call MB"] = peak(lambda: pathlift.condition_(model, two), device)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    found["largest MB"] = max(sizes) / 2**20
    found["reduced MB"] = report.reduced_bytes / 2**20
    found["passes"], found["certificate"] = report.passes, report.gradient_norm
    found["parameters"] = sum(p.numel() for p in model.parameters())
    del conditioner, unverified
    fresh()

    if not lean:
        _beside_peers(found, name, model, one, two, fresh, repeats)

    def step(x: Tensor) -> None:
        model(x).sum().backward()
        model.zero_grad()

    if lean:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    else:
        found["pass1"] = timed(lambda: step(one), repeats)
    model.train()
    parts = many.chunk(4 if lean else 1)
    found["step"] = timed(lambda: [step(x) for x in parts], max(1, repeats // 2))
    return found


def _beside_peers(
    found: dict[str, Any],
    name: str,
    model: nn.Module,
    one: Tensor,
    two: Tensor,
    fresh: Callable[[], None],
    repeats: int,
) -> None:
    """Group, path metrics and weight norm, and the peers' columns."""
    model.eval()  # in training mode a batch norm refuses one value per channel
    found["group"] = timed(lambda: pathlift.rescaling_group(model, one), repeats)
    found["norm"] = _if_defined(lambda: pathlift.path_norm(model, one, p=1), repeats)
    found["diagonal"] = _if_defined(lambda: pathlift.path_kernel_diagonal(model, one), repeats)
    for peer, prepare in peers.PEERS.items():
        work = prepare(name, model, one)
        found[peer] = work if isinstance(work, str) else _if_defined(work, repeats)
        if peer == "toolkit" and isinstance(found["norm"], list):
            found["norm MB"] = peak(lambda: pathlift.path_norm(model, one, p=1))
            if isinstance(found[peer], list):
                found["toolkit MB"] = peak(work)
    if not isinstance(found["ENorm"], str):
        samples = []
        for _ in range(repeats):
            fresh()
            start = clock()
            pathlift.condition_(model, two, criterion="weight-norm", exact=False)
            samples.append(clock() - start)
        found["enorm"] = samples


def _if_defined(work: Callable[[], Any], repeats: int) -> list[float] | str:
    """Samples, or why there are none."""
    try:
        return timed(work, repeats)
    except Exception as error:  # a peer's, of any kind, or an operation without paths
        return f"{type(error).__name__}: {error}"


def middle(samples: Any) -> float:
    """The median; nan where there is none."""
    if isinstance(samples, list):
        return statistics.median(samples)
    return float(samples) if isinstance(samples, (int, float)) else float("nan")


def row(found: dict[str, Any]) -> dict[str, float]:
    """Medians, and the call in training steps."""
    values = {key: middle(v) for key, v in found.items()}
    values["call/step"] = values["call"] / values["step"]
    return {key: values.get(key, float("nan")) for key in COLUMNS}


def named(device: str) -> str:
    return device if device == "cpu" else torch.cuda.get_device_name(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--cpu", action="store_true", help="count the process's own seconds")
    parser.add_argument("--lean", action="store_true", help="for models that fill the memory")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.repeats, args.lean, args.device)))
        return
    rows: dict[str, Any] = {}
    for name in args.models.split(","):
        command = [sys.executable, "-W", "ignore", __file__, "--one", name]
        command += ["--repeats", str(args.repeats), "--device", args.device]
        command += ["--cpu"] if args.cpu else []
        command += ["--lean"] if args.lean else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name:<18} failed: {done.stderr.strip().splitlines()[-1:]}", flush=True)
            continue
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        if len(rows) == 1:
            print(" ".join([f"{'model':<18}", *(f"{k:>13}" for k in COLUMNS)]))
        cells = ("-".rjust(13) if v != v else f"{v:>13.3g}" for v in row(rows[name]).values())
        print(" ".join([f"{name:<18}", *cells]), flush=True)
        if args.json:
            about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
            about["device"] = named(args.device)
            about["clock"] = "process" if args.cpu else "wall"
            args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
