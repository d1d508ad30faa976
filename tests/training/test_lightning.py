"""The Lightning callback; a resumed fit equals an uninterrupted one, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pathlift.errors import ArgumentError
from training.frameworks import importorskip

L = importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from pathlift.training.lightning import ConditioningCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


class Module(L.LightningModule):
    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 2)
        )
        self.name = optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        options = {"momentum": 0.9} if self.name == "SGD" else {}
        return getattr(torch.optim, self.name)(self.parameters(), lr=0.05, **options)


def loader(batches: int = 3, repeat: int = 1) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(8 * batches, 4, generator=g), torch.randn(8 * batches, 2, generator=g)
    return DataLoader(TensorDataset(x.repeat(repeat, 1), y.repeat(repeat, 1)), batch_size=8)


def trainer(folder: Path, epochs: int, callbacks: list[Any], **options: Any) -> Any:
    defaults = {
        "logger": False,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    }
    return L.Trainer(
        default_root_dir=folder, max_epochs=epochs, callbacks=callbacks, **{**defaults, **options}
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_resume_equals_never_having_stopped(tmp_path: Path, optimizer: str) -> None:
    whole, callback = Module(optimizer), ConditioningCallback(every=2, exact=False)
    trainer(tmp_path, 5, [callback]).fit(whole, loader())
    assert [entry["step"] for entry in callback.schedule.history] == [0, 2, 4]
    assert all(entry["moved"] for entry in callback.schedule.history)

    for stop in (2, 3):
        saver = ModelCheckpoint(tmp_path / f"{stop}", save_last=True)
        trainer(tmp_path, stop, [ConditioningCallback(every=2, exact=False), saver]).fit(
            Module(optimizer), loader()
        )
        part, again = Module(optimizer), ConditioningCallback(every=2, exact=False)
        trainer(tmp_path, 5, [again]).fit(part, loader(), ckpt_path=saver.last_model_path)
        assert same(part, whole)
        assert again.schedule.history == callback.schedule.history


def test_resume_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    # Equal batches: Lightning does not find its place in a plain DataLoader again.
    whole, callback = Module(), ConditioningCallback(every=1)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    trainer(tmp_path, 3, [callback, saver]).fit(whole, loader(1, 3))
    part, again = Module(), ConditioningCallback(every=1)
    trainer(tmp_path, 3, [again]).fit(part, loader(1, 3), ckpt_path=tmp_path / "step=4.ckpt")
    assert same(part, whole)
    assert [entry["step"] for entry in callback.schedule.history] == [0, 1, 2]
    assert again.schedule.history == callback.schedule.history


def test_conditioning_changes_training_only_through_the_weights(tmp_path: Path) -> None:
    # until=0: never. The data order and the random state are those of a fit without callback.
    plain, idle, looked = Module(), Module(), Module()
    shuffled = [DataLoader(loader().dataset, batch_size=8, shuffle=True) for _ in range(3)]
    callbacks = [[], [ConditioningCallback(until=0)], [ConditioningCallback(tol=0.5, exact=True)]]
    after = []
    for model, data, extra in zip((plain, idle, looked), shuffled, callbacks, strict=True):
        torch.manual_seed(5)
        trainer(tmp_path, 1, extra).fit(model, data)
        after.append(torch.get_rng_state())
    assert same(plain, idle)
    assert torch.equal(after[0], after[1])
    assert torch.equal(after[0], after[2])


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize("source", ["data", "argument", "module"])
def test_example_inputs(tmp_path: Path, source: str, precision: str) -> None:
    model = Module()
    callback = ConditioningCallback(torch.zeros(1, 4) if source == "argument" else None)
    if source == "module":
        model.example_input_array = torch.zeros(3, 4)
    trainer(tmp_path, 1, [callback], precision=precision).fit(model, loader())
    assert len(callback.schedule.history) == 1


def test_imbalances_are_logged(tmp_path: Path) -> None:
    callback = ConditioningCallback()
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, 1, [callback], logger=logger).fit(Module(), loader())
    header, first = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[:2]
    row = dict(zip(header.split(","), first.split(","), strict=True))
    for key in ("imbalance_before", "imbalance_after"):
        assert float(row[f"pathlift/{key}"]) == pytest.approx(callback.schedule.history[0][key])


def test_a_stream_of_data_needs_example_inputs(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(TensorDataset(torch.randn(8, 4), torch.randn(8, 2)))

    with pytest.raises(ArgumentError, match="example_inputs can't be taken from DataLoader over"):
        trainer(tmp_path, 1, [ConditioningCallback()]).fit(Module(), DataLoader(Stream(), 4))
    given = ConditioningCallback(torch.zeros(1, 4))
    trainer(tmp_path, 1, [given]).fit(Module(), DataLoader(Stream(), 4))
    assert len(given.schedule.history) == 1


def test_a_callback_used_again_starts_again(tmp_path: Path) -> None:
    callback = ConditioningCallback()
    for _ in range(2):
        trainer(tmp_path, 1, [callback]).fit(Module(), loader())
    assert [entry["step"] for entry in callback.schedule.history] == [0, 0]


def test_several_optimisers(tmp_path: Path) -> None:
    class Two(Module):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.Adam(self.net[k].parameters()) for k in (0, 2, 4)]

    callback = ConditioningCallback()
    trainer(tmp_path, 1, [callback]).fit(Two(), loader())
    assert len(callback.schedule.history) == 1
