"""What a real run calls, to be held against a record: forward may look at what it is run on.

Code can ask for the type of a tensor, for the gradient mode or for a tracer, and do something else
for real than on fake tensors. Then the operations differ in their names or their order.
"""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Questions about a tensor, and calls that PyTorch makes for tensors of one kind only.
QUERIES = frozenset({"prim::device", "prim::layout", "aten::sym_size", "aten::sym_stride"})
QUERIES |= {"aten::sym_numel", "aten::sym_storage_offset", "aten::is_contiguous"}
QUERIES |= {"aten::is_strides_like_format", "aten::is_non_overlapping_and_dense", "aten::dim"}
QUERIES |= {"aten::size", "aten::stride", "aten::storage_offset", "aten::numel", "aten::is_pinned"}
_SILENT = QUERIES | {"aten::detach", "aten::alias", "aten::lift_fresh"}


def noted(name: str, seen: list[str]) -> None:
    """Add a call to what was seen, unless it depends on the kind of tensor alone."""
    if name not in _SILENT:
        seen.append(name)


class Witness(TorchDispatchMode):
    """Notes the names of the operations that the code under it calls."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # wrapping the dispatch would import the compiler, which takes seconds

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        noted(func._schema.name, self.seen)
        return func(*args, **(kwargs or {}))
