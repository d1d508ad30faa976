"""Example inputs from data loaders, and what is said when a framework is not installed."""

from __future__ import annotations

import importlib
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pathlift
from pathlift.training._examples import device_of, example_from, moved

NET = nn.Linear(3, 2)


class Takes(nn.Module):
    def forward(
        self, x: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        return x


class TakesAll(nn.Module):
    def forward(self, **inputs: Tensor) -> Tensor:
        return inputs["x"]


class Noisy(Dataset[Any]):
    """Draws from every random state."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(3) + random.random() + np.random.rand()


class Dicts(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.ones(3), "labels": torch.tensor(1), "index": torch.tensor(index)}


@pytest.mark.parametrize(("size", "expected"), [(4, 2), (1, 2), (None, None)])
def test_batches_of_tensors(size: int | None, expected: int | None) -> None:
    data = TensorDataset(torch.arange(12.0).view(4, 3), torch.zeros(4))
    found = example_from(DataLoader(data, batch_size=size, shuffle=size is not None), NET)
    assert torch.equal(found, data.tensors[0][:expected] if expected else data.tensors[0][0])


def test_the_random_state_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    data = DataLoader(Noisy(), batch_size=2, shuffle=True, generator=generator)
    before = [torch.get_rng_state(), generator.get_state()]
    others = [random.getstate(), np.random.get_state()[1].copy()]
    assert example_from(data, NET).shape == (2, 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(generator.get_state(), before[1])
    assert random.getstate() == others[0]
    assert (np.random.get_state()[1] == others[1]).all()


def test_dicts() -> None:
    data = DataLoader(Dicts(), batch_size=2)
    assert example_from(data, Takes()).keys() == {"x", "labels"}
    assert example_from(data, Takes(), ["labels"]).keys() == {"x"}
    assert example_from(data, TakesAll(), ["labels"]).keys() == {"x", "index"}


def test_data_from_which_inputs_cannot_be_told() -> None:
    with pytest.raises(
        pathlift.ArgumentError, match="from which the inputs of Linear.forward can't"
    ):
        example_from(DataLoader(Dicts(), batch_size=2), NET)
    with pytest.raises(pathlift.ArgumentError, match="its samples have no indices"):
        example_from([torch.ones(2, 3)], NET)


def test_moved() -> None:
    inputs = {"a": (torch.ones(2), 3), "b": [torch.ones(1)], "c": None}
    found = moved(inputs, lambda t: t.double())
    assert found["a"][0].dtype == found["b"][0].dtype == torch.float64
    assert found["a"][1] == 3 and found["c"] is None and isinstance(found["a"], tuple)
    assert device_of(NET) == torch.device("cpu") == device_of(nn.ReLU())


@pytest.mark.parametrize(
    ("module", "needs", "install"),
    [
        ("lightning", "lightning.pytorch", "pip install lightning"),
        ("huggingface", "transformers.trainer_callback", "pip install transformers"),
    ],
)
def test_a_framework_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, module: str, needs: str, install: str
) -> None:
    monkeypatch.delitem(sys.modules, f"pathlift.training.{module}", raising=False)
    monkeypatch.setitem(sys.modules, needs, None)
    with pytest.raises(pathlift.MissingDependencyError, match=install):
        importlib.import_module(f"pathlift.training.{module}")


def test_names() -> None:
    import pathlift.training

    for name in pathlift.training.__all__:
        assert getattr(pathlift.training, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        pathlift.training.nothing  # noqa: B018
