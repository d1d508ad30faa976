"""``pathlift reproduce NAME``: the paper's experiments, in full or small on embedded data.

Every experiment writes its figures (PNG and SVG), its table (CSV and Markdown) and the command that
made them. A folder of several is summed up by a ``README.md``.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from pathlift.errors import ArgumentError
from pathlift.experiments import exactness, when
from pathlift.experiments.gauges import cost, scales
from pathlift.experiments.store import Store
from pathlift.experiments.study import (
    Experiment,
    Progress,
    Result,
    Run,
    Study,
    Table,
    finished,
    run_study,
)
from pathlift.experiments.summary import Target
from pathlift.experiments.sweep import add_place_arguments, place_of


def _two_moons(small: bool) -> dict[str, Study]:
    exponents = range(-6, 1) if small else range(-8, 1)
    settings = {
        "methods": ("baseline", "path", "enorm"),
        "data": ("two-moons",),
        "optimizers": ("sgd",),
        "rates": [float(f"{10 ** (k / 2):.1g}") for k in exponents],
        "seeds": range(10 if small else 30),
        "epochs": 30 if small else 300,
        "batch": 32,
        "initialization": "kaiming-normal",
    }
    family = {float(w): "mlp:" + "-".join([str(w)] * 5) for w in (2, 4, 8, 16, 32)}
    target = Target("accuracy", 0.99)
    return {"": Study("width of the 5 hidden layers", family, settings, target, 8.0, True)}


def _fully_connected(small: bool) -> dict[str, Study]:
    width = 32 if small else 500
    settings = {
        "methods": ("baseline", "path", "enorm"),
        "data": ("digits" if small else "cifar10",),
        "optimizers": ("sgd",),
        "rates": (0.01, 0.03, 0.1, 0.3) if small else (1e-3,),
        "seeds": range(5 if small else 3),
        "epochs": 40 if small else 100,
        "norm": True,
    }
    family = {float(d): "mlp:" + "-".join([str(width)] * d) for d in range(3, 9)}
    target = Target("accuracy", 0.99)
    return {"": Study("hidden layers", family, settings, target, 5.0)}


def _fully_convolutional(small: bool) -> dict[str, Study]:
    settings = {
        "methods": ("baseline", "path", "enorm"),
        "data": ("digits" if small else "cifar10",),
        "optimizers": ("sgd",),
        "rates": (0.01, 0.03, 0.1, 0.3) if small else (1e-3, 1e-2, 1e-1),
        "seeds": range(5 if small else 3),
        "epochs": 20 if small else 128,
        "initialization": "kaiming-normal",
    }
    family = {4.0: "convolutional:4", 8.0: "convolutional:8"} if small else {}
    family = family or {128.0: "convolutional:128"}
    return {"": Study("channels", family, settings, None, max(family))}


def _resnet(small: bool) -> dict[str, Study]:
    settings = {
        "methods": ("baseline", "path", "enorm"),
        "data": ("digits" if small else "cifar10",),
        "optimizers": ("sgd",),
        "rates": (0.01, 0.03, 0.1, 0.3, 1.0) if small else (1e-3, 1e-2, 1e-1),
        "seeds": range(3),
        "epochs": 8 if small else 128,
    }
    width = 6 if small else 64
    return {"": Study("channels", {float(width): f"resnet18:{width}"}, settings, None, width)}


def _autoencoder(small: bool) -> dict[str, Study]:
    shared = {"methods": ("baseline", "path", "enorm"), "optimizers": ("sgd",)}
    if small:
        growing = {
            "data": ("digits",),
            "rates": (0.3, 1.0, 3.0),
            "seeds": range(5),
            "epochs": 40,
        }
        family = {64.0 / c: f"autoencoder:128-32-{c}" for c in (32, 16, 8, 4, 2)}
    else:
        growing = {
            "data": ("mnist",),
            "rates": (0.1, 1.0),
            "seeds": range(5),
            "epochs": 50,
        }
        family = {784.0 / c: f"autoencoder:512-128-{c}" for c in (98, 49, 28, 14, 7, 4)}
    claim = {"seeds": range(20), "epochs": 60, "held_out": False}
    as_one = {"data": ("digits",), "rates": (0.1, 0.3, 1.0, 3.0, 10.0)}
    by_pixel = {"data": ("digits-pixelwise",), "rates": (0.1, 0.3, 1.0, 2.0, 3.0, 10.0)}
    return {
        "": Study("compression factor", family, {**shared, **growing}, None, max(family), True),
        **{
            suffix: Study(
                "compression factor",
                {8.0: "autoencoder:128-32-8"},
                {**shared, **claim, **source},
                target,
                8.0,
            )
            for suffix, source, target in (
                ("-20-seeds", as_one, Target("loss", 0.4)),
                ("-20-seeds-pixelwise", by_pixel, Target("loss", 0.25)),
            )
        },
    }


def _studies(name: str, small: bool, run: Run) -> dict[str, Study]:
    """An experiment's studies: whole, or as far as they have come."""
    found = EXPERIMENTS[name].studies(small)
    return finished(found, run.store().keys()) if run.finished else found


def _exact(name: str, small: bool, run: Run) -> Result:
    """Train and compare; decide between continuous scales and powers of two."""
    return exactness.experiment(name, _studies(name, small, run), run)


def _when(name: str, small: bool, run: Run) -> Result:
    """Gather what every setting gained."""
    return when.experiment(name, _studies(name, small, run), run)


def _train(name: str, small: bool, run: Run) -> Result:
    """Train every study of an experiment."""
    parts = [
        run_study(name + suffix, study, run) for suffix, study in _studies(name, small, run).items()
    ]
    return Result(
        [f for p in parts for f in p.figures],
        [t for p in parts for t in p.tables],
        [s for p in parts for s in p.findings],
    )


EXPERIMENTS: dict[str, Experiment] = {
    "two-moons": Experiment(
        "Two moons: MLPs of growing width",
        "Five hidden layers of 2 to 32 units, Kaiming-normal initialisation, SGD, batch 32; epochs "
        "to 99% training accuracy. Small: "
        "30 epochs, 10 seeds, rates 1e-3 to 1; full: 300 epochs, 30 seeds, rates 1e-4 to 1.",
        _train,
        _two_moons,
    ),
    "fully-connected": Experiment(
        "Fully connected networks with batch norm",
        "3 to 8 hidden layers, batch norm, SGD, batch 128; epochs to 99% training accuracy. Full: "
        "CIFAR-10, width 500, rate 1e-3, 100 epochs, 3 seeds. Small: digits, width 32, four rates, "
        "40 epochs, 5 seeds.",
        _train,
        _fully_connected,
    ),
    "fully-convolutional": Experiment(
        "A fully convolutional network",
        "3 layers of w channels, 3 of 2w, two of 5w/2 and the classes (Gitman and Ginsburg), SGD, "
        "batch 128, Kaiming-normal initialisation, without batch norm. Full: CIFAR-10, w = 128, "
        "128 epochs, 3 seeds. Small: digits as 8x8 images, w = 4 and 8, 20 epochs, 5 seeds.",
        _train,
        _fully_convolutional,
    ),
    "resnet": Experiment(
        "ResNet-18 with 1x1 shortcuts",
        "SGD, batch 128, 3 seeds. Full: CIFAR-10, 64 channels, 128 epochs. Small: digits as 8x8 "
        "images, 6 channels, 8 epochs.",
        _train,
        _resnet,
    ),
    "autoencoder": Experiment(
        "Autoencoders of growing compression",
        "SGD, batch 128, PyTorch's initialisation. Full: MNIST, 784-512-128-c, two rates. Small: "
        "digits, 64-128-32-c, three rates, 40 epochs, 5 seeds. "
        "In both, the digits autoencoder with a code of 8 "
        "is also trained for 60 epochs on all samples at rates 0.1 to 10 with 20 seeds, with all "
        "pixels scaled by one number (as everywhere else) and with each scaled by its own.",
        _train,
        _autoencoder,
    ),
    "exact": Experiment(
        "Continuous scales or powers of two",
        "Networks with a bottleneck, SGD and Adam, batch 128, PyTorch's initialisation; rates a "
        "factor 1.5 apart. Digits: 64-128-32-8-32-128-64 (pixels scaled one by one), 40 epochs, "
        "and 64-256-16-256-10, 20 epochs; 20 seeds. Full: also MNIST's first 12,000 images, "
        "784-256-64-16-64-256-784 and 784-256-16-256-10, 5 epochs, 5 seeds. The table says how "
        "many seeds there are so far.",
        _exact,
        exactness.studies,
    ),
    "when": Experiment(
        "When it helps",
        "The runs of the decision above, and contrasts on digits with 5 seeds: equal widths, "
        "a wide middle, batch norms, a code of 2, a fully convolutional network, AdamW; and a "
        "transformer on Python's manual, character by character (240 steps of 16 pieces). Gains "
        "are shares of the baseline's final loss (positive: lower loss), with 95% intervals over "
        "paired seeds. The table is also in when.json.",
        _when,
        when.studies,
    ),
    "scales": Experiment(
        "Size of the rescaling at initialisation",
        "Networks n-n-(rn)-n-10 with PyTorch's initialisation: root mean square of the log2 scales "
        "against r, and against a factor on all initial weights (r = 1). Full: n = 512, 10 "
        "samples; small: n = 64, 3 samples.",
        scales,
    ),
    "cost": Experiment(
        "Cost of conditioning",
        "Seconds of conditioning a network, with each solver, and of one training epoch of 50,000 "
        "samples in batches of 128 (from the time of a few steps).",
        cost,
    ),
}


def add_arguments(parser: Any) -> None:
    """The options of ``pathlift reproduce``."""
    add = parser.add_argument
    add("name", choices=[*EXPERIMENTS, "all"])
    add("--small", action="store_true", help="on embedded data, in minutes on one core")
    add("--finished", action="store_true", help="train nothing: the seeds that are there")
    add("-o", "--output", type=Path, default=Path("docs/reproduced"))
    add_place_arguments(parser)


def main(args: Any, progress: Progress) -> dict[str, Any]:
    """The command."""
    if args.processes < 1:
        raise ArgumentError(f"--processes must be at least 1; found {args.processes}.")
    args.output.mkdir(parents=True, exist_ok=True)
    run = Run(args.output, place_of(args), args.processes, args.dask, progress, args.finished)
    names = list(EXPERIMENTS) if args.name == "all" else [args.name]
    for name in names:
        progress(f"{name}{' (small)' if args.small else ''}")
        write(name, args.small, run)
    index = write_index(args.output)
    return {
        "data": {"index": str(index), "experiments": names},
        "text": f"Results of {', '.join(names)} are in {index}",
    }


def write(name: str, small: bool, run: Run) -> Result:
    """Run an experiment; write its figures, ``NAME.csv``, ``NAME.md`` and its cells, packed."""
    experiment = EXPERIMENTS[name]
    result = experiment.run(name, small, run)
    _pack({c.key for s in _studies(name, small, run).values() for c in s.cells()}, name, run)
    for k, table in enumerate(result.tables):
        path = run.output / f"{name}{'' if k == 0 else f'-{k + 1}'}.csv"
        path.write_text(_csv(table), encoding="utf-8", newline="")
    command = f"pathlift reproduce {name}{' --small' if small else ''}"
    if run.finished:
        command += " --finished"
    if run.place.device != "cpu":
        command += f" --device {run.place.device}"
    parts = [f"## {experiment.title}", experiment.about, f"    {command}"]
    parts += [f"![{caption}]({file}.png)\n\n{caption}" for file, caption in result.figures]
    parts += [_markdown(table) for table in result.tables]
    parts.append("What the numbers say:")
    parts.append("\n".join(f"- {sentence}" for sentence in result.findings))
    (run.output / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return result


def _pack(keys: set[str], name: str, run: Run) -> None:
    """Keep an experiment's cells in one file, but for those that another one's file holds."""
    path = run.output / f"{name}.cells.parquet"
    store = run.store()
    others = Store(store.folder, [p for p in store.packs if p != path]).packed()
    if keys - others:
        store.pack(keys - others, path)


DISCUSSION = "discussion.md"  # written by people; kept


def write_index(output: Path) -> Path:
    """``README.md`` of every experiment that has been run, after the discussion if there is one."""
    parts = ["# Reproduced experiments", _PREFACE.strip()]
    discussion = output / DISCUSSION
    if discussion.is_file():
        parts.append(discussion.read_text(encoding="utf-8").strip())
    parts += [
        (output / f"{name}.md").read_text(encoding="utf-8").strip()
        for name in EXPERIMENTS
        if (output / f"{name}.md").is_file()
    ]
    path = output / "README.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


_PREFACE = """
All of this page but its discussion is written by `pathlift reproduce all --small`, or by the
command under each heading. *Imbalance*: log(arithmetic mean / geometric mean) of the path kernel's
diagonal per parameter, at the first step. *Best rate*: lowest mean final loss over seeds; an
asterisk: at the edge of the grid. *Epochs* (median over seeds) and *seconds* (one run alone, all
conditioning included) to the target at the rate that gets there first. *Fewer epochs*, *less time*:
the baseline's over the method's, above 1 is better. Brackets: 95% bootstrap intervals over paired
seeds, best rates chosen anew in every draw. A default target is the loss that the baseline reaches
half-way.
"""


def _csv(table: Table) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([table.head, *table.lines])
    return buffer.getvalue()


def _markdown(table: Table) -> str:
    lines = [table.head, ["---"] * len(table.head), *table.lines]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    if table.title:
        text = f"<details><summary>{table.title}</summary>\n\n{text}\n\n</details>"
    return text
