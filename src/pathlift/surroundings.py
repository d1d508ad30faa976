"""What a caller may be in (modes, transforms, a default device): work is done apart from it.

Only the model itself runs on the caller's default device, as it does in the caller's own calls.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

from pathlift.errors import ArgumentError

P = ParamSpec("P")
R = TypeVar("R")

_HOST = torch.device("cpu")
# The caller's default device, where work is done apart from it.
_callers: ContextVar[torch.device | None] = ContextVar("callers", default=None)


def apart(function: Callable[P, R]) -> Callable[P, R]:
    """A function that does the same wherever it is called.

    Raises:
        ArgumentError: it is called by a function that torch.func transforms.
    """

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch._C._functorch.peek_interpreter_stack():
            raise ArgumentError(
                f"{function.__qualname__} was called inside a function that torch.func transforms "
                f"(vmap, grad). Call it outside."
            )
        # In a function that is compiled this is a break, as any other library's code would be.
        compiler = sys.modules.get("torch._dynamo")
        run = function if compiler is None else compiler.disable(function)
        with _plain():
            return run(*args, **kwargs)

    return called


@contextmanager
def _plain() -> Iterator[None]:
    if _callers.get() is not None:
        yield
        return
    device = torch.get_default_device()
    token = _callers.set(device)
    try:
        with ExitStack() as stack:
            stack.enter_context(_disable_current_modes())
            stack.enter_context(plain_arithmetic())
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            if device != _HOST:
                stack.enter_context(_HOST)
            yield
    finally:
        _callers.reset(token)


@contextmanager
def callers_device() -> Iterator[None]:
    """Where a model runs: new tensors come to lie where the caller's own calls put them."""
    device = _callers.get()
    if device is None or device == _HOST:
        yield
    else:
        with device:
            yield


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """The types that the model itself computes in, whatever autocast the caller is in."""
    # Without a cache: weights that an autocast region has cast in one run would enter the next.
    cpu = torch.autocast("cpu", enabled=False, cache_enabled=False)
    cuda = torch.autocast("cuda", enabled=False, cache_enabled=False)
    with cpu, cuda:
        yield
