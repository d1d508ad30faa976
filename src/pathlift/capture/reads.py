"""Questions to tensors that make no ATen call: for their values, or for their gradients."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from pathlift.capture.refusals import in_torch

_READERS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}
_GRADIENT: Any = Tensor.requires_grad
_HOOKS = {Tensor.register_hook, Tensor.retain_grad}


class Reads(TorchFunctionMode):
    """Answers for tensors of a run below autograd, where none has a gradient.

    Args:
        refuse: called with a tensor whose values Python asks for.
        gradients: whether what is computed is to say that it requires a gradient.
        own: ids of parameters and buffers, which say so themselves.
    """

    def __init__(
        self, refuse: Callable[[Tensor], None], gradients: bool, own: Collection[int]
    ) -> None:
        super().__init__()
        self.refuse, self.gradients, self.own = refuse, gradients, own

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _READERS:
            self.refuse(args[0])
        elif self.gradients and func == _GRADIENT.__get__ and id(args[0]) not in self.own:
            # PyTorch's own code would go on to ask for what computed it.
            if not in_torch(sys._getframe(1).f_code):
                return bool(args[0].is_floating_point())
        elif self.gradients and func in _HOOKS:
            return RemovableHandle(OrderedDict())  # what a hook would do, no forward sees
        return func(*args, **(kwargs or {}))
