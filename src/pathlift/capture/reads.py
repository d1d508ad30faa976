"""Reads of values that make no ATen call: a real tensor's ``tolist`` or ``numpy``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_READERS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}


class Reads(TorchFunctionMode):
    """Calls ``refuse(tensor)`` where Python asks for all values of a tensor."""

    def __init__(self, refuse: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.refuse = refuse

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _READERS:
            self.refuse(args[0])
        return func(*args, **(kwargs or {}))
