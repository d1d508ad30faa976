"""What PyTorch is told while a model is watched or recorded."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from pathlift.capture.witness import uncompiled
from pathlift.surroundings import callers_device, plain_arithmetic


@contextmanager
def below_autograd(gradients: bool = False) -> Iterator[None]:
    """Operations arrive whole, and nothing is kept for a backward pass.

    Args:
        gradients: what code is told that asks for the gradient mode.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    level = _functorch_level()
    with ExitStack() as stack:
        stack.enter_context(callers_device())
        stack.enter_context(uncompiled())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(plain_arithmetic())
        stack.enter_context(torch._C._AutoDispatchBelowAutograd())
        stack.enter_context(torch._C._AutoDispatchBelowADInplaceOrView())
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            while _functorch_level() > level:  # vmap levels that an error has left open
                torch._C._functorch._vmap_decrement_nesting()


def _functorch_level() -> int:
    stack = torch._C._functorch.get_interpreter_stack()
    return len(stack) if stack else 0


@contextmanager
def quiet() -> Iterator[None]:
    """No warning and no log of torch's reaches the user while a model is recorded."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
