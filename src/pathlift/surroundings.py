"""What a caller may be in (modes, transforms, a default device): work is done apart from it.

Only the model itself runs on the caller's default device, as it does in the caller's own calls.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext
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
    with ExitStack() as stack:
        # The default device is one of the function modes. A second one on top would not do: up to
        # torch 2.6 the outer one wins.
        device = _HOST
        while torch._C._len_torch_function_stack():
            mode = _pop_function_mode()
            stack.callback(torch._C._push_on_torch_function_stack, mode)
            if isinstance(mode, DeviceContext) and device == _HOST:
                device = mode.device
        stack.callback(_callers.reset, _callers.set(device))
        stack.enter_context(_disable_current_modes())
        stack.enter_context(plain_arithmetic())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        yield


def _pop_function_mode() -> TorchFunctionMode:
    mode: TorchFunctionMode = torch._C._pop_torch_function_stack()
    return mode


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
    """The types that the model itself computes in, whatever the caller allows instead of them.

    That is autocast, and coarser products of float32 numbers (TF32, bfloat16). Rounding factors to
    fewer bits commutes with powers of two, so what keeps every bit here keeps every bit there.
    """
    # Without a cache: weights that an autocast region has cast in one run would enter the next.
    cpu = torch.autocast("cpu", enabled=False, cache_enabled=False)
    cuda = torch.autocast("cuda", enabled=False, cache_enabled=False)
    with cpu, cuda, _whole_products():
        yield


@contextmanager
def _whole_products() -> Iterator[None]:
    """Products of float32 numbers in float32; the settings are put back.

    Torch has two interfaces for them, and the older one raises where they contradict each other.
    So each setting is changed by the older one where that can be read, and by the newer one else.
    """
    with ExitStack() as stack:
        with suppress(RuntimeError):
            allowed = torch.get_float32_matmul_precision()
            if allowed != "highest":
                torch.set_float32_matmul_precision("highest")
                stack.callback(torch.set_float32_matmul_precision, allowed)
        with suppress(RuntimeError):  # torch.backends.cudnn may be frozen
            if torch._C._get_cudnn_allow_tf32():
                torch._C._set_cudnn_allow_tf32(False)
                stack.callback(torch._C._set_cudnn_allow_tf32, True)
        if hasattr(torch._C, "_get_fp32_precision_getter"):  # since torch 2.9
            own = [(b, o) for b in ("cuda", "mkldnn") for o in ("matmul", "conv", "rnn")]
            if any(torch._C._get_fp32_precision_getter(*one) in _COARSE for one in own):
                _refine(own, stack)
        yield


_COARSE = ("tf32", "bf16")


def _refine(operations: list[tuple[str, str]], stack: ExitStack) -> None:
    """Set the newer interface's settings to float32.

    A setting that is not given follows its parent's, and reads as that one's. So parents are
    taken away first: then it reads as it was given.
    """
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    for one in [("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), *operations]:
        given = read(*one)
        write(*one, "ieee" if one in operations else "none")
        stack.callback(write, *one, given)
