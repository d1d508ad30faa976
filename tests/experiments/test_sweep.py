"""Cells, their store, and the engines; a worker that dies loses nothing."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from pathlift.errors import ArgumentError
from pathlift.experiments import sweep as module
from pathlift.experiments.store import Store, StoreError
from pathlift.experiments.sweep import Cell, Place, grid, run_job, sweep

pytest.importorskip("pyarrow")
CELL = Cell("baseline", "mlp:8", "two-moons", "sgd", 0.1, 0, epochs=2, samples=64, batch=32)


def _grid(seeds: int = 2, methods: tuple[str, ...] = ("baseline", "path")) -> list[Cell]:
    return grid(
        methods,
        ["mlp:8"],
        ["two-moons"],
        ["sgd"],
        [0.1, 0.3],
        range(seeds),
        epochs=2,
        samples=64,
        batch=32,
    )


def _quiet(text: str) -> None:
    pass


def test_keys_are_stable_and_differ_by_what_matters() -> None:
    assert CELL.key == "b90f8b201c7f06a5b381f3c7d81c2699"
    for change in (
        {"rate": 0.2},
        {"seed": 1},
        {"epochs": 3},
        {"norm": True},
        {"method": "path"},
        {"samples": None},
    ):
        assert replace(CELL, **change).key != CELL.key
    assert replace(CELL, every=7).key == CELL.key
    schedule = replace(CELL, method="path-schedule")
    assert replace(schedule, every=7).key != schedule.key


def test_a_store_keeps_rows_and_names_damaged_files(tmp_path: Path) -> None:
    store = Store(tmp_path)
    row = {"loss": [1.0, float("inf")], "rate": 0.1, "accuracy": None}
    store.write("a", row)
    assert store.keys() == {"a"} and store.read(["a"]) == [{"key": "a", **row}]
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(StoreError, match="b.parquet can't be read.*Delete the file"):
        store.read(["b"])


def test_a_pack_stands_in_for_the_folder(tmp_path: Path) -> None:
    cells = _grid()
    first = Store(tmp_path / "first")
    rows = sweep(cells, first, progress=_quiet)
    pack = tmp_path / "some.cells.parquet"
    first.pack([c.key for c in cells], pack)

    def refuse(job: object, place: Place) -> list[dict]:
        raise AssertionError("nothing is to be trained")

    other = Store(tmp_path / "other", [pack])
    assert other.keys() == other.packed() == first.keys()
    assert sweep(cells, other, progress=_quiet, run=refuse) == rows  # losses are floats
    other.write(cells[0].key, {"loss": [7.0]})
    assert other.read([cells[0].key])[0]["loss"] == [7.0]  # the folder's own row comes first
    with pytest.raises(StoreError, match="can't be read"):
        other.read(["absent"])
    pack.write_bytes(b"no parquet")
    with pytest.raises(StoreError, match="some.cells.parquet can't be read"):
        Store(tmp_path / "other", [pack])


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no space")

    store = Store(tmp_path)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no space"):
        store.write("a", {"rate": 0.1})
    assert list(tmp_path.iterdir()) == []


def test_rows_say_on_what_they_were_trained(tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision()
    (row,) = run_job([CELL], Place(tf32=True))
    assert torch.get_float32_matmul_precision() == before
    assert row["device"] == "cpu" and row["job_cells"] == 1
    assert 0 < row["job_preparation_seconds"] < row["job_seconds"]
    # Older rows lack those columns; a pack holds both.
    store = Store(tmp_path)
    store.write("new", {k: v for k, v in row.items() if k != "key"})
    store.write("a-old", {"rate": 0.1})
    store.pack(["new", "a-old"], tmp_path / "pack.parquet")
    old, new = Store(tmp_path / "none", [tmp_path / "pack.parquet"]).read(["a-old", "new"])
    assert old["device"] is None and new["device"] == "cpu"


def test_a_job_that_fails_stops_no_other(tmp_path: Path) -> None:
    said: list[str] = []

    def run(cells: tuple[Cell, ...], place: Place) -> list[dict]:
        if cells[0].norm:
            raise ArgumentError("not this one")
        return run_job(cells, place)

    store = Store(tmp_path)
    cells = [replace(CELL, norm=True), CELL]
    with pytest.raises(ArgumentError, match="not this one"):
        sweep(cells, store, run=run, progress=said.append)
    assert store.keys() == {CELL.key}
    assert any("a job failed: ArgumentError: not this one" in str(line) for line in said)


def test_a_rerun_computes_only_what_is_missing(tmp_path: Path) -> None:
    computed: list[str] = []

    def run(cells: tuple[Cell, ...], place: Place) -> list[dict]:
        computed.extend(c.key for c in cells)
        return run_job(cells, place)

    store = Store(tmp_path)
    first = sweep(_grid(1), store, run=run, progress=_quiet)
    assert sorted(computed) == sorted(c.key for c in _grid(1))
    computed.clear()
    cells = _grid(2)
    (tmp_path / f"{cells[0].key}.parquet").unlink()
    rows = sweep(cells, store, run=run, progress=_quiet)
    assert set(computed) == {cells[0].key} | {c.key for c in cells if c.seed == 1}
    assert [r["key"] for r in rows] == [c.key for c in cells]
    again = {r["key"]: r["loss"] for r in rows}
    assert all(again[r["key"]] == r["loss"] for r in first)


def test_a_job_that_fails_keeps_what_was_finished(tmp_path: Path) -> None:
    def run(cells: tuple[Cell, ...], place: Place) -> list[dict]:
        if cells[0].seed == 1:
            raise ArgumentError("broken")
        return run_job(cells, place)

    with pytest.raises(ArgumentError, match="broken"):
        sweep(_grid(2), Store(tmp_path), run=run, job_cells=4, progress=_quiet)
    assert Store(tmp_path).keys() == {c.key for c in _grid(2) if c.seed == 0}


def test_jobs_hold_cells_of_one_stack() -> None:
    cells = _grid(3, ("baseline", "path", "batch-norm", "path-sgd"))
    jobs = list(module._jobs(cells, 5, "cpu"))
    assert sorted(c.key for job in jobs for c in job) == sorted(c.key for c in cells)
    for job in jobs:
        assert len(job) <= 5 and len({c.stack for c in job}) == 1
    assert len({job[0].stack for job in jobs}) == 3


def test_jobs_are_larger_where_that_keeps_the_device_busy() -> None:
    cells = [replace(CELL, seed=k) for k in range(300)]
    images = [replace(CELL, architecture="resnet18:2", seed=k) for k in range(10)]
    sizes = {d: [len(j) for j in module._jobs([*cells, *images], None, d)] for d in ("cpu", "cuda")}
    assert sizes == {"cpu": [64] * 4 + [44, 8, 2], "cuda": [256, 44, 8, 2]}


def test_processes_give_the_same_rows(tmp_path: Path) -> None:
    cells = _grid(2)
    here = sweep(cells, Store(tmp_path / "a"), progress=_quiet)
    there = sweep(cells, Store(tmp_path / "b"), processes=2, job_cells=4, progress=_quiet)
    assert [r["loss"] for r in here] == [pytest.approx(r["loss"], rel=1e-4) for r in there]


def _slow_job(folder: Path, cells: tuple[Cell, ...], place: Place) -> list[dict]:
    """Notes the process it runs in, and the first job outlives its worker's death only by luck."""
    (folder / f"{cells[0].key}-{os.getpid()}").touch()
    time.sleep(0.5)
    return run_job(cells, place)


def test_a_dask_cluster_loses_a_worker_and_no_cell(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    notes = tmp_path / "notes"
    notes.mkdir()
    cells = _grid(5)
    store = Store(tmp_path / "cells")
    killed: list[int] = []
    with distributed.LocalCluster(
        n_workers=3, threads_per_worker=1, dashboard_address=None
    ) as cluster:

        def kill_once(text: str) -> None:
            # In the middle: something is done, more is not.
            if not killed and re.match("[1-9].* trained", text):
                pids = {int(p.name.split("-")[1]) for p in notes.iterdir()}
                killed.append(sorted(pids)[-1])
                os.kill(killed[0], signal.SIGKILL)

        rows = sweep(
            cells,
            store,
            dask=cluster.scheduler_address,
            job_cells=2,
            run=partial(_slow_job, notes),
            progress=kill_once,
        )
    assert killed
    assert [r["key"] for r in rows] == [c.key for c in cells]
    pids = {int(p.name.split("-")[1]) for p in notes.iterdir()}
    assert len(pids - set(killed)) >= 2
    alone = run_job([c for c in cells if c.seed == 4], Place())
    assert {r["key"]: r["loss"] for r in alone} == {
        r["key"]: pytest.approx(r["loss"], rel=1e-4) for r in rows if r["seed"] == 4
    }


def test_engines_that_do_not_exist_are_named(tmp_path: Path) -> None:
    for wrong in ("local:0", "local", "http://x"):
        with pytest.raises(ArgumentError, match="is no cluster. Give tcp://"):
            sweep(_grid(1), Store(tmp_path), dask=wrong, progress=_quiet)
    with pytest.raises(ArgumentError, match="at least one method"):
        grid([], ["mlp:8"], ["digits"], ["sgd"], [0.1], [0], epochs=1)
    with pytest.raises(ArgumentError, match="method 'magic' is unknown. Supported: 'baseline'"):
        sweep([replace(CELL, method="magic")], Store(tmp_path), progress=_quiet)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_network_that_completes_images_learns(optimizer: str) -> None:
    """The loss is the mean squared error of the other half of the image."""
    methods = ("baseline", "path-continuous")
    rates = [1.0 if optimizer == "sgd" else 0.01]
    cells = grid(methods, ["completion:16-4"], ["digits"], [optimizer], rates, range(1), epochs=8)
    for row in run_job(tuple(cells), Place()):
        assert 0.1 < row["loss"][-1] < 0.9 * row["loss"][0] < 1.5, row["method"]
