"""What tensors hold: their bytes, once per storage, and which storage they look at how.

Bytes and not values: expanded, conjugate, quantised and overlapping tensors need no case of their
own, and nothing is said to autograd about a buffer that gets back what it had.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from pathlift.tensors.alike import alike
from pathlift.tensors.shards import is_sharded, local_part

# What torch raises where a tensor has no storage: functorch's wrappers, opaque layouts, lazy
# parameters.
_NO_STORAGE = (RuntimeError, NotImplementedError, AttributeError, ValueError)


class Memory:
    """The bytes of storages, as they were when each was added."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Any, Any]] = {}
        self._left_out: set[int] = set()

    def leave_out(self, tensor: Tensor) -> None:
        """Never copy what lies in the storages of this tensor."""
        self._left_out.update(s.data_ptr() for s in storages(tensor))

    def keep(self, tensor: Tensor) -> bool:
        """Copy what lies in storages that were left out; whether there are any."""
        names = {s.data_ptr() for s in storages(tensor)} & self._left_out
        self._left_out -= names
        if names:
            self.add(tensor)
        return bool(names)

    def add(self, tensor: Tensor) -> list[int]:
        """Copy the bytes of a tensor's storages; returns the names they have here."""
        found = []
        for storage in storages(tensor):
            name = storage.data_ptr()
            if name in self._left_out:
                continue
            if name not in self._kept:
                self._kept[name] = (storage, storage.clone())
            found.append(name)
        return found

    def state(self, tensor: Tensor) -> TensorState:
        """A tensor as it is now; its bytes too, unless it is a parameter."""
        return TensorState(tensor, [] if isinstance(tensor, nn.Parameter) else self.add(tensor))

    def differing(self, names: Collection[int]) -> set[int]:
        """Of these names those of storages in which other bytes lie than when they were added."""
        kept = (self._kept[name] for name in names)
        same = alike([(_bytes(storage), _bytes(copy)) for storage, copy in kept])
        return {name for name, unchanged in zip(names, same, strict=True) if not unchanged}

    def restore(self) -> None:
        """Put back the bytes of every storage in which they differ."""
        for name in self.differing(self._kept):
            storage, copy = self._kept[name]
            if storage.nbytes() != copy.nbytes():
                storage.resize_(copy.nbytes())
            storage.copy_(copy)


class TensorState:
    """One tensor as it is now: its memory, how it looks at it, its gradient and attributes."""

    def __init__(self, tensor: Tensor, names: list[int]) -> None:
        self.tensor = tensor
        self.names = names
        self._leaf = tensor.is_leaf
        self._gradient = tensor.grad if self._leaf else None
        self._requires = tensor.requires_grad
        self._own = dict(vars(tensor)) if hasattr(tensor, "__dict__") else {}
        self._view = tensor.detach() if type(tensor) in (Tensor, nn.Parameter) else None
        self.look_again()

    def look_again(self) -> None:
        """Take the version that the tensor has now for the unchanged one."""
        self._version = _version(self.tensor)

    @property
    def touched(self) -> bool:
        """Whether the tensor was written to, as far as the count of its version tells."""
        return _version(self.tensor) != self._version or self._moved()

    def _moved(self) -> bool:
        """Whether ``.data``, ``set_`` or ``resize_`` has put other memory under the tensor."""
        if self._view is None or type(self.tensor) not in (Tensor, nn.Parameter):
            return False
        # Quicker, but not there for all layouts; it would copy what is conjugated lazily.
        with suppress(RuntimeError):
            lazy = self.tensor.is_conj() or self.tensor.is_neg()
            alike = self.tensor.dtype is self._view.dtype and not lazy
            if alike and self.tensor.is_set_to(self._view):
                return False
        return _geometry(self.tensor) != _geometry(self._view)

    def put_back(self) -> None:
        """Put back memory (not the bytes in it), gradient, ``requires_grad`` and attributes."""
        if self._view is not None and self._moved():
            self.tensor.data = self._view
        if self._leaf and self.tensor.is_leaf:
            if self.tensor.requires_grad != self._requires:
                self.tensor.requires_grad_(self._requires)
            if self.tensor.grad is not self._gradient:
                self.tensor.grad = self._gradient
        if hasattr(self.tensor, "__dict__"):
            own = vars(self.tensor)
            if own.keys() != self._own.keys() or any(own[k] is not v for k, v in self._own.items()):
                own.clear()
                own.update(self._own)


def storages(tensor: Tensor) -> list[Any]:
    """The storages that hold what a tensor holds on this process; none on the meta device."""
    found = []
    for part in _parts(tensor):
        with suppress(*_NO_STORAGE):
            storage = part.untyped_storage()
            if storage.nbytes() and storage.data_ptr():
                found.append(storage)
    return found


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is made of."""
    if is_sharded(tensor):
        return [local_part(tensor)]
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        return []
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _parts(getattr(tensor, name))]
    with torch.no_grad():
        if tensor.layout == torch.sparse_coo:
            return [tensor._indices(), tensor._values()]
        if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
            return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
        if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
            return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def _bytes(storage: Any) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _version(tensor: Tensor) -> int | None:
    with suppress(RuntimeError):  # tensors of inference mode have none
        return tensor._version
    return None


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    where: object = None
    strides: object = None
    with suppress(*_NO_STORAGE):
        where = tensor.untyped_storage()._cdata
        strides = (tensor.stride(), tensor.storage_offset())
    return tensor.dtype, tensor.device, tensor.layout, tensor.shape, strides, where
