"""What the framework callbacks share: example inputs from the training data, missing imports."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from pathlift.capture.names import preserved
from pathlift.errors import ArgumentError, MissingDependencyError


def imported(package: str, install: str, why: str) -> Any:
    """The module, or a worded error that says what to install."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            f"{why} needs {install}, which can't be imported: {error}. Run: pip install {install}."
        ) from error


def example_from(loader: Any, model: nn.Module, targets: Collection[str] = ()) -> Any:
    """Inputs for ``model.forward`` from the first samples of a data loader's dataset.

    The samples are taken from the dataset and collated, without iterating the loader: that would
    draw from the random state the training is about to use.

    Args:
        loader: a DataLoader over a dataset with indices.
        model: whose forward is to take the inputs.
        targets: names of arguments of forward to leave out (labels: with them, many models
            return a loss, which is no path of the network).

    Raises:
        ArgumentError: no indices, or a batch from which the inputs can't be told.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise ArgumentError(
            f"example_inputs can't be taken from {type(loader).__name__} over "
            f"{type(dataset).__name__}: its samples have no indices. Pass example_inputs=, one "
            f"batch as forward takes it."
        )
    with preserved(model):
        if loader.batch_sampler is None:  # the dataset's items are batches
            batch = loader.collate_fn(dataset[0])
        else:
            batch = loader.collate_fn([dataset[i] for i in range(min(2, len(dataset)))])
    return _forward_inputs(batch, model, targets)


def moved(value: Any, to: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``to`` applied to the tensors in its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return to(value)
    if isinstance(value, Mapping):
        return {k: moved(v, to) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(moved(v, to) for v in value)
    return value


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _forward_inputs(batch: Any, model: nn.Module, targets: Collection[str]) -> Any:
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters
        everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        found = {
            k: v for k, v in batch.items() if (everything or k in parameters) and k not in targets
        }
        if found:
            return found
    elif isinstance(batch, Tensor):
        return batch
    elif isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return batch[0]  # (inputs, targets, ...), the usual form
    raise ArgumentError(
        f"the training data gives a {type(batch).__name__}, from which the inputs of "
        f"{type(model).__name__}.forward can't be told: expected a tensor, (inputs, ...) or a "
        f"dict by the names of forward's arguments. Pass example_inputs=."
    )
