"""Parameters in a module of this process, be it one of several replicas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathlift.capture.names import check_model, named_tensors
from pathlift.errors import ArgumentError
from pathlift.tensors import shards
from pathlift.tensors.extents import Extent, Factors, extents
from pathlift.tensors.rescale import Undo, rescale_
from pathlift.tensors.state import Optimizers


class ModuleHome:
    """A module; DDP, DataParallel and ``torch.compile`` wrappers are looked through.

    Attributes:
        model: the module inside the wrappers.
        structure: the same.
        parameters, buffers: each tensor once, under its first name.

    Raises:
        ArgumentError, CaptureError: see :func:`pathlift.capture.check_model`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = check_model(model)
        self.structure: nn.Module = self.model
        self.parameters, self.buffers, _ = named_tensors(self.model)
        self._groups: list[Any] = []
        if isinstance(model, nn.parallel.DistributedDataParallel):
            self._groups = [model.process_group]

    def value(self, name: str) -> Tensor:
        """A parameter, detached."""
        return self.parameters[name].detach()

    def label(self, name: str) -> str:
        """How messages speak of a parameter."""
        return f"parameter '{name}'"

    def extents(self, names: Iterable[str]) -> dict[str, Extent]:
        """The magnitudes of these tensors; integer tensors are left out."""
        tensors = self.tensors()
        found = {n: tensors[n] for n in names}
        return extents({n: t for n, t in found.items() if t.is_floating_point()})

    def store(self, matrix: Tensor) -> Tensor:
        """The matrix itself: memory is where everything is."""
        return matrix

    def agree(self, scales: NDArray[Any]) -> NDArray[Any]:
        """Of several processes the first one's scales: numbers may differ in their last bits."""
        import torch.distributed as dist

        tensor = torch.from_numpy(np.ascontiguousarray(scales)).to(self._device())
        for group in self._groups:
            dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)
        return np.asarray(tensor.cpu().numpy())

    def worst(self, change: float) -> float:
        """The largest of a non-negative number over all processes."""
        # The bits of a non-negative float64 order as its values do.
        bits = int(np.float64(change).view(np.int64))
        (bits,) = shards.largest((bits,), self._groups, self._device())
        return float(np.int64(bits).view(np.float64))

    def multiply_(
        self,
        factors: Mapping[str, Factors],
        known: Mapping[str, Extent] | None = None,
        optimizer: Optimizers = None,
    ) -> Undo:
        """See :class:`pathlift.homes.home.Home`."""
        return rescale_(self.tensors(), factors, optimizer, known)

    def refresh(self) -> None:
        """Look again at what the module holds, before it is conditioned another time.

        Raises:
            ArgumentError: a parameter is another object than when the module was captured.
        """
        self.settle()
        parameters, self.buffers, _ = named_tensors(self.model)
        for name, parameter in self.parameters.items():
            if parameters.get(name) is not parameter:
                raise ArgumentError(
                    f"parameter '{name}' is not the one that was captured; the model was changed "
                    f"(moved with a conversion, pruned, parametrised). Make a new Conditioner."
                )

    def settle(self) -> None:
        """Put away what a forward pass has left in memory; here nothing."""

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return {**self.buffers, **self.parameters}

    def _device(self) -> torch.device:
        found = next((p.device for p in self.parameters.values()), None)
        return found or torch.device("cpu")
