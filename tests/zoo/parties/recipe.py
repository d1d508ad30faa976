"""How one model of another library is made: where its class lives, arguments, inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[], Any]


@dataclass(frozen=True)
class Recipe:
    """``build()`` gives the module and inputs that it takes.

    ``target`` is ``package.module:attribute``, called with the arguments; an argument that is a
    recipe itself is built first. ``method``: what to call instead of forward.
    """

    target: str
    inputs: Inputs
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    method: str | None = None

    def make(self) -> Any:
        path, _, names = self.target.partition(":")
        found: Any = import_module(path)
        for name in names.split("."):
            found = getattr(found, name)
        args = [a.make() if isinstance(a, Recipe) else a for a in self.args]
        kwargs = {k: v.make() if isinstance(v, Recipe) else v for k, v in self.kwargs.items()}
        return found(*args, **kwargs)

    def build(self) -> tuple[nn.Module, Any]:
        made = self.make()
        return (Method(made, self.method) if self.method else made), self.inputs()


class Method(nn.Module):
    """A module whose forward is another method of the inner one (``log_prob``, ``encode``)."""

    def __init__(self, inner: nn.Module, method: str) -> None:
        super().__init__()
        self.inner, self.method = inner, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.inner, self.method)(*args, **kwargs)


def recipe(target: str, inputs: Inputs, *args: Any, method: str | None = None, **kwargs: Any) -> Recipe:  # fmt: skip
    return Recipe(target, inputs, args, kwargs, method)


def noise(*shape: int) -> Inputs:
    """One tensor of normal numbers."""
    return lambda: torch.randn(*shape)


def several(*shapes: tuple[int, ...]) -> Inputs:
    return lambda: tuple(torch.randn(*shape) for shape in shapes)


def image(size: int, channels: int = 3, batch: int = 2) -> Inputs:
    return noise(batch, channels, size, size)


def volume(size: int, channels: int = 1, batch: int = 1) -> Inputs:
    return noise(batch, channels, size, size, size)


def ids(*shape: int, below: int = 32) -> Inputs:
    return lambda: tokens(*shape, below=below)


def tokens(*shape: int, below: int = 32) -> Tensor:
    return torch.randint(1, below, shape)


def nodes(features: int = 8, count: int = 10, edges: int = 24) -> Inputs:
    """Features and edges of a graph."""
    return lambda: (torch.randn(count, features), torch.randint(0, count, (2, edges)))
