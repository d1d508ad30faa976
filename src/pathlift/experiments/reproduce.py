"""``pathlift reproduce NAME``: the paper's experiments, in full or small on embedded data.

Every experiment writes its figures (PNG and SVG), its table (CSV and Markdown) and the command that
made them. A folder of several is summed up by a ``README.md``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pathlift.errors import ArgumentError
from pathlift.experiments import catalogue, exactness, left_out, when
from pathlift.experiments.gauges import cost, scales
from pathlift.experiments.store import Store
from pathlift.experiments.study import (
    CELLS,
    Experiment,
    Progress,
    Result,
    Run,
    Study,
    Table,
    finished,
    interleaved,
    run_study,
    train_cells,
)
from pathlift.experiments.sweep import add_place_arguments, place_of


def _studies(name: str, small: bool, run: Run) -> dict[str, Study]:
    """An experiment's studies: whole, or as far as they have come."""
    found = EXPERIMENTS[name].studies(small)
    return finished(found, run.store().keys()) if run.finished else found


def _whole(
    experiment: Callable[[str, dict[str, Study], Run], Result],
) -> Callable[[str, bool, Run], Result]:
    """An experiment that makes one result of all of its studies."""
    return lambda name, small, run: experiment(name, _studies(name, small, run), run)


def _train(name: str, small: bool, run: Run) -> Result:
    """Train every study of an experiment."""
    parts = [
        run_study(stem_of(name, small) + suffix, study, run)
        for suffix, study in _studies(name, small, run).items()
    ]
    return Result(
        [f for p in parts for f in p.figures],
        [t for p in parts for t in p.tables],
        [s for p in parts for s in p.findings],
    )


def _told(title: str, about: str, studies: Callable[[bool], dict[str, Study]]) -> Experiment:
    """A set of settings whose verdicts are written down before anything is trained."""
    return Experiment(title, about, _whole(left_out.experiment), studies, before=left_out.foretold)


EXPERIMENTS: dict[str, Experiment] = {
    "two-moons": Experiment(
        "Two moons: MLPs of growing width",
        "Five hidden layers of 2 to 32 units, Kaiming-normal initialisation, SGD, batch 32; epochs "
        "to 99% training accuracy. Small: "
        "30 epochs, 10 seeds, rates 1e-3 to 1; full: 300 epochs, 30 seeds, rates 1e-4 to 1.",
        _train,
        catalogue.two_moons,
        "-full",
    ),
    "fully-connected": Experiment(
        "Fully connected networks",
        "3 to 8 hidden layers, SGD, batch 128; epochs to 99% training accuracy, 5 seeds. Full: "
        "CIFAR-10 (JPEG), width 500, with batch norm (PyTorch's initialisation) and without "
        "(Kaiming-normal), five rates, 30 epochs. Small: digits, width 32, batch norm, four rates, "
        "40 epochs.",
        _train,
        catalogue.fully_connected,
        "-full",
    ),
    "fully-convolutional": Experiment(
        "A fully convolutional network",
        "3 layers of w channels, 3 of 2w, two of 5w/2 and the classes (Gitman and Ginsburg), SGD, "
        "batch 128, Kaiming-normal initialisation, without batch norm, 5 seeds. Full: CIFAR-10 "
        "(JPEG), w = 32 (the paper's has 128), 5 epochs. Small: digits as 8x8 images, w = 4 and 8, "
        "20 epochs.",
        _train,
        catalogue.fully_convolutional,
        "-full",
    ),
    "resnet": Experiment(
        "ResNet-18 with 1x1 shortcuts",
        "SGD, batch 128. Full: CIFAR-10 (JPEG), 16 channels (the paper's has 64), 5 epochs, 5 "
        "seeds. Small: digits as 8x8 images, 6 channels, 8 epochs, 3 seeds.",
        _train,
        catalogue.resnet,
        "-full",
    ),
    "autoencoder": Experiment(
        "Autoencoders of growing compression",
        "SGD, batch 128, PyTorch's initialisation, 5 seeds. Full: MNIST and Fashion-MNIST, "
        "784-256-64-c, nine rates a factor 2 apart, 20 epochs. Small: digits, 64-128-32-c, three "
        "rates, 40 epochs; also the autoencoder with a code of 8 for 60 epochs on all samples at "
        "rates 0.1 to 10 with 20 seeds, with all pixels scaled by one number (as everywhere else) "
        "and with each scaled by its own.",
        _train,
        catalogue.autoencoder,
        "-full",
    ),
    "optimizers": Experiment(
        "AdamW and Muon",
        "Autoencoders, batch 128, PyTorch's initialisation, seven rates a factor 2 apart, 5 seeds. "
        "Their steps don't grow with the gradient, so beside the path kernel stand first powers "
        "in place of squares (AdamW) and equal spectral norms of the layers (Muon; biases by Adam "
        "at the same rate). Full: MNIST, 784-256-64-16, 10 epochs. Small: digits (pixels scaled "
        "one by one), 64-128-32-8, 40 epochs.",
        _train,
        catalogue.optimizers,
        "-full",
    ),
    "exact": Experiment(
        "Continuous scales or powers of two",
        "Networks with a bottleneck, SGD and Adam, batch 128, PyTorch's initialisation; rates a "
        "factor 1.5 apart. Digits: 64-128-32-8-32-128-64 (pixels scaled one by one), 40 epochs, "
        "and 64-256-16-256-10, 20 epochs; 20 seeds. Full: also MNIST's first 12,000 images, "
        "784-256-64-16-64-256-784 and 784-256-16-256-10, 5 epochs, 5 seeds. The table says how "
        "many seeds there are so far.",
        _whole(exactness.experiment),
        exactness.studies,
    ),
    "when": Experiment(
        "When it helps",
        "The runs of the decision above, and contrasts on digits with 5 seeds: equal widths, "
        "a wide middle, batch norms, a code of 2, a fully convolutional network, AdamW, Muon; a "
        "transformer on Python's manual, character by character (240 steps of 16 pieces); and the "
        "full-size runs and optimisers above. Gains are shares of the baseline's final loss "
        "(positive: lower loss), with 95% intervals over paired seeds. The table is also in "
        "when.json.",
        _whole(when.experiment),
        when.studies,
    ),
    "left-out": _told(
        "What advise said before",
        "Networks, data and optimisers that no run behind the rule had together: what the rule of "
        "advise says of each is written to left-out-verdicts.json before anything is trained. "
        "MNIST and Fashion-MNIST's first 12,000 images, CIFAR-10's (JPEG) first 6,000, 5 epochs; "
        "digits, 20 epochs; Python's manual, 240 steps of 16 pieces; rates a factor 2 apart, 5 "
        "seeds. Gains are shares of the baseline's final training loss (positive: lower loss), "
        "each method at its own best rate, with 95% intervals over paired seeds; outputs / layer: "
        "outputs over the narrowest layer. Small: digits and the manual.",
        left_out.studies,
    ),
    "left-out-again": _told(
        "What advise said before, once more",
        "The settings above changed the rule; these were told by the changed rule, in the same "
        "file and likewise before anything was trained. MNIST and Fashion-MNIST's first 12,000 "
        "images, CIFAR-10's (JPEG) first 6,000, 5 epochs; digits, 20 epochs; rates a factor 2 "
        "apart, 5 seeds. Small: digits.",
        left_out.studies_again,
    ),
    "left-out-third": _told(
        "What advise said before, a third time",
        "Both sets above changed the rule; these were told by what it is now, in the same file and "
        "likewise before anything was trained. A completion predicts an image's lower half from "
        "its upper one. MNIST and Fashion-MNIST's first 12,000 images, CIFAR-10's (JPEG) first "
        "6,000, 5 epochs; patches of photographs, 20 epochs; rates a factor 2 apart, 5 seeds. "
        "Small: the photographs.",
        left_out.studies_third,
    ),
    "left-out-fourth": _told(
        "What advise said before, a fourth time",
        "The three sets above changed the rule; these were told by what it is now, in the same "
        "file and likewise before anything was trained. MNIST and Fashion-MNIST's first 12,000 "
        "images, 5 epochs; digits, 20 epochs; rates a factor 2 apart, 5 seeds. Small: digits.",
        left_out.studies_fourth,
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


_NAMES = f"of {', '.join(EXPERIMENTS)}; or all"


def add_arguments(parser: Any) -> None:
    """The options of ``pathlift reproduce``."""
    add = parser.add_argument
    add("names", nargs="+", choices=[*EXPERIMENTS, "all"], metavar="NAME", help=_NAMES)
    add("--small", action="store_true", help="on embedded data, in minutes on one core")
    write_or_train = parser.add_mutually_exclusive_group()
    only = write_or_train.add_argument
    only("--finished", action="store_true", help="train nothing: the seeds that are there")
    only("--train", action="store_true", help="train in one queue; write nothing but the cells")
    add("-o", "--output", type=Path, default=Path("docs/reproduced"))
    add_place_arguments(parser)


def main(args: Any, progress: Progress) -> dict[str, Any]:
    """The command."""
    if args.processes < 1:
        raise ArgumentError(f"--processes must be at least 1; found {args.processes}.")
    args.output.mkdir(parents=True, exist_ok=True)
    run = Run(args.output, place_of(args), args.processes, args.dask, progress, args.finished)
    names = list(EXPERIMENTS) if "all" in args.names else list(dict.fromkeys(args.names))
    if args.train:
        return _train_only(names, args.small, run)
    for name in names:
        progress(f"{name}{' (small)' if args.small else ''}")
        write(name, args.small, run)
    index = write_index(args.output)
    return {
        "data": {"index": str(index), "experiments": names},
        "text": f"Results of {', '.join(names)} are in {index}",
    }


def _train_only(names: list[str], small: bool, run: Run) -> dict[str, Any]:
    """Train what is missing, all experiments' cells in one queue."""
    studies: list[Study] = []
    for experiment in map(EXPERIMENTS.__getitem__, names):
        chosen = experiment.studies(small)
        experiment.before(chosen, run)
        studies += chosen.values()
    rows = train_cells(interleaved(studies), run)
    return {
        "data": {"cells": str(run.output / CELLS), "experiments": names, "finished": len(rows)},
        "text": f"{len(rows)} cells of {', '.join(names)} are in {run.output}",
    }


def write(name: str, small: bool, run: Run) -> Result:
    """Run an experiment; write its figures, ``NAME.csv``, ``NAME.md`` and its cells, packed."""
    experiment = EXPERIMENTS[name]
    result = experiment.run(name, small, run)
    stem = stem_of(name, small)
    keys = {c.key for s in _studies(name, small, run).values() for c in s.cells()}
    # What is not written up yet is kept, too.
    planned = {c.key for s in experiment.studies(small).values() for c in s.cells()}
    _pack(planned & run.store().keys(), stem, run)
    for k, table in enumerate(result.tables):
        path = run.output / f"{stem}{'' if k == 0 else f'-{k + 1}'}.csv"
        path.write_text(_csv(table), encoding="utf-8", newline="")
    command = f"pathlift reproduce {name}{' --small' if small else ''}"
    if run.finished:
        command += " --finished"
    if run.place.device != "cpu":
        command += f" --device {run.place.device}{' --tf32' if run.place.tf32 else ''}"
    size = ", full size" if stem != name else ""
    about = experiment.about + _trained_on(keys, run.store()) + _lacking(name, small, run)
    parts = [f"## {experiment.title}{size}", about, f"    {command}"]
    parts += [f"![{caption}]({file}.png)\n\n{caption}" for file, caption in result.figures]
    parts += [_markdown(table) for table in result.tables]
    parts.append("What the numbers say:")
    parts.append("\n".join(f"- {sentence}" for sentence in result.findings))
    (run.output / f"{stem}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return result


def _trained_on(keys: set[str], store: Store) -> str:
    """A sentence on devices, where there are others than a CPU."""
    names = {row.get("device") or "cpu" for row in store.read(sorted(keys))}
    others = sorted(names - {"cpu"})
    some = "Some runs were" if "cpu" in names else "The runs were"
    return f" {some} trained on an {' and an '.join(others)}." if others else ""


def _lacking(name: str, small: bool, run: Run) -> str:
    """A sentence on networks of the plan that have not been trained yet."""
    done = _studies(name, small, run)
    lacking = [
        f"{network} ({study.grid['data'][0]}, {study.grid['optimizers'][0]}"
        f"{', batch norm' if study.grid.get('norm') else ''})"
        for suffix, study in EXPERIMENTS[name].studies(small).items()
        for x, network in study.family.items()
        if suffix not in done or x not in done[suffix].family
    ]
    return f" Not trained yet: {'; '.join(lacking)}." if lacking else ""


def stem_of(name: str, small: bool) -> str:
    """What an experiment's files are called."""
    return name if small else name + EXPERIMENTS[name].full


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
        (output / f"{stem}.md").read_text(encoding="utf-8").strip()
        for name in EXPERIMENTS
        for stem in dict.fromkeys(stem_of(name, small) for small in (True, False))
        if (output / f"{stem}.md").is_file()
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
