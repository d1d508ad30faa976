"""Loaders, on small files in the formats of the real ones."""

from __future__ import annotations

import gzip
import io
import os
import struct
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pathlift.errors import ArgumentError, PathliftError
from pathlift.experiments import data as module
from pathlift.experiments.data import Data, load
from pathlift.experiments.image_files import DataError, read_idx


def _idx(array: np.ndarray) -> bytes:
    return (
        b"\0\0\x08"
        + bytes([array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


def _mnist(
    folder: Path, prefix: str, count: int, *, zipped: bool = False, dot: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(count)
    images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = generator.integers(0, 10, count, dtype=np.uint8)
    for kind, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
        name = f"{prefix}-{kind.replace('-idx', '.idx') if dot else kind}"
        content = _idx(array)
        (folder / (name + ".gz" * zipped)).write_bytes(
            gzip.compress(content) if zipped else content
        )
    return images, labels


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize(
    ("where", "zipped", "dot"), [("", False, False), ("", True, True), ("{}/raw", True, False)]
)
def test_idx_files(name: str, where: str, zipped: bool, dot: bool, tmp_path: Path) -> None:
    folder = tmp_path / where.format({"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name])
    images, labels = _mnist(folder, "train", 6, zipped=zipped, dot=dot)
    _mnist(folder, "t10k", 4, zipped=zipped, dot=dot)
    found = load(name, tmp_path)
    mean, deviation = module._FILES[name][0][0], module._FILES[name][1][0]
    assert found.inputs.shape == (6, 1, 28, 28) and found.classes == 10
    assert torch.allclose(
        found.inputs[:, 0] * deviation + mean, torch.tensor(images) / 255, atol=1e-6
    )
    assert found.targets is not None and found.targets.tolist() == labels.tolist()
    assert len(load(name, tmp_path, split="test").inputs) == 4
    assert len(load(name, tmp_path, split="all").inputs) == 10
    assert found.reconstruction().inputs.shape == (6, 784)


def _records(folder: Path, name: str, count: int) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    records = np.random.default_rng(count).integers(0, 256, (count, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    (folder / name).write_bytes(records.tobytes())
    return records


def test_cifar_binary(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    parts = [_records(folder, f"data_batch_{k}.bin", k) for k in range(1, 6)]
    _records(folder, "test_batch.bin", 7)
    found = load("cifar10", tmp_path)
    whole = np.concatenate(parts)
    assert found.inputs.shape == (15, 3, 32, 32)
    assert found.targets is not None and found.targets.tolist() == whole[:, 0].tolist()
    # The third record's green channel, second row, fifth column.
    pixel = whole[2, 1 + 1024 + 32 + 4] / 255
    assert float(found.inputs[2, 1, 1, 4]) == pytest.approx((pixel - 0.4822) / 0.2435, abs=1e-5)
    assert len(load("cifar10", tmp_path, split="test").inputs) == 7


def _png(pixels: np.ndarray) -> bytes:
    """An encoded picture; PNG, which loses nothing."""
    image = pytest.importorskip("PIL.Image").fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _parquet(path: Path, pictures: list[object], column: str = "img") -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {column: p if isinstance(p, dict) else {"bytes": p, "path": None}, "label": k % 10}
        for k, p in enumerate(pictures)
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("column", ["img", "image"])
def test_cifar_parquet_as_data_hubs_lay_it_out(column: str, tmp_path: Path) -> None:
    folder = tmp_path / "cifar10"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    # Two shards: in the order of their names.
    _parquet(folder / "train-00001-of-00002.parquet", [_png(p) for p in pixels[3:]], column)
    _parquet(folder / "train-00000-of-00002.parquet", [_png(p) for p in pixels[:3]], column)
    _parquet(folder / "test-00000-of-00001.parquet", [_png(pixels[4])], column)
    found = load("cifar10", tmp_path)
    assert found.inputs.shape == (5, 3, 32, 32)
    assert found.targets is not None and found.targets.tolist() == [0, 1, 2, 0, 1]
    expected = (pixels[3, 1, 4, 2] / 255 - 0.4465) / 0.2616
    assert float(found.inputs[3, 2, 1, 4]) == pytest.approx(expected, abs=1e-5)
    test = load("cifar10", folder, split="test")
    assert torch.equal(test.inputs[0], found.inputs[4])


def test_a_parquet_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train-00000-of-00001.parquet"
    whole = _png(np.zeros((32, 32, 3), np.uint8))
    for pictures, column, said in (
        ([whole], "picture", "has columns picture, label; needed are img"),
        ([whole, whole[:40]], "img", "row 1 can't be decoded"),
        ([_png(np.zeros((8, 6, 3), np.uint8))], "img", "row 0 is a picture of 6 x 8"),
        ([{"bytes": None, "path": "a.png"}], "img", "row 0 has no encoded picture"),
    ):
        _parquet(path, list(pictures), column)
        with pytest.raises(DataError, match=said):
            load("cifar10", tmp_path)
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match="can't be read.*Fetch the file again"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_real_data(name: str) -> None:
    """Where PATHLIFT_DATA names a folder with it (or a Debian package has it)."""
    root = os.environ.get("PATHLIFT_DATA")
    try:
        found = load(name, root)
    except DataError as error:
        pytest.skip(f"the files are not here (PATHLIFT_DATA={root}): {error}")
    assert found.inputs.shape == (60_000, 1, 28, 28) and found.targets is not None
    zeros = {"mnist": 5923, "fashion-mnist": 6000}[name]
    assert int((found.targets == 0).sum()) == zeros
    assert abs(float(found.inputs.mean())) < 1e-3
    assert float(found.inputs.std()) == pytest.approx(1, abs=1e-3)


def test_the_real_cifar() -> None:
    root = os.environ.get("PATHLIFT_DATA")
    try:
        found = load("cifar10", root, split="test")
    except DataError as error:
        pytest.skip(f"the files are not here (PATHLIFT_DATA={root}): {error}")
    assert found.inputs.shape == (10_000, 3, 32, 32) and found.targets is not None
    assert found.targets.bincount().tolist() == [1000] * 10
    assert float(found.inputs.mean((0, 2, 3)).abs().max()) < 0.03


@pytest.mark.parametrize("layout", ["flat", "channels-last", "channels-first"])
def test_cifar_npz(layout: str, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    stored = {
        "flat": images.reshape(4, -1),
        "channels-last": images.transpose(0, 2, 3, 1),
        "channels-first": images,
    }[layout]
    labels = np.array([[3], [1], [4], [1]])
    np.savez(
        tmp_path / "cifar10.npz",
        x_train=stored,
        y_train=labels,
        x_test=stored[:2],
        y_test=labels[:2],
    )
    found = load("cifar10", tmp_path)
    assert found.targets is not None and found.targets.tolist() == [3, 1, 4, 1]
    deviation, mean = (
        torch.tensor([0.2470, 0.2435, 0.2616])[:, None, None],
        torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None],
    )
    assert torch.allclose(found.inputs * deviation + mean, torch.tensor(images) / 255, atol=1e-6)


def test_a_pickle_in_an_npz_is_not_opened(tmp_path: Path) -> None:
    opened = tmp_path / "opened"

    class _Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (opened,)

    np.savez(
        tmp_path / "cifar10.npz", x_train=np.array([_Bomb()], dtype=object), y_train=np.zeros(1)
    )
    with pytest.raises(DataError, match="needs plain arrays x_train"):
        load("cifar10", tmp_path)
    assert not opened.exists()


def test_fashion_mnist_is_found_where_the_system_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, labels = _mnist(tmp_path / "system", "train", 3, zipped=True)
    monkeypatch.setattr(module, "_SYSTEM", {"fashion-mnist": (tmp_path / "system",)})
    found = load("fashion-mnist")
    assert found.targets is not None and found.targets.tolist() == labels.tolist()
    # A folder that is named comes first.
    _, own = _mnist(tmp_path / "named", "train", 4)
    chosen = load("fashion-mnist", tmp_path / "named")
    assert chosen.targets is not None and chosen.targets.tolist() == own.tolist()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(_idx(np.zeros((2, 28, 28), np.uint8))[:-1])
    with pytest.raises(
        DataError,
        match=r"cut short or damaged: its header says shape \(2, 28, 28\), and 1567 bytes",
    ):
        read_idx(path)
    path.write_bytes(b"hello")
    with pytest.raises(DataError, match="is not an IDX file of bytes"):
        read_idx(path)
    path.write_bytes(b"\0\0\x08\x03\0\0")
    with pytest.raises(DataError, match="cut short"):
        read_idx(path)
    broken = tmp_path / "images.gz"
    broken.write_bytes(gzip.compress(b"x" * 100)[:-10])
    with pytest.raises(DataError, match="can't be read.*Fetch the file again"):
        read_idx(broken)
    (tmp_path / "data_batch_1.bin").write_bytes(b"x" * 3074)
    with pytest.raises(DataError, match="3074 bytes, which is not a multiple of 3073"):
        load("cifar10", tmp_path)
    _mnist(tmp_path, "train", 3)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(_idx(np.zeros(2, np.uint8)))
    with pytest.raises(DataError, match=r"found \(3, 28, 28\) and \(2,\)"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_missing_files_say_what_to_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SYSTEM", {})  # this machine may have a package's files
    with pytest.raises(
        DataError, match=f"{name} is read from files, and there is none in .*download=True"
    ):
        load(name, tmp_path)
    with pytest.raises(DataError, match="there is no folder .*absent.*name it by root"):
        load(name, tmp_path / "absent")
    with pytest.raises(DataError, match="root is None"):
        load(name)
    with pytest.raises(
        ArgumentError, match="data 'svhn' is unknown. Supported: 'two-moons', 'digits'"
    ):
        load("svhn")
    with pytest.raises(
        ArgumentError, match="split must be 'train', 'test' or 'all'; found 'valid'"
    ):
        load("digits", split="valid")


def test_downloads_go_through_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (70, 784))
    labels = np.array([str(k % 10) for k in range(70)])
    asked: list[dict] = []

    def fetch(name: str, **keywords: object) -> SimpleNamespace:
        asked.append({"name": name, **keywords})
        return SimpleNamespace(data=images.astype(float), target=labels)

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    monkeypatch.setitem(module._TRAIN_SIZE, "mnist", 60)
    found = load("mnist", tmp_path, download=True)
    assert asked[0]["name"] == "mnist_784" and asked[0]["data_home"] == str(tmp_path)
    assert found.inputs.shape == (60, 1, 28, 28)
    test = load("mnist", tmp_path, split="test", download=True)
    assert test.targets is not None and test.targets.tolist() == [k % 10 for k in range(60, 70)]

    def refuse(name: str, **_: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", refuse)
    with pytest.raises(
        PathliftError, match="can't be downloaded from OpenML.*no route.*pass their folder as root"
    ):
        load("mnist", tmp_path, download=True)


@pytest.mark.parametrize(
    ("name", "count", "features", "classes"),
    [("two-moons", 2000, 2, 2), ("digits", 1797, 64, 10), ("photographs", 8480, 64, 0)],
)
def test_embedded_sets(name: str, count: int, features: int, classes: int) -> None:
    train, test, whole = (load(name, split=s) for s in ("train", "test", "all"))
    assert len(train.inputs) + len(test.inputs) == len(whole.inputs) == count
    assert len(test.inputs) == count // 5
    assert train.inputs.shape[1:] == (features,) and train.classes == classes
    assert float(whole.inputs.square().mean()) == pytest.approx(
        0.517 if "pixel" in name else 1, abs=1e-3
    )
    assert float(whole.inputs.mean(0).abs().max()) < 1e-4
    rows = {tuple(r) for r in train.inputs.tolist()} & {tuple(r) for r in test.inputs.tolist()}
    assert name == "photographs" or not rows  # some patches of sky are equal
    assert torch.equal(train.inputs, load(name).inputs)
    assert (train.kind == "reconstruction") == (classes == 0)


def test_text_is_a_piece_and_what_comes_next() -> None:
    train, test, whole = (load("python-manual", split=s) for s in ("train", "test", "all"))
    assert len(train.inputs) + len(test.inputs) == len(whole.inputs) > 3000
    assert whole.inputs.dtype == torch.int64 and whole.dtype == torch.float32
    assert torch.equal(whole.inputs[:, 1:], whole.targets[:, :-1])
    assert torch.equal(whole.inputs[1:, 0], whole.targets[:-1, -1])
    letters = "\n" + "".join(map(chr, range(32, 127)))
    text = "".join(letters[k] for k in whole.inputs.flatten().tolist())
    assert whole.classes == len(letters) and "statement" in text and text.count("?") < 1000


def test_halves_of_images() -> None:
    images = torch.arange(2 * 3 * 4 * 2.0).view(2, 3, 4, 2)
    half = Data("images", images, torch.zeros(2, dtype=torch.int64), 10).completion()
    assert half.kind == "regression" and half.outputs == half.inputs.shape[1] == 12
    assert half.targets is not None
    assert torch.equal(half.inputs[1].view(3, 2, 2), images[1, :, :2])
    assert torch.equal(half.targets[1].view(3, 2, 2), images[1, :, 2:])
    flat = Data("flat", images.flatten(1), None).completion()
    assert flat.targets is not None
    assert torch.equal(torch.cat([flat.inputs, flat.targets], 1), images.flatten(1))
