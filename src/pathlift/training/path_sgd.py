"""Path-SGD: gradient steps that do not depend on how the network is scaled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, optim

from pathlift.capture.model import capture
from pathlift.capture.names import check_model
from pathlift.errors import ArgumentError
from pathlift.lifting.lifted import diagonal


class PathSGD(optim.Optimizer):
    """``theta_i <- theta_i - lr * grad_i / g_i`` with ``g = diag(dPhi^T dPhi)``.

    The step of Neyshabur, Salakhutdinov, Srebro (NeurIPS 2015) for p = 2: ``g_i`` is the sum over
    the paths through entry i of the squared product of the other entries, one forward and one
    backward pass of the squared network. Under rescaling ``g`` transforms like a squared gradient,
    so equal networks stay equal as functions after every step. An entry on no path has no
    gradient either, and stays.

    Args:
        model: a network of the supported operations; its trainable parameters are updated.
        example_inputs: as for :func:`pathlift.condition_`; the model is captured once.
        lr: learning rate.
        every: recompute ``g`` every so many steps.
        eps: added to ``g``, relative to its mean; 0 keeps the invariance exact.

    Raises:
        ArgumentError: an argument out of range.
        UnsupportedOperationError: the model has operations without paths.

    >>> import pathlift, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> x = torch.zeros(2, 4)
    >>> from pathlift.training import PathSGD
    >>> optimizer = PathSGD(model, x, lr=0.1)
    >>> model(torch.randn(8, 4)).square().mean().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: object,
        lr: float,
        *,
        every: int = 1,
        eps: float = 0.0,
    ) -> None:
        if not lr > 0 or every < 1 or not eps >= 0:
            raise ArgumentError(
                f"lr must be positive, every at least 1 and eps not negative; found lr={lr!r}, "
                f"every={every!r}, eps={eps!r}."
            )
        self._program = capture(check_model(model), example_inputs, both=False)
        trainable = {n: p for n, p in self._program.parameters.items() if p.requires_grad}
        self._names = {p: n for n, p in trainable.items()}
        self._every, self._eps, self._steps = every, eps, 0
        self._squares: dict[str, Tensor] = {}
        super().__init__(list(trainable.values()), {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the parameters' gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._steps % self._every == 0:
            self._squares = self._diagonal()
        self._steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    g = self._squares[self._names[parameter]]
                    step = torch.where(g > 0, parameter.grad / g, 0.0)
                    parameter.sub_(step, alpha=group["lr"])
        return loss

    def _diagonal(self) -> dict[str, Tensor]:
        values, shift, _ = diagonal(self._program, self._program.training)
        mean = sum(float(g.sum()) for g in values.values()) / max(
            sum(g.numel() for g in values.values()), 1
        )
        return {
            n: ((g + self._eps * mean) * 2.0**shift).to(self._program.parameters[n])
            for n, g in values.items()
        }
