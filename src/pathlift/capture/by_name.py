"""Parameters that a model reaches by other ways than their names: a list, a closure, a cache.

``torch.func.functional_call`` puts other values in the place of names only, so a model that keeps a
parameter elsewhere runs with its own, and derivatives by the given values lack its share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pathlift.capture.inputs import copied, tensors_in
from pathlift.capture.names import named_tensors, preserved
from pathlift.capture.program import Inputs
from pathlift.errors import ArgumentError


@contextmanager
def differentiable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Derivatives by these very tensors can be taken; hooks on them are not called."""
    known = [(p, p.requires_grad, p._backward_hooks) for p in parameters]
    try:
        for parameter, _, hooks in known:
            if hooks is not None:
                parameter._backward_hooks = None
            parameter.requires_grad_()
        yield
    finally:
        for parameter, wanted, hooks in known:
            if hooks is not None:
                parameter._backward_hooks = hooks
            parameter.requires_grad_(wanted)


def check_by_name(model: nn.Module, inputs: Inputs) -> None:
    """Run the model with copies in the place of its parameters, and see that it uses these alone.

    On a copy of the inputs, which forward may write into.

    Raises:
        ArgumentError: a parameter itself is reached.
    """
    named, buffers, _ = named_tensors(model)
    own = {n: p for n, p in named.items() if p.is_floating_point() or p.is_complex()}
    given = {n: t.detach().clone() for n, t in (named | buffers).items()}
    with preserved(model), torch.enable_grad(), differentiable(own.values()):
        batch = copied(inputs)
        out = functional_call(model, given, batch.args, batch.kwargs)
        reached = [t for t in tensors_in(out) if t.requires_grad]
        if not reached or not own:
            return
        total = torch.stack([t.abs().sum().real.double() for t in reached]).sum()
        slopes = torch.autograd.grad(total, list(own.values()), allow_unused=True)
    found = [n for n, slope in zip(own, slopes, strict=True) if slope is not None]
    if found:
        raise ArgumentError(
            f"parameter '{found[0]}' is reached by another way than its name (a list, a dict or a "
            f"closure that keeps it), where no other values can be put in its place. Have forward "
            f"read self.{found[0]}, or keep the list as an nn.ParameterList."
        )
