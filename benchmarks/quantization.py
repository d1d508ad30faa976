"""Quantisation after equalization: this library beside Brevitas and AIMET.

    python benchmarks/quantization.py                        # all networks, 5 seeds
    python benchmarks/quantization.py --networks resnet18 --seeds 1 --json /tmp/now.json
    python benchmarks/quantization.py --resume               # what the file lacks
    python benchmarks/quantization.py --page                 # only write the tables from the file
    python benchmarks/quantization.py --figure               # only draw the page's figure

Trained networks are measured by benchmarks/quantization_trained.py, into the same file.

Brevitas and AIMET are no part of the package. They are compared where they can be imported, in an
environment of their own: `pip install brevitas aimet-torch`.

Every network has heavy-tailed weights (Student's t with 6 degrees of freedom, at the standard
deviation of its own initialisation), batch norms with gamma = exp(0.3 n), beta = 0.3 n, mean 0.1 n
and variance exp(0.5 n). The result of each tool is rounded by one and the same function
(`pathlift.quantization.quantised`) and SQNR is measured on other inputs than the example's.
Layers' inputs are quantised per tensor over their range on the example. Seconds are CPU seconds of
the tool's call in this process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quantization_tools as compared
import quantization_trained as trained
from pathlift.quantization import equalize_, quantised
from pathlift.quantization.layers import weights
from peers import prepare_torchvision

ROOT = Path(__file__).parents[1]
JSON = ROOT / "docs" / "quantization.json"
FIGURE = ROOT / "docs" / "figures" / "quantization.png"
PAGE = ROOT / "docs" / "quantization.md"
SIZE, EXAMPLES, TESTED = 64, 4, 16
# Name of a network -> (its name in torchvision, whether ReLU6 becomes ReLU before anything else).
NETWORKS = {
    "resnet18": ("resnet18", False),
    "resnet34": ("resnet34", False),
    "mobilenet_v2": ("mobilenet_v2", False),
    "mobilenet_v2, ReLU": ("mobilenet_v2", True),
    "mobilenet_v3_small": ("mobilenet_v3_small", False),
    "mnasnet0_5": ("mnasnet0_5", False),
    "mnasnet1_0": ("mnasnet1_0", False),
    "squeezenet1_0": ("squeezenet1_0", False),
    "squeezenet1_1": ("squeezenet1_1", False),
    "shufflenet_v2_x0_5": ("shufflenet_v2_x0_5", False),
    "shufflenet_v2_x1_0": ("shufflenet_v2_x1_0", False),
    "regnet_y_400mf": ("regnet_y_400mf", False),
    "densenet121": ("densenet121", False),
}
# Columns: format and target, whether layers' inputs are quantised, and the options of equalize_.
SETTINGS: dict[str, tuple[str, str, bool]] = {
    "int8 weights": ("int8", "tensor", False),
    "int8 weights and activations": ("int8", "tensor", True),
    "int4 weights": ("int4", "tensor", False),
    "int4 weights per channel": ("int4", "channel", False),
}
MARK = "<!-- benchmarks/quantization.py: begin -->", "<!-- benchmarks/quantization.py: end -->"


def network(name: str, seed: int) -> nn.Module:
    """A network of torchvision with heavy-tailed weights and used batch norms."""
    prepare_torchvision()
    import torchvision

    kind, without_relu6 = NETWORKS[name]
    torch.manual_seed(seed)
    model: nn.Module = getattr(torchvision.models, kind)(weights=None)
    tails = torch.distributions.StudentT(6.0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                drawn = tails.sample(module.weight.shape)
                module.weight.copy_(drawn * (module.weight.std() / drawn.std()))
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                n = module.num_features
                module.weight.copy_(torch.exp(0.3 * torch.randn(n)))
                module.bias.copy_(0.3 * torch.randn(n))
                module.running_mean.copy_(0.1 * torch.randn(n))
                module.running_var.copy_(torch.exp(0.5 * torch.randn(n)))
    if without_relu6:
        for module in list(model.modules()):
            for child, inner in module.named_children():
                if isinstance(inner, nn.ReLU6):
                    setattr(module, child, nn.ReLU())
    return model.eval()


def sqnr(exact: Tensor, found: Tensor) -> float:
    """``10 log10(sum of squares / sum of squared errors)``, in dB."""
    error = float((exact - found).double().square().sum())
    power = float(exact.double().square().sum())
    return (
        float(10 * torch.log10(torch.tensor(power / error, dtype=torch.float64)))
        if error
        else 999.0
    )


@contextmanager
def rounded_inputs(model: nn.Module, calibration: Tensor) -> Iterator[None]:
    """Inputs of linear layers and convolutions in int8, per tensor, over their calibrated range."""
    layers = [m for _, m, _ in weights(model) if isinstance(m, (nn.Conv2d, nn.Linear))]
    ranges: dict[nn.Module, tuple[float, float]] = {}

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        low, high = ranges.get(module, (0.0, 0.0))
        ranges[module] = min(low, float(args[0].min())), max(high, float(args[0].max()))

    def rounded(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        low, high = ranges[module]
        step = max((high - low) / 255, 1e-30)
        zero = round(-low / step)
        return ((((args[0] / step).round() + zero).clamp(0, 255) - zero) * step,)

    hooks = [m.register_forward_pre_hook(look) for m in layers]
    model(calibration)
    for hook in hooks:
        hook.remove()
    hooks = [m.register_forward_pre_hook(rounded) for m in layers]
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def measured(model: nn.Module, exact: Tensor, x: Tensor, y: Tensor, setting: str) -> float:
    """SQNR of one tool's result in one setting."""
    format, per, activations = SETTINGS[setting]
    made = quantised(model, format, per)
    if not activations:
        return sqnr(exact, made(y))
    with rounded_inputs(made, x):
        return sqnr(exact, made(y))


def result(tool: compared.Tool, model: nn.Module, x: Tensor) -> tuple[nn.Module, float]:
    """A tool's result and its CPU seconds."""
    start = time.process_time()
    made = tool(model, x)
    return made, time.process_time() - start


def row(name: str, seed: int, others: dict[str, compared.Tool]) -> dict[str, Any]:
    """All figures of one network and seed."""
    model = network(name, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(EXAMPLES, 3, SIZE, SIZE, generator=generator)
    y = torch.randn(TESTED, 3, SIZE, SIZE, generator=generator)
    with torch.no_grad():
        exact = model(y)
    found: dict[str, Any] = {"network": name, "seed": seed, "sqnr": {}, "seconds": {}, "change": {}}

    def note(label: str, made: nn.Module, settings: list[str]) -> None:
        for setting in settings:
            value = round(measured(made, exact, x, y, setting), 2)
            found["sqnr"].setdefault(setting, {})[label] = value

    for label, tool in {"before": compared.folded, **others}.items():
        try:
            made, seconds = result(tool, model, x)
        except Exception as error:  # a tool that can't take the network
            found["sqnr"].setdefault("failed", {})[label] = f"{type(error).__name__}"
            continue
        note(label, made, list(SETTINGS))
        found["seconds"][label] = round(seconds, 2)
        with torch.no_grad():
            found["change"][label] = float((made(y) - exact).abs().max() / exact.abs().max())
    for setting, (format, per, activations) in SETTINGS.items():
        make = compared.here_with_activations if activations else compared.here
        first = setting == "int8 weights"
        # There is nothing more to search with many steps and weights alone.
        for label in ("here",) if first else ("here", "here, thorough"):
            tool = make(format=format, per=per, thorough=label != "here")
            made, seconds = result(tool, model, x)
            note(label, made, [setting])
            found["seconds"][label if first else f"{label}: {setting}"] = round(seconds, 2)
            if first:
                with torch.no_grad():
                    change = (made(y) - exact).abs().max() / exact.abs().max()
                found["change"]["here"] = float(change)
        if NETWORKS[name] == ("mobilenet_v2", False):
            free, _ = result(make(format=format, per=per, relu6="per-channel"), model, x)
            note("here, ReLU6 per channel", free, [setting])
    return found


def table(rows: list[dict[str, Any]], setting: str) -> list[str]:
    """A markdown table: means over seeds, the best of every row in bold."""
    names = list(dict.fromkeys(r["network"] for r in rows))
    labels = list(dict.fromkeys(k for r in rows for k in r["sqnr"][setting]))
    lines = [f"| network | {' | '.join(labels)} |", f"|{' --- |' * (len(labels) + 1)}"]
    for name in names:
        mine = [r["sqnr"][setting] for r in rows if r["network"] == name]
        means = {
            k: statistics.mean(m[k] for m in mine) for k in labels if all(k in m for m in mine)
        }
        best = max(means.values())
        cells = [
            "-"
            if k not in means
            else f"**{means[k]:.1f}**"
            if means[k] == best
            else f"{means[k]:.1f}"
            for k in labels
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def seconds_of(rows: list[dict[str, Any]], own: bool) -> list[dict[str, Any]]:
    """The rows with the seconds of the calls here by setting (``own``), or of one call per tool."""

    def label(key: str) -> str:
        return key.removeprefix("here: ").removeprefix("here, ") if own else key

    return [
        {**r, "seconds": {label(k): v for k, v in r["seconds"].items() if (":" in k) == own}}
        for r in rows
    ]


def other_table(rows: list[dict[str, Any]], key: str, shape: str) -> list[str]:
    """Seconds (medians) or changes (largest) by network and tool."""
    names = list(dict.fromkeys(r["network"] for r in rows))
    labels = list(dict.fromkeys(k for r in rows for k in r[key]))
    lines = [f"| network | {' | '.join(labels)} |", f"|{' --- |' * (len(labels) + 1)}"]
    for name in names:
        mine = [r[key] for r in rows if r["network"] == name]
        cells = []
        for label in labels:
            values = [m[label] for m in mine if label in m]
            one = statistics.median if key == "seconds" else max
            cells.append(format(one(values), shape) if values else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def page(data: dict[str, Any]) -> str:
    """The part of the page that is measured."""
    rows = data["rows"]
    counts = Counter(r["network"] for r in rows).values()
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    used = ", ".join(f"{k} {v}" for k, v in data["versions"].items())
    lines = [
        f"Means over {seeds} seeds; SQNR of outputs in dB, the best of a row in bold ({used}).",
        "",
    ]
    for setting in SETTINGS:
        lines += [f"### {setting[0].upper()}{setting[1:]}", "", *table(rows, setting), ""]
    lines += ["### Seconds", ""]
    lines += ["CPU seconds of one call, medians over the seeds, all in one run.", ""]
    # The other tools' call is the same whatever is rounded to what.
    lines += [*other_table(seconds_of(rows, own=False), "seconds", ".2f"), ""]
    lines += ["The calls here, by what is rounded to what:", ""]
    lines += [*other_table(seconds_of(rows, own=True), "seconds", ".2f"), ""]
    lines += ["### Change of the function", ""]
    lines += [
        "Largest change of an output over the largest output, before anything is rounded.",
        "",
    ]
    lines += [*other_table(rows, "change", ".0e"), ""]
    if data.get("trained"):
        lines += ["### Trained networks", "", *trained.table(data["trained"]), ""]
    return "\n".join(lines)


def write_page(data: dict[str, Any]) -> None:
    """Put the tables between the page's marks."""
    text = PAGE.read_text(encoding="utf-8")
    start, end = text.index(MARK[0]) + len(MARK[0]), text.index(MARK[1])
    PAGE.write_text(f"{text[:start]}\n\n{page(data)}\n{text[end:]}", encoding="utf-8")


def draw() -> None:
    """Ranges of resnet18 before and after."""
    model = network("resnet18", 0)
    x = torch.randn(EXAMPLES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1000))
    equalize_(model, x).plot().savefig(FIGURE, dpi=100)


def main() -> None:
    """Run, write after every network, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=";".join(NETWORKS), help="separated by ;")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--from-seed", type=int, default=0, help="the first one (default 0)")
    parser.add_argument("--resume", action="store_true", help="keep the file's rows, add others")
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument("--page", action="store_true", help="only write the page's tables")
    parser.add_argument("--figure", action="store_true", help="only draw the figure")
    args = parser.parse_args()
    if args.figure:
        draw()
        return
    if args.page:
        write_page(json.loads(args.json.read_text()))
        return
    torch.set_num_threads(1)
    data: dict[str, Any]
    others = compared.tools()
    versions = {"torch": torch.__version__, **compared.versions()}
    known = json.loads(args.json.read_text()) if args.json.exists() else {}
    rows = known.get("rows", []) if args.resume else []
    data = {"versions": versions, "rows": rows, "trained": known.get("trained", [])}
    done = {(r["network"], r["seed"]) for r in rows}
    # Seed by seed, so that a run that is cut short has every network.
    for seed in range(args.from_seed, args.seeds):
        for name in args.networks.split(";"):
            if (name, seed) in done:
                continue
            data["rows"].append(row(name, seed, others))
            print(name, seed, json.dumps(data["rows"][-1]["sqnr"]["int8 weights"]), flush=True)
            args.json.write_text(json.dumps(data, indent=1) + "\n")
    if args.json == JSON:
        write_page(data)


if __name__ == "__main__":
    main()
