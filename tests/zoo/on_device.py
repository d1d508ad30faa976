"""Real architectures on an accelerator, beside the same on the host.

    python tests/zoo/on_device.py --jobs 14 --json device.json
    python tests/zoo/on_device.py --only torchvision:resnet18

Asked of each model, whose norms have generic values:

- bits: random integer scales keep every bit of every output there, in both modes. A model whose
  outputs differ from one run to the next is *unsteady* and can't be asked.
- scales: the integer scales that ``condition_`` applies there are those of the host, to the bit.
- measured: the imbalance that a continuous call reports for afterwards is what the next one finds.
- seconds: a later call, capture and verification included.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing as mp
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

from zoo.survey import DATA, build, candidates, first_line, run_model, same  # noqa: E402


def moved(inputs: Any, device: str) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), inputs)


def settle(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def steady(model: nn.Module, inputs: Any, mode: bool) -> Any:
    """The outputs, or why they can't be compared."""
    try:
        before = run_model(model, inputs, mode)
    except Exception as error:
        return f"does not run: {first_line(error)}"
    return before if same(before, run_model(model, inputs, mode)) else "unsteady"


def compare(name: str, device: str) -> dict[str, Any]:
    """One row."""
    import pathlift

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    row: dict[str, Any] = {"name": name}
    try:
        host, inputs = build(name)
        model, there = copy.deepcopy(host).to(device), moved(inputs, device)
    except Exception as error:
        return row | {"not built": first_line(error)}
    before = {mode: steady(model, there, mode) for mode in (False, True)}
    for one in (host, model):
        one.train(not isinstance(before[True], str) or before[True] == "unsteady")
    options = {"exact": True, "on_nothing": "ignore"}
    try:
        report = pathlift.condition_(host, inputs, **options)
    except pathlift.PathliftError as error:
        return row | {"refused on the host": first_line(error)}
    try:
        rescaled = copy.deepcopy(model)
        group = pathlift.rescaling_group(rescaled, there)
        row["scales"] = group.num_scales
        group.rescale_(rescaled, torch.randint(-2, 3, (group.num_scales,)))
        for mode, outputs in before.items():
            found = outputs if isinstance(outputs, str) else "identical"
            if found == "identical" and not same(outputs, run_model(rescaled, there, mode)):
                found = "DIFFERENT"
            row["train" if mode else "eval"] = found
        continuous = copy.deepcopy(model)
        try:
            exact = pathlift.condition_(model, there, **options)
        except pathlift.VerificationError as error:
            unsteady = "unsteady" in (row["eval"], row["train"])
            return row | {"unsteady" if unsteady else "errors": first_line(error)}
        gap = (exact.log2_scales - report.log2_scales).abs()
        row["host"] = int(gap.max()) if len(gap) else 0
        row["entries that differ"] = int((gap > 0).sum())
        first = pathlift.condition_(continuous, there, on_nothing="ignore")
        second = pathlift.condition_(continuous, there, **options)
        row["reported - measured"] = first.imbalance_after - second.imbalance_before
        settle(device)
        start = time.perf_counter()
        pathlift.condition_(continuous, there, on_nothing="ignore")
        settle(device)
        row["seconds"] = time.perf_counter() - start
    except Exception as error:
        return row | {"errors": first_line(error), "traceback": traceback.format_exc()}
    return row


def known_seconds() -> Callable[[str], float]:
    """What a model took on the host: the quick ones come first, should time run out."""
    rows = json.loads(DATA.read_text()) if DATA.exists() else []
    parts = ("capture", "inference", "solve")
    seconds = {r["name"]: sum(r.get(k, 0.0) for k in parts) for r in rows if "solve" in r}
    return lambda name: seconds.get(name, float("inf"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names = args.only or sorted(candidates(), key=known_seconds())
    rows: list[dict[str, Any]] = []
    end = time.monotonic() + args.seconds
    with ProcessPoolExecutor(args.jobs, mp_context=mp.get_context("spawn")) as pool:
        waiting = [pool.submit(compare, name, args.device) for name in names]
        try:
            for done in as_completed(waiting, timeout=max(1.0, end - time.monotonic())):
                rows.append(done.result())
                if args.json:
                    args.json.write_text(json.dumps(rows, indent=1))
        except TimeoutError:
            print(f"stopped after {args.seconds:.0f} s")
        finally:
            for child in mp.active_children():
                child.kill()
    wrong = [r for r in rows if "DIFFERENT" in (r.get("eval"), r.get("train"))]
    failed = [r for r in rows if "errors" in r]
    other = [r for r in rows if r.get("entries that differ")]
    far = [r for r in rows if abs(r.get("reported - measured", 0)) > 1e-6]
    unsteady = [r for r in rows if "unsteady" in (r.get("eval"), r.get("train"))]
    print(f"models {len(rows)} of {len(names)}; bits lost {len(wrong)}; errors {len(failed)}; "
          f"other scales than on the host {len(other)}; reported otherwise than measured "
          f"{len(far)}; unsteady {len(unsteady)}")  # fmt: skip
    for row in [*wrong, *failed, *other, *far, *unsteady]:
        print({k: v for k, v in row.items() if k != "traceback"})
    for row in failed[:3]:
        print(row.get("traceback", ""))


if __name__ == "__main__":
    main()
