"""Condition once, before the first step, and train as always.

An autoencoder with a bottleneck on synthetic data of low dimension: changing widths are where
conditioning has something to do. Prints the loss with and without.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn

import pathlift


def autoencoder() -> nn.Sequential:
    widths = (64, 128, 32, 8, 32, 128, 64)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def data(samples: int = 1024) -> Tensor:
    """Points of a curved surface of dimension 8 in 64 dimensions."""
    hidden = torch.randn(samples, 8)
    return (torch.tanh(hidden @ torch.randn(8, 32)) @ torch.randn(32, 64)) / 4


def train(model: nn.Module, x: Tensor, epochs: int = 20, rate: float = 0.3) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    torch.manual_seed(1)  # the same batches for everyone
    for _ in range(epochs):
        for batch in x[torch.randperm(len(x))].split(128):
            optimizer.zero_grad()
            loss = (model(batch) - batch).square().mean()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return float((model(x) - x).square().mean())


def main() -> None:
    torch.manual_seed(0)
    x, plain = data(), autoencoder()
    conditioned = copy.deepcopy(plain)

    report = pathlift.condition_(conditioned, x[:2])  # in place; outputs change by rounding

    print(report)
    print(f"loss without {train(plain, x):.4f}, with {train(conditioned, x):.4f}")


if __name__ == "__main__":
    main()
