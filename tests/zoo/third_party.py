"""Small models of other people's libraries: sound from end to end, and nothing left behind.

    make zoo                                        # what docs/zoo-third-party.json lacks
    python tests/zoo/third_party.py --fresh
    python tests/zoo/third_party.py --only monai:unet       # one model, with its traceback

The libraries (tests/zoo/third_party.txt) are optional: models of those that are missing are left
out, with the reason. One process per model, with a time limit. Questions asked of each, in order:

- group: found, or the model refused by a PathliftError (whose reason is kept);
- eval, train: random integer scales in [-2, 2] keep every bit of every output;
- condition: ``condition_`` works, keeps every bit, and a second call measures what it reported;
- trace: after ``rescaling_group``, and after a ``condition_`` that raises, every module's
  attributes, buffers, mode and all random states are what they were, and a call gives real tensors.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

from zoo import forks  # noqa: E402
from zoo.libraries import randomise_  # noqa: E402  (makes torchvision importable, too)
from zoo.parties.recipe import Recipe  # noqa: E402
from zoo.survey import cell, first_line, run_model, same  # noqa: E402
from zoo.traces import differences, fake_tensors, snapshot  # noqa: E402

TABLE = ROOT / "docs" / "zoo-third-party.md"
DATA = ROOT / "docs" / "zoo-third-party.json"
LIMIT = 240  # seconds per model
QUESTIONS = ("errors", "eval", "train", "report", "trace")
TOLERANCE = 1e-6


def recipes() -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for part in ("vision", "sequences", "tables"):
        found |= importlib.import_module(f"zoo.parties.{part}").RECIPES
    return found


def warm_up() -> None:
    """Condition something, so that no process has to import what that takes."""
    import pathlift

    pathlift.condition_(
        nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), torch.ones(1, 2)
    )


def preload(name: str) -> None:
    """Import what every model of a library needs."""
    importlib.import_module(recipes()[name].target.partition(":")[0])


def build(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model, inputs = recipes()[name].build()
    randomise_(model)
    _initialise_(model)
    return model, inputs


def _initialise_(model: nn.Module) -> None:
    """Values for parameters that a library makes with ``torch.empty`` and loads later."""
    tiny = torch.finfo(torch.float32).tiny
    with torch.no_grad():
        for parameter in model.parameters():
            sizes = parameter.abs() if parameter.dtype == torch.float32 else torch.ones(1)
            if bool((~sizes.isfinite() | ((sizes > 0) & (sizes < 16 * tiny))).any()):
                parameter.normal_(0, 0.1)


def survey(name: str) -> dict[str, Any]:
    """One row of the table; only a mistake of the library's own leaves a traceback in it."""
    row: dict[str, Any] = {"name": name}
    start = time.perf_counter()
    try:
        model, inputs = build(name)
        if not run_model(model, inputs, False):
            raise ValueError("no tensor can be reached from its output")
        fresh, _ = build(name)
    except ImportError as error:
        return row | {"missing": first_line(error)}
    except Exception as error:
        return row | {"not built": first_line(error), "traceback": traceback.format_exc()}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    try:
        row["step"] = "rescaling_group of a model that was never called"
        runs = not isinstance(_attempt(model, inputs, fresh.training), str)
        uncalled = _uncalled(fresh, inputs, runs)
        _examine(model, inputs, row)
        row["trace"] = uncalled or row["trace"]
    except Exception as error:
        row["errors"] = f"{row.pop('step')}: {first_line(error)}"
        row["traceback"] = traceback.format_exc()
    row.pop("step", None)
    return row | {"seconds": round(time.perf_counter() - start, 2)}


def _uncalled(model: nn.Module, inputs: Any, runs: bool) -> str:
    """What the first call of all leaves in a model that builds tables when it is first called.

    ``runs``: whether models of its kind can be called in the mode that it is in.
    """
    import pathlift

    with suppress(pathlift.PathliftError):  # it will refuse the called model, too
        pathlift.rescaling_group(model, inputs)
    found = fake_tensors(model)
    if runs:
        found.append(_real(model, inputs, model.training))
    story = "; ".join(filter(None, found))
    return story and f"in a model never called before: {story}"[:300]


def _examine(model: nn.Module, inputs: Any, row: dict[str, Any]) -> None:
    import pathlift

    before = {mode: _attempt(model, inputs, mode) for mode in (False, True)}
    steady = {m: isinstance(b, list) and same(b, run_model(model, inputs, m)) for m, b in before.items()}  # fmt: skip
    model.train(not isinstance(before[True], str))
    row["step"] = "rescaling_group"
    state = snapshot(model)
    try:
        group = pathlift.rescaling_group(model, inputs)
        refused = None
    except pathlift.PathliftError as error:
        group, refused = None, first_line(error)
    row["trace"] = _left(model, inputs, state, before)
    if refused or group is None:
        row["refused"] = refused
        return
    row |= {"scales": group.num_scales, "pinned": dict(group.unsupported)}
    row["step"] = "rescale_"
    group.rescale_(model, torch.randint(-2, 3, (group.num_scales,)))
    for key, mode in (("eval", False), ("train", True)):
        row[key] = _kept(model, inputs, mode, before[mode], steady[mode])
    model.train(not isinstance(before[True], str))
    row["step"] = "condition_"
    _conditioned(model, inputs, row)
    row["step"] = "condition_ that raises"
    row["trace"] = row["trace"] or _failing(model, inputs, before)


def _conditioned(model: nn.Module, inputs: Any, row: dict[str, Any]) -> None:
    """Whether a second call measures what the first one reports."""
    import pathlift

    try:
        first = pathlift.condition_(model, inputs, exact=True)
        second = pathlift.condition_(model, inputs, exact=True)
    except pathlift.PathliftError as error:
        row["condition refused"] = first_line(error)
        return
    row["standins"] = dict(first.approximated)
    row["imbalance"] = [first.imbalance_before, first.imbalance_after, second.imbalance_before]
    gap = abs(first.imbalance_after - second.imbalance_before)
    true = gap <= TOLERANCE * max(1.0, abs(first.imbalance_after))
    row["report"] = "" if true else f"said {first.imbalance_after:.6g}, found {second.imbalance_before:.6g}"  # fmt: skip


def _failing(model: nn.Module, inputs: Any, before: dict[bool, Any]) -> str:
    """What a ``condition_`` that raises in its middle leaves behind."""
    import pathlift

    state = snapshot(model)
    names = [n for n, p in model.named_parameters() if p.is_floating_point() and p.numel()]
    if not names:
        return ""
    parameter = dict(model.named_parameters())[names[-1]]
    value = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.view(-1)[0] = float("nan")
        state = snapshot(model)
        pathlift.condition_(model, inputs, exact=True)
        story = ""
    except pathlift.PathliftError:
        story = "; ".join(differences(state, snapshot(model)) + fake_tensors(model))
    finally:
        with torch.no_grad():
            parameter.copy_(value)
    return story and f"after a condition_ that raises: {story}"[:300]


def _left(model: nn.Module, inputs: Any, state: Any, before: dict[bool, Any]) -> str:
    """What a call has left behind; empty if nothing."""
    found = differences(state, snapshot(model))
    found += fake_tensors(model)
    mode = model.training
    found += [_real(model, inputs, m) for m, outputs in before.items() if isinstance(outputs, list)]
    model.train(mode)
    return "; ".join(filter(None, found))[:300]


def _real(model: nn.Module, inputs: Any, training: bool) -> str:
    """Whether a call still works and gives real tensors; empty if so."""
    after = _attempt(model, inputs, training)
    if isinstance(after, str):
        return f"can't be called any more: {after}"
    return "gives fake tensors" if any(isinstance(t, FakeTensor) for t in after) else ""


def _attempt(model: nn.Module, inputs: Any, training: bool) -> list[Tensor] | str:
    try:
        return run_model(model, inputs, training)
    except Exception as error:
        return first_line(error)


def _kept(model: nn.Module, inputs: Any, training: bool, before: Any, steady: bool) -> str:
    if isinstance(before, str):
        return f"does not run: {before}"
    if not steady:
        return "not deterministic"
    return "identical" if same(before, run_model(model, inputs, training)) else "DIFFERENT"


def wrong(row: dict[str, Any]) -> list[str]:
    """The questions that a row fails."""
    bad = [q for q in ("errors", "report", "trace", "crashed") if row.get(q)]
    return bad + [q for q in ("eval", "train") if row.get(q) == "DIFFERENT"]


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown page."""
    made = [r for r in rows if "missing" not in r and "not built" not in r]
    libraries = {r["name"].partition(":")[0] for r in made}
    failing = Counter(q for r in made for q in wrong(r))
    refused = [r for r in made if r.get("refused")]
    lines = [
        "# Models of other libraries",
        "",
        "Made by `make zoo` (tests/zoo/third_party.py says what each column means): small models,",
        "random weights, generic norms; one process each.",
        "",
        f"- models: {len(made)} of {len(libraries)} libraries; refused by name: {len(refused)}",
        f"- without a finding: {sum(not wrong(r) for r in made)}; findings: "
        + (", ".join(f"{q} {n}" for q, n in failing.most_common()) or "none"),
        f"- left out because a library is missing or its model could not be made: {len(rows) - len(made)}",
        "",
        "| model | parameters | scales | eval | train | report | trace | refused, pinned by, or wrong |",
        "|---|---:|---:|---|---|---|---|---|",
    ]
    lines += [_line(r) for r in rows]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    for key in ("missing", "not built", "crashed"):
        if row.get(key):
            return f"| {row['name']} | | | | | | | {key}: {cell(row[key])} |"
    remark = row.get("errors") or row.get("refused") or row.get("condition refused")
    remark = remark or ", ".join(f"{op} {n}" for op, n in list(row.get("pinned", {}).items())[:4])
    report = row.get("report") or ("true" if "imbalance" in row else "")
    trace = row.get("trace") or ("none" if "trace" in row else "")
    scales = f"{row['scales']:,}" if "scales" in row else ""
    cells = (f"{row['parameters']:,}", scales, row.get("eval", ""), row.get("train", ""), report, trace, remark)  # fmt: skip
    return f"| {row['name']} | " + " | ".join(cell(c) for c in cells) + " |"


def _first(names: list[str], each: int) -> set[str]:
    """So many names of every library."""
    seen: Counter[str] = Counter()
    chosen = set()
    for name in names:
        library = name.partition(":")[0]
        if seen[library] < each:
            chosen.add(name)
        seen[library] += 1
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these, with tracebacks")
    parser.add_argument("--fresh", action="store_true", help="forget earlier rows")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--each", type=int, default=sys.maxsize, help="models per library, a look")
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds per model")
    parser.add_argument("--json", type=Path, default=DATA, help="rows; the page lies beside it")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.only:
        rows = [survey(name) for name in args.only]
        for row in rows:
            print(row.pop("traceback", ""), end="")
            print(json.dumps(row, indent=1))
        return any(map(wrong, rows))
    names = list(recipes())
    known: dict[str, dict[str, Any]] = {}
    if args.json.exists() and not args.fresh:
        known = {r["name"]: r for r in json.loads(args.json.read_text())}
    again = ("missing", "not built")
    missing = [n for n in names if n not in known or any(k in known[n] for k in again)]
    missing = [n for n in missing if n in _first(names, args.each)]
    warm_up()
    for k, row in enumerate(forks.rows(missing, survey, preload, args.limit, args.jobs), 1):
        row.pop("traceback", None)
        known[row["name"]] = row
        rows = [known[n] for n in names if n in known]
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
        state = wrong(row) or next(iter(set(row) & {"missing", "not built", "refused"}), "ok")
        print(f"{k}/{len(missing)} {row['name']}: {state}", flush=True)
    rows = [known[n] for n in names if n in known]
    args.json.with_suffix(".md").write_text(table(rows))
    return any(map(wrong, rows))


if __name__ == "__main__":
    sys.exit(main())
