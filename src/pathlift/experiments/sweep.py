"""The cells of a comparison, and the engine that computes those that are missing.

Cells that share an architecture, data and optimiser train together in jobs (see
:mod:`pathlift.experiments.training`); jobs are spread by joblib over processes, or over a Dask
cluster, and every cell is stored as soon as its job is done.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pathlift.errors import ArgumentError
from pathlift.experiments.architectures import IMAGE_KINDS, build, data_for
from pathlift.experiments.data import Data, load
from pathlift.experiments.methods import Start, method_named, start
from pathlift.experiments.optional import need
from pathlift.experiments.runs import Recondition
from pathlift.experiments.store import Row, Store
from pathlift.experiments.training import Curves, epoch_seconds, train
from pathlift.progress import Step

_FORMAT = 1  # changes when a cell's row means something else
# A GPU is only kept busy by many; a job that is cut short loses all of its cells.
_JOB_CELLS = {"cpu": 64, "cuda": 256}
_ALONE_CELLS = 8  # of networks that train one at a time anyway


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        method: a name in :data:`pathlift.experiments.methods.METHODS`.
        architecture: see :func:`pathlift.experiments.architectures.build`.
        data: see :func:`pathlift.experiments.data.load`.
        optimizer: ``"sgd"``, ``"momentum"``, ``"adam"`` or ``"muon"``.
        rate: learning rate.
        seed: of the initial weights and of the order of samples.
        epochs: passes over the data.
        batch: samples per step.
        initialization: ``"pytorch"`` or ``"kaiming-normal"``.
        every: epochs between two conditionings, for methods with a schedule.
        held_out: train on the training set and evaluate on the test set; else train on both.
        samples: train on the first so many; None: on all.
        norm: batch norm in front of every hidden ReLU, whatever the method.
    """

    method: str
    architecture: str
    data: str
    optimizer: str
    rate: float
    seed: int
    epochs: int
    batch: int = 128
    initialization: str = "pytorch"
    every: int = 5
    held_out: bool = True
    samples: int | None = None
    norm: bool = False

    @property
    def key(self) -> str:
        """32 hexadecimal digits: a hash of the configuration."""
        # Without a schedule its period means nothing.
        own = self if method_named(self.method).unit == "epoch" else replace(self, every=0)
        settings = json.dumps([_FORMAT, asdict(own)], sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()[:32]

    @property
    def stack(self) -> Cell:
        """Equal for cells whose networks have the same parameters and take the same steps."""
        method = method_named(self.method)
        return replace(
            self,
            method="",
            optimizer=method.optimizer or self.optimizer,
            rate=0.0,
            seed=0,
            every=0,
            norm=self.norm or method.batch_norm,
        )


@dataclass(frozen=True)
class Place:
    """Where a job runs: its data folder, its device and its threads (None: as they are).

    ``tf32`` lets a GPU's matrix products round their factors to 11 significant bits.
    """

    root: str | None = None
    download: bool = False
    device: str = "cpu"
    threads: int | None = 1
    tf32: bool = False

    @property
    def name(self) -> str:
        """What trained, for a cell's row."""
        device = torch.device(self.device)
        if device.type != "cuda":
            return device.type
        return torch.cuda.get_device_name(device) + (", TF32" if self.tf32 else "")


def add_place_arguments(parser: Any) -> None:
    """The options of a command that say where its jobs run; see :func:`place_of`."""
    add = parser.add_argument
    add("--root", help="folder of data files")
    add("--download", action="store_true", help="fetch missing data from OpenML")
    add("--device", default="cpu", help="such as cuda")
    add("--tf32", action="store_true", help="quicker and coarser matrix products on a GPU")
    add("--processes", type=int, default=1, help="of one thread each")
    add("--dask", help="tcp://host:port of a scheduler, or local:3")


def place_of(args: Any) -> Place:
    """The place that the options name: one thread per job on a CPU."""
    threads = 1 if args.device == "cpu" else None
    return Place(args.root, args.download, args.device, threads, args.tf32)


def grid(
    methods: Sequence[str],
    architectures: Sequence[str],
    data: Sequence[str],
    optimizers: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    **settings: Any,
) -> list[Cell]:
    """All combinations. A method with an optimiser of its own stands beside SGD only.

    Raises:
        ArgumentError: an unknown method, or a list that is empty.
    """
    lists = (methods, architectures, data, optimizers, rates, seeds)
    if not all(lists):
        raise ArgumentError(
            "a comparison needs at least one method, architecture, data set, optimiser, rate and "
            "seed; one of the lists is empty."
        )
    cells = []
    for m, a, d, o, r, s in itertools.product(*lists):
        if o == "sgd" or method_named(m).optimizer is None:
            cells.append(Cell(m, a, d, o, float(r), int(s), **settings))
    return cells


def sweep(
    cells: Sequence[Cell],
    store: Store,
    *,
    place: Place | None = None,
    processes: int = 1,
    dask: str | None = None,
    job_cells: int | None = None,
    progress: Callable[[str], object] = print,
    run: Callable[[Sequence[Cell], Place], list[Row]] | None = None,
) -> list[Row]:
    """Compute the cells that are not in the store; return all rows, in the cells' order.

    Args:
        cells: what to compare.
        store: holds finished cells; every new one is added when its job is done.
        place: for every job.
        processes: on this machine, without Dask.
        dask: ``"tcp://host:port"`` of a scheduler, or ``"local:3"`` to start so many workers. A
            job whose worker dies is given to another.
        job_cells: largest number of cells per job; None: what suits the device.
        progress: called with a line now and then.
        run: computes a job, :func:`run_job` by default.

    Raises:
        PathliftError: whatever a job raises, once the other jobs are done and stored.
        MissingDependencyError: joblib, pyarrow or distributed is not installed.
    """
    joblib = need("joblib", "a sweep over cells")
    known = store.keys()
    missing = {cell.key: cell for cell in cells if cell.key not in known}
    place = place or Place()
    jobs = list(_jobs(missing.values(), job_cells, place.device))
    progress(f"{len(cells) - len(missing)} cells are there, {len(missing)} to train")
    failure: Exception | None = None
    if jobs:
        with _engine(processes, dask):
            pool = joblib.Parallel(
                n_jobs=-1 if dask else processes, return_as="generator_unordered", batch_size=1
            )
            tasks = (joblib.delayed(_attempt)(run or run_job, job, place) for job in jobs)
            done = 0
            progress(Step(f"0 of {len(missing)} cells trained", 0, len(missing), "cells"))
            for rows in pool(tasks):
                if isinstance(rows, Exception):
                    progress(f"a job failed: {type(rows).__name__}: {rows}")
                    failure = failure or rows
                    continue
                for row in rows:
                    store.write(row.pop("key"), row)
                done += len(rows)
                progress(
                    Step(f"{done} of {len(missing)} cells trained", done, len(missing), "cells")
                )
    if failure is not None:
        raise failure
    return store.read([cell.key for cell in cells])


def _attempt(
    run: Callable[[Sequence[Cell], Place], list[Row]], job: Sequence[Cell], place: Place
) -> list[Row] | Exception:
    """A job's rows, or what it raised: the jobs beside it go on."""
    try:
        return run(job, place)
    except Exception as error:
        return error


def _jobs(cells: Iterable[Cell], size: int | None, device: str) -> Iterator[tuple[Cell, ...]]:
    """Cells that can be stacked, in tuples of at most ``size`` (None: what suits the device)."""
    usual = _JOB_CELLS.get(torch.device(device).type, _JOB_CELLS["cpu"])
    stacks: dict[Cell, list[Cell]] = {}
    for cell in cells:
        stacks.setdefault(cell.stack, []).append(cell)
    for stack, members in stacks.items():
        alone = stack.architecture.partition(":")[0] in IMAGE_KINDS
        most = size or (_ALONE_CELLS if alone else usual)
        # One seed's methods share their network, so they are made once.
        members.sort(key=lambda c: (c.seed, c.method, c.rate))
        for first in range(0, len(members), most):
            yield tuple(members[first : first + most])


@contextmanager
def _engine(processes: int, dask: str | None) -> Iterator[None]:
    """joblib's processes, or a Dask cluster made or joined for the time being."""
    joblib = need("joblib", "a sweep over cells")
    if dask is None:
        with joblib.parallel_config(backend="loky", n_jobs=processes):
            yield
        return
    distributed = need("distributed", "a sweep on Dask", "dask[distributed]")
    kind, _, count = dask.partition(":")
    if kind == "local" and count.isdigit() and int(count) > 0:
        cluster: Any = distributed.LocalCluster(
            n_workers=int(count), threads_per_worker=1, dashboard_address=None
        )
    elif kind in ("tcp", "tls", "ws", "wss", "ucx"):
        cluster = dask
    else:
        raise ArgumentError(
            f"--dask {dask!r} is no cluster. Give tcp://host:port of a scheduler, or local:3 to "
            f"start three workers here."
        )
    try:
        with (
            distributed.Client(cluster, set_as_default=True, timeout=5) as client,
            joblib.parallel_config(backend="dask", client=client, wait_for_workers_timeout=60),
        ):
            yield
    except OSError as error:
        raise ArgumentError(
            f"the Dask scheduler at {dask} does not answer: {error}. Start it with: dask scheduler."
        ) from error
    finally:
        if cluster is not dask:
            cluster.close()


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cell_data(cell: Cell, place: Place) -> tuple[Data, Data | None]:
    """Training set and test set (None if nothing is held out), in main memory."""

    def one(split: str) -> Data:
        return data_for(cell.architecture, _loaded(cell.data, place.root, split, place.download))

    data = one("train" if cell.held_out else "all").first(cell.samples)
    return data, one("test") if cell.held_out else None


@functools.lru_cache(maxsize=2)  # a process's jobs mostly share their data: both splits of it
def _loaded(name: str, root: str | None, split: str, download: bool) -> Data:
    return load(name, root, split=split, download=download)


def run_job(cells: Sequence[Cell], place: Place) -> list[Row]:
    """Train cells of one stack together; their rows, with their keys."""
    with _threads(place.threads), torch.random.fork_rng(devices=[]):
        return _run_job(cells, place)


def _run_job(cells: Sequence[Cell], place: Place) -> list[Row]:
    first = cells[0]
    begin = time.perf_counter()
    data, test = cell_data(first, place)
    # Networks are made and conditioned on the CPU: the same ones wherever they train.
    starts: dict[tuple[str, int], Start] = {}
    for cell in cells:
        if (cell.method, cell.seed) not in starts:
            starts[cell.method, cell.seed] = start_of(cell, data)
    chosen = [starts[cell.method, cell.seed] for cell in cells]
    schedules: list[Recondition | None] = [
        method_named(cell.method).schedule(cell.every) for cell in cells
    ]
    optimizer = first.stack.optimizer
    prepared = time.perf_counter()
    data, test = data.to(place.device), test and test.to(place.device)
    with _tf32(place.tf32):
        curves = train(
            [s.model for s in chosen],
            [c.seed for c in cells],
            [c.rate for c in cells],
            data,
            epochs=first.epochs,
            batch=first.batch,
            optimizer=optimizer,
            test=test,
            recondition=schedules,
        )
        seconds = epoch_seconds(
            chosen[0].model, data, rate=1e-6, batch=first.batch, optimizer=optimizer, steps=9
        )
    trained = time.perf_counter()
    return [
        {
            "key": cell.key,
            **asdict(cell),
            "preparation_seconds": begun.seconds,
            "imbalance": begun.imbalance,
            "epoch_seconds": seconds,
            "device": place.name,
            "job_cells": len(cells),
            "job_preparation_seconds": prepared - begin,
            "job_seconds": trained - begin,
            "parameters": sum(p.numel() for p in begun.model.parameters()),
            **_columns(curves, k),
        }
        for k, (cell, begun) in enumerate(zip(cells, chosen, strict=True))
    ]


def start_of(cell: Cell, data: Data) -> Start:
    """The cell's network before its first step."""
    model = build(
        cell.architecture,
        data,
        batch_norm=cell.stack.norm,
        initialization=cell.initialization,
        seed=cell.seed,
    )
    return start(method_named(cell.method), model, data)


def _columns(curves: Curves, run: int) -> dict[str, list[float] | None]:
    def column(values: Tensor | None) -> list[float] | None:
        return None if values is None else values[run].double().tolist()

    return {
        "loss": column(curves.loss),
        "accuracy": column(curves.accuracy),
        "test_loss": column(curves.test_loss),
        "test_accuracy": column(curves.test_accuracy),
        "conditioning_seconds": column(curves.conditioning_seconds),
    }
