"""The Fisher criterion: mean squared per-sample gradients on data (METHOD section 4)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from pathlift.capture.by_name import check_by_name
from pathlift.capture.inputs import as_inputs
from pathlift.capture.names import check_model, named_tensors, preserved
from pathlift.capture.program import Program
from pathlift.criteria.protocol import Criterion, Sink
from pathlift.errors import ArgumentError

Loss = Callable[[Any, Any], Tensor]


def fisher(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Loss,
    *,
    max_batches: int | None = None,
    max_bytes: int = 2**30,
) -> Criterion:
    """Coefficients ``c_i = mean over samples of (d loss / d theta_i)^2``.

    Works for any differentiable network, also where paths are not defined. The model is run in
    evaluation mode, one gradient per sample, vectorised over as many samples as fit.

    Args:
        model: the model that will be conditioned.
        batches: pairs (inputs, targets), such as a DataLoader; first dimension is the sample.
        loss: ``loss(outputs, targets)`` of a batch of one, a scalar.
        max_batches: stop after so many batches.
        max_bytes: bound on the memory of the per-sample gradients.

    Raises:
        ArgumentError: no batch, a batch that is not a pair of tensors, or a parameter that the
            model reaches by another way than its name.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> x = torch.zeros(2, 4)
    >>> batches = [(torch.randn(8, 4), torch.randint(0, 2, (8,)))]
    >>> criterion = pathlift.criteria.fisher(model, batches, nn.functional.cross_entropy)
    >>> report = pathlift.condition_(model, x, criterion=criterion)
    >>> report.imbalance_after <= report.imbalance_before
    True
    """
    model = check_model(model)

    def hand_on(program: Program, sink: Sink) -> dict[str, int]:
        for name, c in squared_gradients(model, batches, loss, max_batches, max_bytes).items():
            sink(name, c)
        return {}

    return Criterion(hand_on)


def squared_gradients(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Loss,
    max_batches: int | None = None,
    max_bytes: int = 2**30,
) -> dict[str, Tensor]:
    """name -> float64 mean of squared per-sample gradients, of the parameter's shape."""
    named, buffers, _ = named_tensors(model)
    parameters = {n: p.detach() for n, p in named.items() if p.is_floating_point()}
    fixed = {n: p for n, p in named.items() if n not in parameters}
    size = sum(p.numel() * p.element_size() for p in parameters.values())
    chunk = max(1, max_bytes // max(size, 1))
    total = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in parameters.items()}
    count = 0

    def one(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        out = functional_call(model, {**values, **fixed, **buffers}, (x[None],))
        return loss(out, y[None])

    per_sample = vmap(grad(one), in_dims=(None, 0, 0), randomness="different")
    with preserved(model):
        model.eval()
        for batch in itertools.islice(batches, max_batches):
            x, y = _pair(batch)
            if not count and len(x):
                check_by_name(model, as_inputs(x[:1]))
            for start in range(0, len(x), chunk):
                part = slice(start, start + chunk)
                gradients = per_sample(parameters, x[part], y[part])
                for name, g in gradients.items():
                    total[name] += g.square().sum(0, dtype=torch.float64).cpu()
            count += len(x)
    if not count:
        raise ArgumentError(
            "the Fisher criterion got no samples: the loader is empty or used up. Pass an iterable "
            "of (inputs, targets) that can be read again, such as a DataLoader or a list."
        )
    return {n: t / count for n, t in total.items()}


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    fits = isinstance(batch, (tuple, list)) and len(batch) == 2
    if not fits or not all(isinstance(t, Tensor) for t in batch) or len(batch[0]) != len(batch[1]):
        raise ArgumentError(
            f"the Fisher criterion needs batches (inputs, targets), two tensors of one length; "
            f"found {type(batch).__name__}. Wrap the loader to yield such pairs."
        )
    return batch[0], batch[1]
