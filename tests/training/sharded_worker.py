"""One process of test_sharded.py: ``RANK=… WORLD_SIZE=… python sharded_worker.py FOLDER CASE …``."""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

import pathlift
from pathlift.homes import sharded
from pathlift.tensors import shards

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Network(nn.Module):
    """Convolutions with a skip and batch norm, then a bottleneck; odd sizes, so shards differ."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 7, 3, padding=1)
        self.second = nn.Conv2d(7, 7, 3, padding=1)
        self.norm = nn.BatchNorm2d(7)
        self.third = nn.Conv2d(7, 9, 3)
        self.narrow = nn.Linear(9, 5)
        self.wide = nn.Linear(5, 9)
        self.again = self.narrow if tied else nn.Linear(9, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = x + self.norm(self.second(x)).relu()
        x = self.third(x).relu().mean((2, 3))
        x = self.wide(self.narrow(x).relu()).relu()
        return self.head(self.again(x).relu())


def build(tied: bool = False) -> Network:
    torch.manual_seed(0)
    return Network(tied)


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    for child in model.children():
        if next(child.parameters(), None) is not None:
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
EXAMPLE = X[:2]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """The same batch on every process, so that averaged gradients are those of one."""
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def load(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Give the model these values, each process its part."""
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            value = values[name]
            if isinstance(p, DTensor):
                (value,) = shards.local_factors(p, [value])
            shards.local_part(p).copy_(value)


def optimizer_of(case: str, model: nn.Module) -> torch.optim.Optimizer:
    if "adamw" in case:
        return torch.optim.AdamW(model.parameters(), lr=1e-3)
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {n: whole(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            if isinstance(value, Tensor):
                found[f"{name}/{key}"] = whole(value)
    return found


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    if a.keys() != b.keys():
        return sorted(a.keys() ^ b.keys())
    return [n for n in a if not torch.equal(a[n], b[n])]


def equal_to_one(case: str) -> dict[str, Any]:
    """Train sharded, condition, and compare with conditioning the same whole state alone."""
    tied = "tied" in case
    model: nn.Module = build(tied)
    if case == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
        inner: nn.Module = model.module
    elif case == "tensor-parallel":
        mesh = init_device_mesh("cpu", (SIZE,))
        inner = model
        # Values along rows, values along columns and a copy on every process, side by side.
        for k, module in enumerate(list(model.children())):
            places = [Shard(0), Shard(1), Replicate()][k % 3]
            for key, p in list(module.named_parameters(recurse=False)):
                place = places if places == Replicate() or p.dim() > 1 else Replicate()
                module.register_parameter(key, nn.Parameter(distribute_tensor(p, mesh, [place])))
            distribute_module(module, mesh)
    elif case == "hybrid":
        inner = shard(model, init_device_mesh("cpu", (2, SIZE // 2), mesh_dim_names=("dp", "fs")))
    else:
        inner = shard(model, init_device_mesh("cpu", (SIZE,)))
    optimizer = optimizer_of(case, inner)
    if case != "tensor-parallel":
        train(model, optimizer, 3)
    alone = build(tied)
    alone_optimizer = optimizer_of(case, alone)
    if case != "tensor-parallel":
        train(alone, alone_optimizer, 1)  # creates the state, which is then overwritten
    now = states(inner, optimizer)
    load(alone, now)
    for name, p in alone.named_parameters():
        for key, value in alone_optimizer.state[p].items():
            if isinstance(value, Tensor):
                value.copy_(now[f"{name}/{key}"])
    verify = case != "tensor-parallel"
    model.eval()
    alone.eval()
    before = model(X).detach() if verify else None
    report = pathlift.condition_(model, EXAMPLE, optimizer=optimizer, verify=verify)
    single = pathlift.condition_(alone, EXAMPLE, optimizer=alone_optimizer)
    same = True if before is None else torch.equal(before, model(X).detach())
    found = {
        **report.to_dict(),
        "scales": report.num_scales,
        "moved": int(report.log2_scales.count_nonzero()),
        "outputs identical": same,
        "scales equal": torch.equal(report.log2_scales, single.log2_scales),
        "different": differences(states(inner, optimizer), states(alone, alone_optimizer)),
    }
    if verify:  # and training goes on
        model.train()
        train(model, optimizer, 1)
    return found


def memory() -> dict[str, Any]:
    model = nn.Sequential(*(m for _ in range(12) for m in (nn.Linear(64, 64), nn.ReLU())))
    shard(model, init_device_mesh("cpu", (SIZE,)))
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    live: dict[int, int] = {}
    peak = total = 0
    gather = sharded.gather

    def counted(parameters: Any) -> Callable[[str], Tensor]:
        source = gather(parameters)

        def fetch(name: str) -> Tensor:
            nonlocal peak, total
            tensor = source(name)
            live[id(tensor)] = tensor.numel()
            weakref.finalize(tensor, live.pop, id(tensor), None)
            total += tensor.numel()
            peak = max(peak, sum(live.values()))
            return tensor

        return fetch

    sharded.gather = counted
    pathlift.condition_(model, torch.randn(2, 64), verify=False)
    return {
        "peak gathered": peak,
        "gathered": total,
        "largest": max(sizes.values()),
        "model": sum(sizes.values()),
    }


def checkpoint(folder: str) -> dict[str, Any]:
    """Train, condition, save, train on; against load and train on."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = shard(build(), init_device_mesh("cpu", (SIZE,)))
        return model, optimizer_of("adamw", model)

    model, optimizer = start()
    train(model, optimizer, 2)
    report = pathlift.condition_(model, EXAMPLE, optimizer=optimizer)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    train(model, optimizer, 2)

    other, other_optimizer = start()
    weights, state = get_state_dict(other, other_optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(other, other_optimizer, model_state_dict=weights, optim_state_dict=state)
    train(other, other_optimizer, 2)
    return {
        "different": differences(states(model, optimizer), states(other, other_optimizer)),
        "moved": int(report.log2_scales.count_nonzero()),
    }


def misuse() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (SIZE,))

    def message(call: Callable[[], Any]) -> str:
        try:
            call()
        except pathlift.PathliftError as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
        return shard(model, mesh)

    def parts(model: nn.Module) -> Iterable[Tensor]:
        return (shards.local_part(p) for p in model.parameters())

    model = fresh()
    if RANK == SIZE - 1:  # the others see nothing of it in their own shards
        with torch.no_grad():
            shards.local_part(model[0].weight)[0, 0] = torch.nan
    nan = message(lambda: pathlift.condition_(model, torch.randn(2, 6)))
    model = fresh()
    group = pathlift.Conditioner(model, torch.randn(2, 6)).group
    if RANK == 0:
        with torch.no_grad():
            shards.local_part(model[0].weight)[0, 0] = 2.0**100
    before = [p.clone() for p in parts(model)]
    scales = torch.full((group.num_scales,), 60)
    out_of_range = message(lambda: group.rescale_(model, scales))
    after = list(parts(model))
    from torch.distributed.tensor import Partial

    partial = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])
    return {
        "nan": nan,
        "range": out_of_range,
        "unchanged": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
        "partial": message(lambda: shards.local_factors(partial, [torch.ones(4, 1)])),
    }


def run(case: str, folder: str) -> dict[str, Any]:
    if case == "memory":
        return memory()
    if case == "checkpoint":
        return checkpoint(folder)
    return misuse() if case == "misuse" else equal_to_one(case)


def main() -> None:
    folder, *cases = sys.argv[1:]
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", rank=RANK, world_size=SIZE)
    found = {case: run(case, folder) for case in cases}
    for values in found.values():
        values.pop("seconds", None)
    everyone: list[Any] = [None] * SIZE
    dist.all_gather_object(everyone, found)
    assert all(other == everyone[0] for other in everyone), "processes disagree"
    print(json.dumps(found), flush=True)
    dist.barrier()
    # Threads of gloo sometimes abort an interpreter that shuts down; nothing is left to be done.
    os._exit(0)


if __name__ == "__main__":
    main()
