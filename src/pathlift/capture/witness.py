"""What a real run calls, to be held against a record: forward may look at what it is run on.

Code can ask for the type of a tensor, for the gradient mode or for a tracer, and do something else
for real than on fake tensors. Then the operations differ in their names or their order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from pathlift.capture.refusals import HigherOrder
from pathlift.capture.schemas import bound_arguments, plan_of, tensors_of

# Calls an operation with its arguments.
Run = Callable[[Any, Any, Any], Any]

_COMPILER = "torch._dynamo"

# Questions about a tensor, and calls that PyTorch makes for tensors of one kind only.
QUERIES = frozenset({"prim::device", "prim::layout", "aten::sym_size", "aten::sym_stride"})
QUERIES |= {"aten::sym_numel", "aten::sym_storage_offset", "aten::is_contiguous"}
QUERIES |= {"aten::is_strides_like_format", "aten::is_non_overlapping_and_dense", "aten::dim"}
QUERIES |= {"aten::size", "aten::stride", "aten::storage_offset", "aten::numel", "aten::is_pinned"}
_VALUES = frozenset({"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"})
_SILENT = QUERIES | {"aten::detach", "aten::alias", "aten::lift_fresh"}


def noted(name: str, seen: list[str]) -> None:
    """Add a call to what was seen, unless it depends on the kind of tensor alone."""
    if name not in _SILENT:
        seen.append(name)


def agree(real: Sequence[str], recorded: Sequence[str]) -> bool:
    """Whether a record stands for a real run.

    Libraries leave out checks of values where a tracer runs (a warning about padding, say). So a
    real run may have more: calls that end in the reading of a value, after which it goes on as
    recorded. What else it does for other values is verified, not shown.
    """
    k = 0
    for name in recorded:
        if k < len(real) and real[k] != name:
            reads = (j for j in range(k, len(real)) if real[j] in _VALUES)
            k = next(reads, len(real)) + 1
        if k >= len(real) or real[k] != name:
            return False
        k += 1
    return k == len(real)


def higher_order(func: Any) -> bool:
    """Whether an operation takes functions as arguments; it then has no schema."""
    return isinstance(func, HigherOrderOperator)


class Watch(TorchDispatchMode):
    """A mode that sees every call, also of operations that take functions."""

    # Else torch raises in the middle of one, and later real calls of it fail.
    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # wrapping the dispatch would import the compiler, which takes seconds

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []


@contextmanager
def uncompiled() -> Iterator[None]:
    """Functions that the model has compiled run as they are written, and stay compiled.

    Under a mode the compiler would give up on them for good.
    """
    loaded = _COMPILER in sys.modules  # importing it takes seconds, and nobody may need it
    try:
        with torch.compiler.set_stance("force_eager") if loaded else nullcontext():
            yield
    finally:
        if not loaded and _COMPILER in sys.modules:
            import_module(_COMPILER).reset()  # what it gave up on is all that it knows yet


class Witness(Watch):
    """Notes the names of the operations that the code under it calls.

    Args:
        run: calls an operation with its arguments.
        writing: called with every tensor that is about to be written.
    """

    def __init__(self, run: Run, writing: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.run, self.writing = run, writing

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if higher_order(func):
            raise HigherOrder(func.name())
        noted(func._schema.name, self.seen)
        kwargs = kwargs or {}
        plan = plan_of(func)
        if plan.mutated:
            bound = bound_arguments(plan, args, kwargs)
            for tensor in tensors_of([bound[name] for name in plan.mutated]):
                self.writing(tensor)
        return self.run(func, args, kwargs)
