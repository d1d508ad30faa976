"""Replicated and sharded models: several processes give what one gives, bit for bit."""

from __future__ import annotations

import copy
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pathlift
from pathlift.homes import sharded
from pathlift.homes.module import ModuleHome
from pathlift.homes.sharded import structure
from pathlift.tensors.shards import local_part

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs gloo",
)

WORKER = Path(__file__).with_name("sharded_worker.py")


CASES = {
    2: ["fsdp-sgd", "fsdp-tied", "tensor-parallel", "ddp", "memory", "checkpoint", "misuse"],
    4: ["fsdp-adamw", "hybrid"],
}


def launch(processes: int, folder: Path) -> dict:
    """Run the worker's cases on several processes; what the first one found, by case."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(pathlift.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(WORKER), str(folder), *CASES[processes]],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        outputs = [w.communicate(timeout=240) for w in workers]
    finally:
        for worker in workers:
            worker.kill()
    # The last line stands after all checks; what becomes of the process then says nothing.
    for out, err in outputs:
        assert out.endswith("}\n"), err[-3000:]
    return json.loads(outputs[0][0].splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Both launches once, since starting the processes takes most of the time."""
    return {n: launch(n, tmp_path_factory.mktemp("shards")) for n in CASES}


@pytest.mark.parametrize(
    ("case", "processes"),
    [
        ("fsdp-sgd", 2),
        ("fsdp-adamw", 4),
        ("fsdp-tied", 2),
        ("tensor-parallel", 2),
        ("hybrid", 4),
        ("ddp", 2),
    ],
)
def test_several_processes_equal_one(found: dict, case: str, processes: int) -> None:
    here = found[processes][case]
    assert here["scales"] > 0 and here["moved"] > 0
    assert here["imbalance_after"] < here["imbalance_before"]
    assert here["outputs identical"]
    assert here["scales equal"]
    assert here["different"] == []


def test_no_process_holds_the_whole_model(found: dict) -> None:
    """The gathered parameters alive at any time, against the size of the model."""
    here = found[2]["memory"]
    assert here["peak gathered"] <= 3 * here["largest"]
    assert here["peak gathered"] < here["model"] / 2
    assert here["gathered"] >= here["model"]


def test_a_checkpoint_of_shards_resumes_bit_for_bit(found: dict) -> None:
    assert found[2]["checkpoint"]["different"] == []
    assert found[2]["checkpoint"]["moved"] > 0


def test_what_one_process_refuses_all_refuse(found: dict) -> None:
    here = found[2]["misuse"]
    assert here["nan"].startswith("ArgumentError: parameter '0.weight' has entries that are NaN")
    assert here["range"].startswith("RangeError: rescaling '0.weight' by 2**")
    assert here["unchanged"]
    assert here["partial"].startswith("CaptureError: a parameter of shape (4, 4) is placed as P")


def test_the_structure_is_that_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[3].weight = nn.Parameter(model[3].weight.detach(), requires_grad=False)
    twin = nn.Sequential(model, nn.ReLU(), model[3])
    found = structure(twin)
    assert [n for n, _ in found.named_parameters()] == [n for n, _ in twin.named_parameters()]
    assert all(p.is_meta for p in found.parameters())
    assert found[2] is found[0][3] and not found[2].weight.requires_grad
    assert found[0][2].running_mean is model[2].running_mean
    assert not any(p.is_meta for p in twin.parameters())


def test_without_processes_nothing_is_sharded() -> None:
    model = nn.Linear(3, 2)
    before = copy.deepcopy(model.state_dict())
    assert type(sharded.home_of(model)) is ModuleHome
    sharded.reshard(model)
    assert local_part(model.weight) is model.weight
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_the_script_of_the_docs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")
    (script,) = re.findall(
        r"^```python title=\"train.py\"\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL
    )
    (tmp_path / "train.py").write_text(script)
    assert "torchrun --nproc-per-node 2 train.py" in text
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "train.py",
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(pathlift.__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    # gloo's threads sometimes abort an interpreter that is shutting down.
    aborted = "terminate called without an active exception" in done.stderr
    assert done.returncode == 0 or aborted, done.stderr[-3000:]
    assert done.stdout.count("continuous scales") == 1
